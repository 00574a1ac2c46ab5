"""Windows, grids and the quadtree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from client.arrays import Int64
from client.attribution.methods.regions import (
    centres,
    coarse_regions,
    grid_cells,
    quadtree,
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


def test_the_tree_splits_into_two_non_empty_halves_down_to_single_tiles() -> None:
    rng = np.random.default_rng(0)
    positions = np.concatenate([rng.integers(0, 50, (200, 2)), np.zeros((5, 2), int)])  # some at one place
    tree = quadtree(positions)
    assert sorted(tree.order) == list(range(205))
    leaves = 0
    for node, (left, right) in enumerate(tree.children):
        if left < 0:
            assert tree.size(node) == 1
            leaves += 1
        else:
            halves = np.concatenate([tree.members(left), tree.members(right)])
            assert sorted(halves) == sorted(tree.members(node))
            assert tree.size(left) > 0
            assert tree.size(right) > 0
    assert leaves == 205


def test_the_tree_depends_on_places_not_on_order(square: Square) -> None:
    coords = square(8)
    order = np.random.default_rng(1).permutation(64)
    straight, shuffled = quadtree(coords), quadtree(coords[order])
    np.testing.assert_array_equal(coords[straight.order], coords[order][shuffled.order])
    np.testing.assert_array_equal(straight.children, shuffled.children)


def test_a_square_is_cut_into_quadrants(square: Square) -> None:
    regions = coarse_regions(square(8), 4)
    for number in range(4):
        assert np.ptp(square(8)[regions == number], axis=0).tolist() == [3 * 256, 3 * 256]


@pytest.mark.parametrize(("tiles", "at_most", "found"), [(3, 16, 3), (16, 16, 16), (100, 7, 7), (1, 4, 1)])
def test_as_many_regions_as_asked_or_as_there_are_tiles(tiles: int, at_most: int, found: int) -> None:
    positions = np.random.default_rng(2).permutation(1000)[: 2 * tiles].reshape(-1, 2)
    regions = coarse_regions(positions, at_most)
    assert np.unique(regions).tolist() == list(range(found))


def test_centres_are_means() -> None:
    positions = np.array([[0, 0], [2, 0], [10, 4]])
    np.testing.assert_array_equal(centres(positions, np.array([0, 0, 1])), [[1, 0], [10, 4]])
