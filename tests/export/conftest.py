"""A preset small enough to be exported many times, and a repository that has only its committed configs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir
import pytest

from export import build_graphs
from export.export import export_preset
from export.repository import copy_configs
from gigapath_contract.schema import MODELS
from training.models.presets import PRESETS, Preset, SlideEncoderConfig, TileEncoderConfig
from training.models.variant import EmbeddingVariant

ROOT = Path(__file__).resolve().parents[2]
TINY = Preset(
    "tiny",
    TileEncoderConfig("tiny_tile_enc", embed_dim=32, depth=1, heads=2),
    SlideEncoderConfig("tiny_slide_enc", in_chans=32, embed_dim=64, depth=1),
    classes=("benign", "lesion"),
    variant=EmbeddingVariant("cls", 1, "encoder_norm+norm"),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Preset:
    """The preset `tiny`, registered."""
    monkeypatch.setitem(PRESETS, TINY.name, TINY)
    return TINY


@pytest.fixture
def empty_repository(tmp_path: Path) -> Path:
    """Committed configs only."""
    repository = tmp_path / "repository"
    copy_configs(ROOT / "model_repository", repository)
    return repository


@pytest.fixture(scope="session")
def _tiny_exported(export_kept: Callable[..., Path]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, TINY.name, TINY)
        return export_kept(TINY.name, "tiny_repository", definition=repr(TINY))


@pytest.fixture
def tiny_repository(_tiny_exported: Path, tmp_path: Path) -> Path:
    """The preset `tiny` exported; a test's own copy."""
    return Path(shutil.copytree(_tiny_exported, tmp_path / "tiny" / "repository", symlinks=True))


@pytest.fixture(scope="session")
def _two_versions_exported(
    _tiny_exported: Path, real_slide: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    repository = tmp_path_factory.mktemp("two") / "repository"
    shutil.copytree(_tiny_exported, repository, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, TINY.name, TINY)
        export_preset(TINY.name, repository=repository, slide=real_slide, precision="fp16", gpu_memory=80)
    return repository


@pytest.fixture
def two_versions(_two_versions_exported: Path, tmp_path: Path) -> Path:
    """A test's own copy of `tiny` as version 1 (fp32) and 2 (fp16, for 80 GiB of GPU), which is served."""
    return Path(shutil.copytree(_two_versions_exported, tmp_path / "two" / "repository", symlinks=True))


@pytest.fixture
def slide_graphs_traced(_two_versions_exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision exports of `tiny` take the slide encoder's graphs from an earlier one.

    Tracing these takes most of an export's time.
    """
    for model, function in (("slide_encoder", "slide_graph"), ("slide_occlusion", "occlusion_graph")):
        path = _two_versions_exported / model / "2" / "model.onnx"
        monkeypatch.setattr(build_graphs, function, lambda _, path=path: onnx_ir.load(path))


@pytest.fixture
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """What a server would read in a repository: every file of its models by path, links followed."""

    def read(repository: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(repository)): path.read_bytes()
            for model in MODELS
            for path in sorted((repository / model).rglob("*"))
            if path.is_file() and ".staging" not in path.parts and path.name != ".lock"
        }

    return read
