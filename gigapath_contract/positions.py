"""Where a feature file's tiles lie on level 0, by the rules of the tool that wrote the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigapath_contract.coordinates import LevelZeroScale, read_scale
from gigapath_contract.errors import CoordinateError, MppMissing

_MICRONS = ("um", "µm", "μm", "micron", "microns", "micrometer", "micrometers")  # both signs for micro
_PIXELS = ("px", "pixel", "pixels")
_FIRST_STAMP = (224, 256.0)  # STAMP's coordinates before version 2 have no unit: 224 are 256 µm


@dataclass(frozen=True, eq=False)
class TilePositions:
    """Top-left corners [N, 2] in level-0 px, the scale, and what had to be assumed (empty: nothing)."""

    coords: NDArray[Any]
    scale: LevelZeroScale
    assumed: str


def level0_positions(
    coords: NDArray[Any],
    attributes: Mapping[str, Any],
    *,
    tile_size: int | None = None,
    mpp: float | None = None,
) -> TilePositions:
    """Read `coords` [N, 2] by the file's `attributes`: ours, TRIDENT's, CLAM's or STAMP's.

    TRIDENT and we store level-0 pixels and the tiles' size on level 0; CLAM level-0 pixels, and the size in
    pixels of `patch_level`; STAMP µm (`unit`, or a size in µm alone), and the size in µm, in its first files
    neither: those are known by their step, as STAMP knows them, unless `tile_size` says that they are pixels.
    `assumed` is ours: what was assumed when another tool's file was copied.

    Args:
        tile_size, mpp: the tiles' side in level-0 px and the mpp of level 0, where the file does not say.

    Raises:
        CoordinateError: an attribute makes no sense or contradicts `tile_size` or `mpp`.
        MppMissing: µm lack the mpp.
    """
    first_stamp = tile_size is None and _of_first_stamp(coords, attributes)
    if first_stamp:
        step, side = _FIRST_STAMP
        coords, attributes = coords * (side / step), {**attributes, "tile_size_um": side}
    stored = read_scale(attributes)
    scale = LevelZeroScale(
        _agreed(stored.tile_size or _clam_tile_size(attributes), tile_size, "--tile-size"),
        _agreed(stored.mpp, mpp, "--mpp"),
    )
    if _in_microns(attributes):
        if scale.mpp is None:
            raise MppMissing("its coordinates are in µm: level-0 pixels need the slide's mpp")
        side = _number(attributes, "tile_size_um", "tile_size")
        size = (max(1, round(side / scale.mpp[0])), max(1, round(side / scale.mpp[1])))
        unit = "STAMP's first unit (224 are 256 µm)" if first_stamp else "µm"
        assumed = f"coordinates in {unit} were converted to level-0 pixels of {scale.mpp[0]:g} µm"
        return TilePositions(np.rint(coords / scale.mpp), LevelZeroScale(size, scale.mpp), assumed)
    said = stored.tile_size is not None or "patch_level" in attributes
    given = f" of tiles of {tile_size} px" if tile_size is not None else ""
    assumed = "" if said else f"the file does not say what its coordinates are: read as level-0 pixels{given}"
    return TilePositions(coords, scale, str(attributes.get("assumed", assumed)))


def _of_first_stamp(coords: NDArray[Any], attributes: Mapping[str, Any]) -> bool:
    """Whether STAMP wrote the coordinates before it gave them a unit: tiles are 224 apart."""
    if "extractor" not in attributes or {"unit", "tile_size_um"} & set(attributes):
        return False
    steps = np.concatenate([np.diff(np.unique(column)) for column in coords.T])
    step = _number(attributes, "tile_size") if "tile_size" in attributes else min(steps.tolist(), default=0)
    return bool(abs(step - _FIRST_STAMP[0]) < 0.5)


def _clam_tile_size(attributes: Mapping[str, Any]) -> tuple[int, int] | None:
    """The tiles' size on level 0 from CLAM's `patch_size`, which counts pixels of `patch_level`.

    TRIDENT reads a further `custom_downsample` in such files.
    """
    if "patch_level" not in attributes or "patch_size" not in attributes:
        return None
    side, level = _number(attributes, "patch_size"), _number(attributes, "patch_level")
    if level and "downsample" not in attributes:
        return None
    side *= _number(attributes, "custom_downsample") if "custom_downsample" in attributes else 1
    downsample = np.broadcast_to(attributes.get("downsample", 1.0) if level else 1.0, 2)
    try:
        width, height = np.rint(side * downsample.astype(np.float64)).astype(np.int64).tolist()
    except (TypeError, ValueError) as error:
        raise CoordinateError(f"the attribute downsample makes no sense ({error})") from error
    return (width, height) if min(width, height) >= 1 else None


def _agreed(stored: tuple[Any, Any] | None, given: float | None, option: str) -> tuple[Any, Any] | None:
    """What the file says, or else what was given; both have to agree to 1 %."""
    if stored is None or given is None:
        return stored if given is None else (given, given)
    if any(abs(one / given - 1) > 0.01 for one in stored):
        raise CoordinateError(f"the file says {stored[0]:g}, which contradicts {option} {given:g}")
    return stored


def _in_microns(attributes: Mapping[str, Any]) -> bool:
    """Whether coordinates are in µm rather than pixels."""
    unit = attributes.get("unit", "um" if "tile_size_um" in attributes else "px")
    name = (unit.decode(errors="replace") if isinstance(unit, bytes) else str(unit)).strip().lower()
    if name not in (*_MICRONS, *_PIXELS):
        raise CoordinateError(f"the unit of its coordinates is {name!r}, neither µm nor px: convert them")
    return name in _MICRONS


def _number(attributes: Mapping[str, Any], *names: str) -> float:
    value = next((attributes[name] for name in names if name in attributes), None)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number < 1e9:
        raise CoordinateError(f"the attribute {names[0]} is {value!r}, which is no size")
    return number
