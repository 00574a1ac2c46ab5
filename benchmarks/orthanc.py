"""A DICOMweb server that asks for a login: Orthanc, from the distribution's packages."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pydicom

from client.slides.address import TOKENS
from server.ports import free_port

LOGIN = ("reader", "pass:word")
MISSING = "Orthanc is missing: apt-get install orthanc orthanc-dicomweb"
_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@dataclass(frozen=True)
class Orthanc:
    """A running server, at `http://host`."""

    host: str

    @property
    def service(self) -> str:
        """The address of its DICOMweb service."""
        return f"http://{self.host}/dicom-web"

    @property
    def tokens(self) -> dict[str, str]:
        """The client's environment variable with the login."""
        return {TOKENS: f"{self.host}={':'.join(LOGIN)}"}

    def ask(self, path: str, data: bytes | None = None) -> bytes:
        """What it answers to GET, or with `data` to POST."""
        basic = base64.b64encode(":".join(LOGIN).encode()).decode()
        request = urllib.request.Request(
            f"http://{self.host}{path}", data, {"Authorization": f"Basic {basic}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def store(self, instances: Iterable[Path]) -> list[str]:
        """Give it DICOM files; the addresses of their series."""
        found: dict[str, None] = {}
        for path in instances:
            self.ask("/instances", path.read_bytes())
            data = pydicom.dcmread(path, stop_before_pixels=True)
            found[f"{self.service}/studies/{data.StudyInstanceUID}/series/{data.SeriesInstanceUID}"] = None
        return list(found)


@contextmanager
def serve_orthanc(folder: Path) -> Iterator[Orthanc | None]:
    """A server on loopback that keeps its files in `folder`; None where it is not installed."""
    program = shutil.which("Orthanc", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or not _PLUGIN.exists():
        yield None
        return
    port = free_port("127.0.0.1")
    settings = {
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": dict([LOGIN]),
        "Plugins": [str(_PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, folder / "orthanc.json"], stdout=log, stderr=log)
    try:
        server = Orthanc(f"127.0.0.1:{port}")
        _wait(server, process, folder / "log")
        yield server
    finally:
        process.terminate()
        process.wait()


def _wait(server: Orthanc, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        try:
            server.ask("/system")
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"Orthanc does not answer: see {log}")
