"""Trees over tiles by place and by look: halves down to single tiles, the same ones every time."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from client.arrays import Float32, Int64, KeepMask
from client.attribution.grouping import trees
from client.attribution.methods.game import CoalitionGame
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.partition_shap import partition_shap
from client.attribution.methods.scorer import Scores
from client.attribution.methods.trees import Tree, by_look, by_place, player_means

Square = Callable[[int], Int64]


def leaves(tree: Tree) -> list[int]:
    """The players of all leaves from left to right; checks every node on the way."""
    found, pending = [], [0]
    while pending:
        node = pending.pop()
        if tree.size(node) == 1:
            found += tree.members(node).tolist()
            continue
        left, right = tree.children(node)
        halves = np.concatenate([tree.members(left), tree.members(right)])
        assert sorted(halves) == sorted(tree.members(node))
        assert tree.size(left) > 0
        assert tree.size(right) > 0
        pending += [right, left]
    return found


def looks(count: int, seed: int = 0) -> Float32:
    """Two looks, `count` tiles of each, far apart; all tiles of the first come first."""
    rng = np.random.default_rng(seed)
    looks = np.repeat(np.eye(2, 24) * 10, count, axis=0)
    return (looks + rng.normal(size=looks.shape)).astype(np.float32)


def test_the_trees_split_into_two_non_empty_halves_down_to_single_tiles() -> None:
    rng = np.random.default_rng(0)
    positions = np.concatenate([rng.integers(0, 50, (200, 2)), np.zeros((5, 2), int)])  # some at one place
    embeddings = np.concatenate([rng.normal(size=(200, 24)), np.ones((5, 24))])  # some look the same
    for tree in (by_place(positions), by_look(embeddings)):
        assert sorted(leaves(tree)) == list(range(205))


def test_the_tree_by_place_depends_on_places_not_on_order(square: Square) -> None:
    coords = square(8)
    order = np.random.default_rng(1).permutation(64)
    straight, shuffled = leaves(by_place(coords)), leaves(by_place(coords[order]))
    np.testing.assert_array_equal(coords[straight], coords[order][shuffled])


def test_the_tree_by_look_separates_looks_first_wherever_the_tiles_lie() -> None:
    embeddings = looks(50)
    order = np.random.default_rng(1).permutation(100)
    parts = by_look(embeddings[order]).parts(2)
    assert len(set(parts[order < 50])) == len(set(parts[order >= 50])) == 1
    assert set(parts) == {0, 1}


def test_the_tree_by_look_depends_on_neither_scale_nor_offset_nor_order() -> None:
    embeddings = looks(30)
    parts = by_look(embeddings).parts(8)
    np.testing.assert_array_equal(by_look(7 * embeddings.astype(np.float64) + 3).parts(8), parts)
    order = np.random.default_rng(2).permutation(60)
    shuffled = by_look(embeddings[order]).parts(8)
    same = parts[:, None] == parts
    np.testing.assert_array_equal(shuffled[:, None] == shuffled, same[np.ix_(order, order)])


def test_tiles_that_look_the_same_are_halved_in_their_order() -> None:
    tree = by_look(np.ones((8, 3), np.float32))
    left, right = tree.children(0)
    assert tree.members(left).tolist() == [0, 1, 2, 3]
    assert tree.members(right).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(("players", "at_most", "found"), [(3, 16, 3), (16, 16, 16), (100, 7, 7), (1, 4, 1)])
def test_as_many_parts_as_asked_or_as_there_are_players(players: int, at_most: int, found: int) -> None:
    parts = by_look(looks(players)[:players]).parts(at_most)
    assert np.unique(parts).tolist() == list(range(found))


def test_several_trees_by_look_are_the_same_every_time_and_differ_among_themselves(square: Square) -> None:
    embeddings, coords, tiles = looks(50), square(10), np.arange(100)
    first, again = (trees("look", embeddings, coords, tiles, 3) for _ in range(2))
    orders = [leaves(tree) for tree in first]
    assert orders == [leaves(tree) for tree in again]
    assert len({tuple(order) for order in orders}) == 3
    assert leaves(trees("place", embeddings, coords, tiles)[0]) == leaves(by_place(coords))


def test_player_means_are_means() -> None:
    positions = np.array([[0, 0], [10, 4], [2, 0]])
    np.testing.assert_array_equal(player_means(positions, np.array([0, 1, 0])), [[1, 0], [10, 4]])


@pytest.mark.parametrize("kind", ["look", "place"])
def test_a_hundred_thousand_tiles_cost_their_splits(kind: str) -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((100_000, 64), dtype=np.float32)
    rows, columns = np.divmod(np.arange(100_000), 400)
    # Evidence in a twentieth of the tiles, of one look.
    weights = (embeddings[:, 0] > 1.645) / 1024

    def scorer(keep: KeepMask) -> Scores:
        value = (keep @ weights).astype(np.float32)
        return Scores(np.stack([value, 0 * value], axis=1), np.ones((len(keep), 1), np.float32))

    game = CoalitionGame(scorer, ModelOutputs(("a", "b")), np.arange(100_000))
    started = time.process_time()
    tree = by_look(embeddings) if kind == "look" else by_place(np.stack([columns, rows], axis=1))
    result = partition_shap(game, tree, max_evals=256)
    assert time.process_time() - started < 60  # it takes seconds, and a whole tree minutes
    assert result.evaluations == 256
    assert result.completeness_gap.max() < 1e-9
