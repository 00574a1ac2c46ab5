"""Servers that deploy/base/start.sh itself starts, and certificates from deploy/certificates.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.assemble import TRITON, assemble_backends, tritonserver
from server.local import GUARD, LOOPBACK, server_environment
from server.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "deploy" / "base"

SOURCES = {
    "buildah": "apt-get install buildah crun",
    "promtool": "apt-get install prometheus",
}


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """The path of a program that pip doesn't install; skips, with the reason, where it's missing."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is missing: {SOURCES.get(name, f'apt-get install {name}')}")
        return path

    return find


@dataclass(frozen=True)
class Deployment:
    """A tritonserver that start.sh started and probe.py found to be serving."""

    url: str
    http_url: str
    metrics_address: str
    pid: int
    """Process number of tritonserver itself."""
    models: Path

    def probe(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run probe.py against this server."""
        metrics = f"http://{self.metrics_address}/metrics"
        command = [sys.executable, str(BASE / "probe.py"), *arguments, "--url", self.http_url]
        command += ["--metrics-url", metrics, "--models", str(self.models)]
        return subprocess.run(command, capture_output=True, text=True)


@contextmanager
def _deployed(repository: Path, log: Path, settings: dict[str, str]) -> Iterator[Deployment]:
    ports = {name: free_port(LOOPBACK) for name in ("grpc", "http", "metrics")}
    prefix = f"deploy_{os.getpid()}_{ports['grpc']}_"
    environment = server_environment(TRITON)
    environment["PATH"] = f"{tritonserver().parent}:{environment['PATH']}"
    environment |= {"MODELS": str(repository), **settings}
    command = [
        *("/bin/sh", str(BASE / "start.sh")),
        f"--backend-directory={assemble_backends()}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        "--exit-timeout-secs=0",
        *(f"--{name}-port={port}" for name, port in ports.items()),
        # The containers listen on all addresses; this machine is not a container.
        *(f"--{name}-address={LOOPBACK}" for name in ("grpc", "metrics")),
    ]
    guarded = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), prefix, "0", *command]
    with log.open("w") as output:
        process = subprocess.Popen(
            guarded, env=environment, stdout=subprocess.PIPE, stderr=output, text=True, start_new_session=True
        )
    assert process.stdout is not None
    deployment = Deployment(
        url=f"{LOOPBACK}:{ports['grpc']}",
        http_url=f"http://{LOOPBACK}:{ports['http']}",
        metrics_address=f"{LOOPBACK}:{ports['metrics']}",
        pid=int(process.stdout.readline()),
        models=Path(environment["MODELS"]),
    )
    try:
        deadline = time.monotonic() + 300
        while deployment.probe("infer").returncode:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
        yield deployment
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="session")
def deploy(
    demo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Deployment]]:
    """Start a server with the given settings of start.sh; it runs until the session ends."""
    logs = tmp_path_factory.mktemp("deployments")
    with ExitStack() as running:

        def start(**settings: str) -> Deployment:
            log = logs / ("-".join(settings.values()).replace("/", "_")[-80:] + ".log")
            return running.enter_context(_deployed(demo_repository, log, settings))

        yield start


@pytest.fixture(scope="session")
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    """A server as it is deployed by default, but for a known admin token."""
    return deploy(ADMIN_TOKEN="token-of-the-tests")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a folder of certificates under a root of its own."""
    folder = tmp_path_factory.mktemp("certificates")

    def make(name: str) -> Path:
        subprocess.run(
            [str(ROOT / "deploy" / "certificates.sh"), str(folder / name)], check=True, capture_output=True
        )
        return folder / name

    return make
