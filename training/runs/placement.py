"""Name runs whose tiles lay in other position cells in training than they do when served.

Version 1 of the coordinate rules (`gigapath_contract.coordinates.RULE_VERSION`) scaled by a float and rounded
down, so that a tile whose true position is the beginning of a cell could fall into the cell before it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gigapath_contract.coordinates import CELL, LevelZeroScale, grid_coordinates
from gigapath_contract.errors import CoordinateError, FeatureFileError
from gigapath_contract.features import read_tile_features
from training.errors import TrainingError
from training.files import read_json, read_yaml
from training.runs.layout import DATA, ENVIRONMENT, METADATA, config_path

VERSION_FIELD = "coordinate_rule_version"

logger = logging.getLogger(__name__)


def rule_version(folder: Path) -> int:
    """The version of the coordinate rules that a run's training began with; runs that record none have 1."""
    for name in (ENVIRONMENT, METADATA):
        version = _read_json(folder / name).get(VERSION_FIELD)
        if version is not None:
            return int(version)
    return 1


def warn_misplaced(folder: Path, rule: str | None = None) -> None:
    """Log one warning if the run in `folder` was trained on positions that its tiles don't have when served.

    `rule` is the variant's coordinate rule, by default the one in `run.json`. Coordinates are read from the
    feature files in the run's record; where those are missing, the warning says so.
    """
    rule = rule or _read_json(folder / METADATA).get("variant", {}).get("coordinates")
    if rule in (None, "level0/256") or rule_version(folder) > 1:
        return
    sides, unknown = _misplaced(folder, str(rule))
    wrong = f"{folder}: trained under an earlier, inexact coordinate rule {rule}: "
    if sides:
        shown = ", ".join(map(str, sides[:5])) + (f" and {len(sides) - 5} more" if len(sides) > 5 else "")
        logger.warning(
            "%stiles of %s px lay in other position cells than they do when served: train it again",
            wrong,
            shown,
        )
    elif unknown:
        logger.warning(
            "%stiles of some sizes, such as 506 px, lay in other position cells than when served, and the "
            "sizes of this run's tiles are unknown, as its feature files are missing: train it again",
            wrong,
        )


def _misplaced(folder: Path, rule: str) -> tuple[list[int], bool]:
    """Tile sizes in level-0 px of slides with misplaced tiles, and whether some slide's are unknown."""
    import h5py  # here, so that an export of unchanged input stays fast

    names = list(_read_json(folder / DATA).get("sha256", {}))
    config = config_path(folder)
    content = read_yaml(config) if config.exists() else {}
    features = Path((content.get("data") or {}).get("features", "features"))
    sides: set[int] = set()
    unknown = not names
    for name in names:
        try:
            with h5py.File(features / name, "r") as file:
                stored = read_tile_features(file)
            scale, coords = stored.scale, stored.coords
            now = grid_coordinates(coords, rule, scale, grid=np.iinfo(np.int32).max) // CELL
            before = float_coordinates(coords, rule, scale) // CELL
        except (OSError, FeatureFileError, CoordinateError):
            unknown = True
            continue
        for axis in np.flatnonzero((before != now).any(axis=0)):
            sides.add(scale.tile_size[axis] if scale.tile_size else round(CELL * 0.5 / scale.mpp[axis]))  # type: ignore[index]
    return sorted(sides), unknown


def float_coordinates(coords: npt.NDArray[Any], rule: str, scale: LevelZeroScale) -> npt.NDArray[np.int64]:
    """Version 1 of `grid_coordinates`, kept to recognise what it misplaced."""
    if rule == "level0/patch_size_level0":
        factor = CELL / np.array(scale.tile_size, np.float64)
    else:
        factor = np.array(scale.mpp, np.float64) / 0.5
    return np.floor(coords * factor).astype(np.int64)


def _read_json(path: Path) -> dict[str, Any]:
    """A part of a run's record; empty where it is missing or damaged, which is the reader's to report."""
    try:
        found = read_json(path)
    except TrainingError:
        return {}
    return found if isinstance(found, dict) else {}
