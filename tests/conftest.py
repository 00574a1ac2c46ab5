"""What tests share: the real slide, one exported demo repository and one real Triton a test run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_slide() -> Path:
    """CMU-1-Small-Region, a real Aperio slide (2220x2967 px, 0.499 mpp)."""
    path = ROOT / "build" / "CMU-1-Small-Region.svs"
    assert path.exists(), "the real slide is missing: run `make build/CMU-1-Small-Region.svs`"
    return path


@pytest.fixture(scope="session")
def demo_repository(tmp_path_factory: pytest.TempPathFactory, real_slide: Path) -> Path:
    """A model repository with the `demo` preset exported into it; read only, one for all worker processes."""
    from export.export import export_preset
    from export.repository import copy_configs

    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    repository, done = shared / "model_repository", shared / "exported"
    with FileLock(shared / "export.lock"):
        if not done.exists():
            copy_configs(ROOT / "model_repository", repository)
            export_preset("demo", repository=repository, slide=real_slide)
            done.touch()
    return repository


@pytest.fixture(scope="session")
def triton_url(demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a real Triton that serves `demo_repository` over gRPC."""
    from server.local import run_triton

    with run_triton(demo_repository, log=tmp_path_factory.mktemp("log") / "triton.log") as server:
        yield server.url
