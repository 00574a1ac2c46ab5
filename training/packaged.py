"""Trained weights that come with the repository: those of the demo preset."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "pretrained"


class Packaged(NamedTuple):
    """A preset's files: tile encoder, slide encoder with head, and how they came about and score."""

    tile: Path
    slide: Path
    facts: Path


def packaged_files(preset: str) -> Packaged:
    """Where a preset's packaged weights are, or would be."""
    folder = FOLDER / preset
    return Packaged(
        folder / "tile_encoder.safetensors", folder / "slide_model.safetensors", folder / "facts.json"
    )


def packaged_weights(preset: str) -> Packaged | None:
    """A preset's packaged weights; None where it has none."""
    files = packaged_files(preset)
    return files if files.tile.exists() and files.slide.exists() else None
