"""What tests share: the real slide, one exported demo repository and one real Triton a test run."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

from server import ports
from server.local import RunningServer, run_triton
from tests.support.kept import copy_of_kept

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "tests"
"""Exports that outlive a run; `make clean` removes them."""

# In the client's environment (make setup ROOMS=client) files that import PyTorch or onnx are left out.
WITHOUT_TORCH = find_spec("torch") is None
collect_ignore = [
    str(path)
    for path in Path(__file__).parent.rglob("test_*.py")
    if WITHOUT_TORCH and re.search(r"^(import|from) (torch|onnx)\b", path.read_text(), re.MULTILINE)
]


def pytest_report_header() -> str | None:
    """Say what is left out."""
    return f"without PyTorch: {len(collect_ignore)} test files left out" if WITHOUT_TORCH else None


# The same examples in every run, however busy the machine is.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

# Each of eight workers takes its ports from a part of the range: none is found free by two of them at once.
ports.FREE_PORTS = ports.FREE_PORTS[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8 :: 8]

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_slide() -> Path:
    """CMU-1-Small-Region, a real Aperio slide (2220x2967 px, 0.499 mpp)."""
    path = ROOT / "build" / "CMU-1-Small-Region.svs"
    assert path.exists(), "the real slide is missing: run `make build/CMU-1-Small-Region.svs`"
    return path


@pytest.fixture(scope="session")
def export_kept(real_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`export_kept(preset, folder, definition="")` exports into build/tests/<folder> and returns a copy.

    Unchanged input is recognised, as by every export, so a second run takes seconds. Changed input starts
    from an empty folder: the version is always 1, and nothing old stays. `definition` is what decides the
    preset in addition to the repository's code.
    """
    pytest.importorskip("torch", reason="exporting needs PyTorch: make setup ROOMS=all")
    from export.export import export_preset
    from export.fingerprint import input_key
    from export.repository import copy_configs

    def export(preset: str, folder: str, definition: str = "") -> Path:
        def fill(kept: Path) -> None:
            copy_configs(ROOT / "model_repository", kept)
            assert export_preset(preset, repository=kept, slide=real_slide).version == 1

        key = f"{input_key(preset)} {definition}"
        return copy_of_kept(KEPT / folder, key, fill, tmp_path_factory.mktemp("kept") / folder)

    return export


@pytest.fixture(scope="session")
def demo_repository(export_kept: Callable[..., Path]) -> Path:
    """A model repository with the `demo` preset exported into it; read only, one for the whole session."""
    return export_kept("demo", "model_repository")


@pytest.fixture(scope="session")
def tile_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A run of `tiles` of the preset `tiny`, and one of `finetune` on its embeddings; registers `tiny`."""
    pytest.importorskip("torch", reason="exporting needs PyTorch: make setup ROOMS=all")
    import torch

    from tests.export.conftest import TINY
    from training.models.build import build_models
    from training.models.presets import PRESETS
    from training.models.weights import weights_digest
    from training.runs.checkpoint import save_run, save_tile_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, TINY.name, TINY)
        models, root = build_models(TINY, seed=3), tmp_path_factory.mktemp("runs")
        folders = root / "tiles", root / "slides"
        for folder in folders:
            folder.mkdir()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            head = torch.nn.Linear(TINY.tile.embed_dim, 3)
        save_tile_run(folders[0], TINY.name, models.tile, head, ("stroma", "tumour", "other"))
        encoder = weights_digest(models.tile.vit.state_dict())
        save_run(folders[1], TINY, models.slide_model, tile_encoder_sha256=encoder)
        yield folders


@pytest.fixture(scope="session")
def tile_head_repository(
    tile_runs: tuple[Path, Path], real_slide: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An export of `tile_runs` with patch tokens; read only."""
    from export.export import export_preset
    from export.fingerprint import input_key
    from export.repository import copy_configs
    from tests.export.conftest import TINY

    def fill(kept: Path) -> None:
        copy_configs(ROOT / "model_repository", kept)
        export_preset(repository=kept, slide=real_slide, checkpoints=tile_runs, patch_tokens=True)

    key = f"{input_key(None, checkpoints=tile_runs)} {TINY}"
    return copy_of_kept(KEPT / "tile_head", key, fill, tmp_path_factory.mktemp("kept") / "tile_head")


@pytest.fixture(scope="session")
def triton_server(demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real Triton that serves `demo_repository`."""
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with run_triton(demo_repository, log=log, client_shared_memory=True) as server:
        yield server


@pytest.fixture(scope="session")
def triton_url(triton_server: RunningServer) -> str:
    """Its host:port of gRPC."""
    return triton_server.url
