"""Regions of tiles: sliding windows, and parts of the slide."""

from __future__ import annotations

import numpy as np

from ...arrays import Float64, Int64
from ...errors import ClientError
from .trees import by_place


def grid_cells(coords: Int64, step: tuple[int, int]) -> Int64:
    """Column and row [N, 2] of tiles at `coords` on a grid of `step` (x, y), all in level-0 px."""
    cells: Int64 = (coords - coords.min(axis=0)) // np.array(step)
    return cells


def sliding_windows(cells: Int64, size: int, stride: int) -> list[Int64]:
    """Tile indices of every non-empty window of size x size tiles, with steps of `stride` tiles.

    The first windows start outside the slide so that border tiles are covered as often as inner ones:
    (size / stride)² times where stride divides size.

    Raises:
        ClientError: the stride is under 1 or over the size.
    """
    if not 1 <= stride <= size:
        raise ClientError(f"stride must lie between 1 and the window's size ({size}), not {stride}")
    first = -((size - 1) // stride) * stride
    members: dict[tuple[int, int], list[int]] = {}
    for tile, (x, y) in enumerate(cells.tolist()):
        for column in _origins(x, size, stride, first):
            for row in _origins(y, size, stride, first):
                members.setdefault((row, column), []).append(tile)
    return [np.array(tiles, dtype=np.int64) for _, tiles in sorted(members.items())]


def _origins(at: int, size: int, stride: int, first: int) -> range:
    lowest = at - size + 1
    start = first + -((first - lowest) // stride) * stride
    return range(start, at + 1, stride)


def coarse_regions(points: Float64 | Int64, at_most: int) -> Int64:
    """Region of every point [G], 0..R-1: parts of the tree by place."""
    return by_place(points).parts(at_most)
