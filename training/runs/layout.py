"""The files of a run folder."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"
OLD_CONFIG = "recipe.yaml"
"""The name of `CONFIG` in runs that record no version of the coordinate rules."""
DATA = "data.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.json"
MODEL_CARD = "MODEL_CARD.md"
MODEL = "model.safetensors"
METADATA = "run.json"
TILE_METADATA = "tile_run.json"
PREDICTIONS = "predictions_{split}.csv"
REPORT = "report"
TILE_MODEL = "tile_encoder.safetensors"
TILE_HEAD = "tile_head.safetensors"


def config_path(folder: Path) -> Path:
    """The file with a run's configuration, which may not exist."""
    old = folder / OLD_CONFIG
    return old if old.exists() else folder / CONFIG
