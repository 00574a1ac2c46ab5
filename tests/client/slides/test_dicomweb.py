"""Slides of a real DICOMweb server, Orthanc, with a login: OpenSlide's pixels of the same files on disk."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from client.errors import ClientError
from client.slides.address import TOKENS, slide_path
from client.slides.fingerprint import slide_sha256
from client.slides.slide import open_slide
from server.ports import free_port
from tests.support.dicom import write_segmentation, write_series

LOGIN = "reader:pass:word"
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def _ask(url: str, data: bytes | None = None) -> bytes:
    basic = base64.b64encode(LOGIN.encode()).decode()
    request = urllib.request.Request(url, data, {"Authorization": f"Basic {basic}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that asks for LOGIN."""
    program = shutil.which("Orthanc", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or not PLUGIN.exists():
        pytest.skip("Orthanc is missing: apt-get install orthanc orthanc-dicomweb")
    folder, port = tmp_path_factory.mktemp("orthanc"), free_port("127.0.0.1")
    user, _, password = LOGIN.partition(":")
    settings = {
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {user: password},
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    address = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, folder / "orthanc.json"], stdout=log, stderr=log)
    try:
        for _ in range(300):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                _ask(f"{address}/system")
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def series(
    orthanc: str, picture: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, Path]]:
    """Address and a file of each series that the server holds."""
    folder = tmp_path_factory.mktemp("series")
    made: dict[str, tuple[str, Path]] = {}
    pixels = picture[700:1700, 300:1600]
    for stem, lossless in (("jpeg", False), ("lossless", True)):
        (folder / stem).mkdir()
        write_series(folder / stem, stem, pixels, lossless=lossless)
    for stem in ("label", "mask"):
        (folder / stem).mkdir()
    write_series(folder / "label", "label", pixels[:300, :300], levels=(1,), flavour="LABEL")
    write_segmentation(folder / "mask" / "mask.dcm", "other")
    for path in sorted(folder.glob("*/*.dcm")):
        _ask(f"{orthanc}/instances", path.read_bytes())
        data = pydicom.dcmread(path, stop_before_pixels=True)
        address = f"{orthanc}/dicom-web/studies/{data.StudyInstanceUID}/series/{data.SeriesInstanceUID}"
        made.setdefault(path.parent.name, (address, path))
    return made


@pytest.fixture(autouse=True)
def login(orthanc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKENS, f"{orthanc.removeprefix('http://')}={LOGIN}")


@pytest.mark.parametrize("kind", ["jpeg", "lossless"])
@pytest.mark.parametrize("mpp", [0.5, 2.0])
def test_all_tiles_are_openslides(
    kind: str, mpp: float, series: dict[str, tuple[str, Path]], reading: SimpleNamespace
) -> None:
    address, path = series[kind]
    plan, expected = reading.plan(slide_path(address), mpp=mpp), reading.plan(path, mpp=mpp)
    assert plan.fingerprint == expected.fingerprint
    assert plan.level == (mpp == 2.0)
    pixels, valid, reader = reading.collect(plan, workers=4)
    wanted, _, local = reading.collect(expected)
    assert (reader, local) == ({"wsidicom"}, {"openslide"})
    np.testing.assert_array_equal(pixels, wanted)
    assert valid.all()


def test_a_series_is_the_slide_that_openslide_opens(series: dict[str, tuple[str, Path]]) -> None:
    address, path = series["jpeg"]
    with open_slide(slide_path(address)) as slide, open_slide(path) as same:
        assert slide.slide_id == address.rpartition("/")[2]
        for name in (
            "dimensions",
            "level_dimensions",
            "level_downsamples",
            "mpp",
            "bounds",
            "vendor",
            "notes",
        ):
            assert getattr(slide, name) == getattr(same, name), name
        for position in ((-50, -30), (1200, 900), (5000, 5000)):  # white beyond the edge
            part = slide.read(0, position, (200, 150))
            np.testing.assert_array_equal(part, same.read(0, position, (200, 150)))
        np.testing.assert_array_equal(slide.overview(8).pixels, same.overview(8).pixels)


def test_the_identity_of_a_series_is_its_instances_on_any_server(
    series: dict[str, tuple[str, Path]], orthanc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, host = series["jpeg"][0], orthanc.removeprefix("http://")
    other = host.replace("127.0.0.1", "localhost")
    monkeypatch.setenv(TOKENS, f"{host}={LOGIN} {other}={LOGIN}")
    digest = slide_sha256(slide_path(address))
    assert digest == slide_sha256(slide_path(address.replace(host, other)))
    assert digest != slide_sha256(slide_path(series["lossless"][0]))


def _refused(address: str) -> str:
    with pytest.raises(ClientError) as caught:
        open_slide(slide_path(address))
    message = str(caught.value)
    assert message.startswith(f"{address}: ")
    assert "\n" not in message
    assert "word" not in message
    return message.removeprefix(f"{address}: ")


def test_what_cannot_be_read_is_one_line(
    series: dict[str, tuple[str, Path]], orthanc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, host = series["jpeg"][0], orthanc.removeprefix("http://")
    for kind in ("label", "mask"):
        assert _refused(series[kind][0]).startswith("has no whole-slide image: give a series of one")
    assert _refused(f"{address}7").startswith("has no whole-slide image")
    assert _refused(address.replace("dicom-web", "elsewhere")).startswith("the server answers 404: check")
    monkeypatch.setenv(TOKENS, f"{host}=reader:sword")
    assert _refused(address) == f"the server refuses access (401): check what {TOKENS} holds for {host}"
    monkeypatch.setenv(TOKENS, f"elsewhere={LOGIN}")
    assert _refused(address) == (
        f"the server refuses access (401): set {TOKENS}={host}=TOKEN, or {host}=USER:PASSWORD"
    )
    monkeypatch.delenv(TOKENS)
    away = address.replace(host, f"127.0.0.1:{free_port('127.0.0.1')}")
    assert _refused(away).startswith("cannot be read (ConnectionError): check the address and the network")


def test_commands_take_a_series(series: dict[str, tuple[str, Path]], run_client: Any, tmp_path: Path) -> None:
    (address, path), manifest = series["jpeg"], tmp_path / "slides.csv"
    manifest.write_text(f"slide_id,path\nserved,{address}\nlocal,{path}\n")
    done = run_client("tissue", manifest, "--out", tmp_path)
    assert done.code == 0, done.err
    rows = [line.split(",") for line in (tmp_path / "tissue.csv").read_text().splitlines()]
    assert rows[1][1] == address
    assert rows[1][4:] == rows[2][4:]
    masks = [(tmp_path / "masks" / f"{name}.png").read_bytes() for name in ("served", "local")]
    assert masks[0] == masks[1]
