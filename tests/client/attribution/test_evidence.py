"""Sets of tiles that suffice for a class or that it needs, on slides where they are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest

from client.arrays import Bool, Float64, Int64, KeepMask
from client.attribution.curves import curves, descending
from client.attribution.evidence import find_evidence, planned_evidence, shortest
from client.attribution.methods.game import CoalitionGame
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.scorer import Scores
from client.errors import ClientError

Rule = Callable[[KeepMask], Float64]


class MakeGame(Protocol):
    def __call__(self, rule: Rule, players: int, feature_mask: Int64 | None = None) -> CoalitionGame: ...


def masks_of(game: CoalitionGame, work: Callable[[CoalitionGame], object]) -> int:
    """How many different masks `work` asks for."""
    seen: set[bytes] = set()

    def scorer(keep: KeepMask) -> Scores:
        seen.update(row.tobytes() for row in keep)
        return game.scorer(keep)

    work(CoalitionGame(scorer, game.outputs, game.feature_mask))
    return len(seen)


@pytest.mark.parametrize("tiles", [40, 1000])
def test_redundant_evidence_has_few_sufficient_and_many_necessary_tiles(
    toy_game: MakeGame, tiles: int
) -> None:
    # Twenty lesion tiles, of which six make the class.
    order = np.random.default_rng(0).permutation(tiles)
    lesion = np.isin(np.arange(tiles), order[:20])
    found = find_evidence(
        toy_game(lambda keep: np.asarray(keep @ lesion.astype(np.float64) - 5.5), tiles), order, 0
    )
    assert found is not None
    assert found.sufficient is not None
    assert found.necessary is not None
    np.testing.assert_array_equal(found.sufficient, order[:6])
    np.testing.assert_array_equal(found.necessary, order[:15])
    assert (found.alone, found.without, found.rest) == (0.5, -0.5, 8.5)
    assert found.recoverable
    assert not found.empty_called


def test_evidence_that_needs_all_of_itself_is_lost_with_one_tile(toy_game: MakeGame) -> None:
    both = np.isin(np.arange(60), [3, 50])
    order = descending(both.astype(float))
    found = find_evidence(toy_game(lambda keep: np.asarray(keep[:, both].all(axis=1) - 0.5), 60), order, 0)
    assert found is not None
    assert found.sufficient is not None
    assert found.necessary is not None
    assert sorted(found.sufficient) == [3, 50]
    assert len(found.necessary) == 1
    assert found.necessary[0] in (3, 50)
    assert not found.recoverable


@pytest.mark.parametrize("size", [12, 60])
def test_tiles_that_an_order_only_mixed_in_are_taken_out(toy_game: MakeGame, size: int) -> None:
    # The map's order has two benign tiles after each lesion tile; 3/4 of the lesion make the class.
    rng = np.random.default_rng(size)
    order = rng.permutation(400)
    lesion = np.isin(np.arange(400), order[: 3 * size : 3])
    game = toy_game(lambda keep: np.asarray(keep @ lesion.astype(np.float64) - 3 * size / 4 + 0.5), 400)
    found = find_evidence(game, order, 0)
    assert found is not None
    for tiles, count, output in (
        (found.sufficient, 3 * size // 4, found.alone),
        (found.necessary, size // 4 + 1, found.without),
    ):
        assert tiles is not None
        assert lesion[tiles].sum() == count
        assert abs(output) == 0.5
        assert len(tiles) < 1.2 * count  # all of a small set is tried tile by tile; larger ones, in parts
        assert (np.diff(np.argsort(order)[tiles]) > 0).all()
        if size == 12:
            assert len(tiles) == count


def test_a_class_that_the_empty_slide_has_too_needs_nothing(toy_game: MakeGame) -> None:
    found = find_evidence(toy_game(lambda keep: np.asarray(keep.mean(axis=1) + 1), 30), np.arange(30), 0)
    assert found is not None
    assert found.necessary is None
    assert found.empty_called
    assert found.without == 1
    assert found.recoverable


def test_a_class_that_only_the_whole_slide_has(toy_game: MakeGame) -> None:
    found = find_evidence(toy_game(lambda keep: np.asarray(keep.all(axis=1) - 0.5), 30), np.arange(30), 0)
    assert found is not None
    assert found.sufficient is None
    assert found.necessary is not None
    assert len(found.necessary) == 1


def test_a_class_that_the_slide_is_not_called_has_no_evidence(toy_game: MakeGame) -> None:
    assert (
        find_evidence(toy_game(lambda keep: np.asarray(keep.mean(axis=1) - 2), 30), np.arange(30), 0) is None
    )


@pytest.mark.parametrize("players", [1, 2, 3, 57, 512, 10_000])
def test_the_shortest_count_is_one_below_which_nothing_holds(players: int) -> None:
    for wanted in {1, players // 3 + 1, players}:
        assert shortest(lambda counts, wanted=wanted: counts >= wanted, players) == wanted  # type: ignore[misc]
    assert shortest(lambda counts: counts < 0, players) is None
    # Where it comes and goes, what is found is still a beginning.
    comes_and_goes = np.random.default_rng(players).random(players + 1) < 0.5
    count = shortest(lambda counts: comes_and_goes[counts], players)
    if count is not None:
        assert comes_and_goes[count]
        assert count == 1 or not comes_and_goes[count - 1]


def test_a_few_masks_suffice_on_a_large_slide_and_curves_share_them(toy_game: MakeGame) -> None:
    lesion = np.arange(10_000) < 137
    game = toy_game(lambda keep: keep @ (lesion / 137) - 0.4, 10_000)
    order = np.arange(10_000)
    with_curves = masks_of(game, lambda one: (curves(one, order, 0), find_evidence(one, order, 0)))
    # 30 for the beginnings of the order, and both sets without each of 64 parts, once.
    assert with_curves - masks_of(game, lambda one: curves(one, order, 0)) <= 30 + 2 * 64
    assert masks_of(game, lambda one: find_evidence(one, order, 0)) <= planned_evidence(10_000) <= 500


def called(outputs: ModelOutputs, values: list[float]) -> Bool:
    return np.asarray(outputs.calls(np.array([values]))[0])


def test_what_a_slide_is_called_follows_the_kind_of_the_classes() -> None:
    names = ("a", "b", "c")
    assert called(ModelOutputs(names), [-1, -3, -2]).tolist() == [True, False, False]
    assert called(ModelOutputs(names, "probability"), [0.2, 0.45, 0.35]).tolist() == [False, True, False]
    assert called(ModelOutputs(names, "log_odds", "multilabel"), [1, -1, 2]).tolist() == [True, False, True]
    assert called(ModelOutputs(names, "probability", "multilabel"), [0.6, 0.4, 0.5]).tolist() == [
        True,
        False,
        False,
    ]
    assert called(ModelOutputs(("a",), "logit", "binary"), [-0.1]).tolist() == [False]
    with pytest.raises(ClientError, match="no classes"):
        ModelOutputs(("embedding",), "embedding", reference=np.ones(2, np.float32)).calls(np.ones((1, 1)))
