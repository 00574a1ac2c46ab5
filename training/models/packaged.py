"""Trained weights packaged with the repository: those of the demo preset."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[1] / "pretrained"


class Packaged(NamedTuple):
    """A preset's files: tile encoder, slide encoder with head, and facts on their training and scores."""

    tile: Path
    slide: Path
    facts: Path


def files_in(folder: Path) -> Packaged:
    """The files of `folder`, which may not exist."""
    names = ("tile_encoder.safetensors", "slide_model.safetensors", "facts.json")
    return Packaged(*(folder / name for name in names))


def packaged_files(preset: str) -> Packaged:
    """Paths of a preset's packaged weights, which may not exist."""
    return files_in(FOLDER / preset)


def packaged_weights(preset: str) -> Packaged | None:
    """A preset's packaged weights; None where it has none."""
    files = packaged_files(preset)
    return files if files.tile.exists() and files.slide.exists() else None
