"""Coordinate rules: from a tile's level-0 pixels to the model's frame, in which a position cell is 256 px.

Training and serving call the one function here with the same stored numbers, so a tile has the same position
in both. Pairs are (x, y).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gigapath_contract.errors import CoordinateError

CoordinateRule = Literal["level0/256", "level0/patch_size_level0", "target-mpp/256"]
CELL = 256
# Version 1 scaled by a float and rounded down: at some tile sizes that gave the cell before the right one.
RULE_VERSION = 2
# A mpp is seldom exact in binary (128/503), and plans count a tile's side as whole to a millionth of a pixel.
_MPP_TOLERANCE = 1e-8


@dataclass(frozen=True)
class LevelZeroScale:
    """A tile's size in level-0 px and the mpp of level 0; None where unknown."""

    tile_size: tuple[int, int] | None = None
    mpp: tuple[float, float] | None = None


def read_scale(attributes: Mapping[str, Any]) -> LevelZeroScale:
    """The scale among the attributes of an HDF5 feature file: ours, or TRIDENT's `patch_size_level0`.

    Raises:
        CoordinateError: a value that is no scale, such as a tile size with a fraction.
    """
    size = attributes.get("tile_size_level0", attributes.get("patch_size_level0"))
    x, y = attributes.get("mpp_level0_x"), attributes.get("mpp_level0_y")
    try:
        if size is not None:
            width, height = np.broadcast_to(np.asarray(size, np.float64), 2).tolist()
            if not all(side.is_integer() and 1 <= side < 1e9 for side in (width, height)):
                raise ValueError(f"tile size {size} px")
            size = (int(width), int(height))
        mpp = None if x is None or y is None else (float(x), float(y))
        if mpp is not None and not (np.isfinite(mpp).all() and min(mpp) > 0):
            raise ValueError(f"mpp {mpp[0]:g} x {mpp[1]:g}")
        return LevelZeroScale(size, mpp)
    except (TypeError, ValueError) as error:
        raise CoordinateError(f"the tiles' scale makes no sense ({error}): embed the slide again") from error


def grid_coordinates(
    coords: NDArray[Any],
    rule: str,
    scale: LevelZeroScale,
    *,
    target_mpp: float = 0.5,
    grid: int = 1000,
) -> NDArray[np.int64]:
    """`coords` [N, 2] in level-0 pixels, in the model's frame int64 [N, 2]: its cell is the result // 256.

    `level0/256` leaves them as they are; `level0/patch_size_level0` gives floor(x * 256 / tile size), in
    integers; `target-mpp/256` gives floor(x * mpp / `target_mpp`), where a value that falls short of a whole
    number by the rounding of the mpp counts as that number.

    Raises:
        CoordinateError: the rule is unknown or lacks its scale, or a tile lies outside `grid` x `grid` cells.
    """
    pixels = np.floor(coords).astype(np.int64)
    frame: NDArray[np.int64]
    if rule == "level0/256":
        frame = pixels
    elif rule == "level0/patch_size_level0":
        if scale.tile_size is None:
            raise _lacking(rule, "tile_size_level0")
        frame = pixels * CELL // np.array(scale.tile_size, np.int64)
    elif rule == "target-mpp/256":
        if scale.mpp is None:
            raise _lacking(rule, "mpp_level0_x and mpp_level0_y")
        ratio = np.array(scale.mpp, np.float64) / target_mpp
        frame = np.floor(pixels * (ratio * (1 + _MPP_TOLERANCE))).astype(np.int64)
    else:
        raise CoordinateError(f"coordinate rule {rule!r} is unknown to this version: update it")
    outside = ((frame < 0) | (frame // CELL >= grid)).any(axis=1)
    if outside.any():
        tile = int(outside.argmax())
        raise CoordinateError(
            f"tile {tile} at level-0 ({pixels[tile, 0]}, {pixels[tile, 1]}) lies outside the model's "
            f"position grid of {grid}x{grid} (rule {rule}): choose a smaller region of the slide"
        )
    return frame


def _lacking(rule: str, names: str) -> CoordinateError:
    return CoordinateError(
        f"the coordinate rule {rule} needs the slide's scale, {names}: embed the slide with our client"
    )
