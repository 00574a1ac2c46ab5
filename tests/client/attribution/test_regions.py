"""Windows, grids and the quadtree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from client.arrays import Int64
from client.attribution.methods.regions import (
    coarse_regions,
    grid_cells,
    sliding_windows,
)
from client.errors import ClientError

Square = Callable[[int], Int64]


@pytest.mark.parametrize(("size", "stride", "times"), [(1, 1, 1), (4, 2, 4), (3, 1, 9), (4, 4, 1), (2, 1, 4)])
def test_windows_cover_every_tile_equally_often(square: Square, size: int, stride: int, times: int) -> None:
    cells = grid_cells(square(9) + 77, (256, 256))
    covered = np.bincount(np.concatenate(sliding_windows(cells, size, stride)), minlength=81)
    assert (covered == times).all()


def test_windows_hold_neighbours_only() -> None:
    cells = np.array([[0, 0], [1, 0], [40, 0], [0, 3], [1, 3]])
    for window in sliding_windows(cells, 2, 1):
        assert np.ptp(cells[window], axis=0).max() <= 1
    with pytest.raises(ClientError, match="stride"):
        sliding_windows(cells, 2, 3)


def test_a_square_is_cut_into_quadrants(square: Square) -> None:
    regions = coarse_regions(square(8), 4)
    for number in range(4):
        assert np.ptp(square(8)[regions == number], axis=0).tolist() == [3 * 256, 3 * 256]


@pytest.mark.parametrize(("tiles", "at_most", "found"), [(3, 16, 3), (16, 16, 16), (100, 7, 7), (1, 4, 1)])
def test_as_many_regions_as_asked_or_as_there_are_tiles(tiles: int, at_most: int, found: int) -> None:
    positions = np.random.default_rng(2).permutation(1000)[: 2 * tiles].reshape(-1, 2)
    regions = coarse_regions(positions, at_most)
    assert np.unique(regions).tolist() == list(range(found))
