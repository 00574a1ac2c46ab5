"""Whose weights an export takes: the preset's own, a folder's, or a fine-tuning run's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.errors import ExportError
from export.export import choose_models
from training.errors import TrainingError
from training.models.build import Models, build_models
from training.models.packaged import packaged_weights
from training.models.presets import get_preset
from training.models.weights import weights_digest
from training.runs.checkpoint import published_state, save_run


@pytest.fixture(scope="module")
def other() -> Models:
    """The demo preset with weights of its own."""
    return build_models("demo", seed=5)


@pytest.fixture(scope="module")
def folder(other: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as published: `pytorch_model.bin` and `slide_encoder.pth`."""
    root = tmp_path_factory.mktemp("weights")
    torch.save(other.tile.vit.state_dict(), root / "pytorch_model.bin")
    torch.save(published_state(other.slide_model), root / "slide_encoder.pth")
    return root


@pytest.fixture(scope="module")
def run(other: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run's folder, of the slide model of `other`."""
    root = tmp_path_factory.mktemp("run")
    save_run(root, get_preset("demo"), other.slide_model)
    return root


def digests(models: Models) -> tuple[str, str]:
    return weights_digest(models.tile.state_dict()), weights_digest(models.slide_model.state_dict())


def test_the_demo_alone_comes_with_trained_weights(other: Models) -> None:
    own = choose_models(None, None)
    assert own.trained
    assert digests(own)[0] != digests(other)[0]
    assert packaged_weights("gigapath-flash") is packaged_weights("gigapath") is None


def test_a_folder_and_a_run_bring_theirs(folder: Path, run: Path, other: Models) -> None:
    own, (tile, slide) = digests(choose_models(None, None)), digests(other)
    assert own[0] != tile
    assert own[1] != slide
    found = {
        "folder": choose_models("demo", str(folder)),
        "run": choose_models(None, None, [run]),
        "both": choose_models(None, str(folder), [run]),
    }
    assert {name: digests(models) for name, models in found.items()} == {
        "folder": (tile, slide),
        "run": (own[0], slide),
        "both": (tile, slide),
    }
    assert all(models.trained for models in found.values())


def test_what_does_not_fit_together_is_one_clear_line(folder: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="was fine-tuned from demo, not gigapath: leave the preset out"):
        choose_models("gigapath", None, [run])
    with pytest.raises(TrainingError, match="is not a finished fine-tuning run"):
        choose_models(None, None, [tmp_path])
    with pytest.raises(TrainingError, match=r"pytorch_model\.bin"):
        choose_models("demo", str(tmp_path))
    with pytest.raises(TrainingError, match="doesn't fit"):
        choose_models("gigapath-flash", str(folder))
