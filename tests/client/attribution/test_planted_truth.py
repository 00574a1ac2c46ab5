"""Every method against toy slides whose true attribution is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import factorial
from typing import Protocol

import numpy as np
import pytest

from client.arrays import Float64, Int64, KeepMask
from client.attribution.methods.game import CoalitionGame
from client.attribution.methods.occlusion import keep_one, occlusion
from client.attribution.methods.partition_shap import partition_shap
from client.attribution.methods.result import Attribution
from client.attribution.methods.shapley import shapley_regression
from client.attribution.methods.trees import by_place, player_means
from client.errors import ClientError

ALL = 10**9
Rule = Callable[[KeepMask], Float64]
Square = Callable[[int], Int64]


class MakeGame(Protocol):
    def __call__(self, rule: Rule, players: int, feature_mask: Int64 | None = None) -> CoalitionGame: ...


def stderrs(result: Attribution) -> Float64:
    assert result.stderr is not None
    return result.stderr


def leaf_sizes(result: Attribution) -> Float64:
    assert result.leaf_size is not None
    return result.leaf_size


def regression(game: CoalitionGame, features: Float64 | Int64, **settings: int) -> Attribution:
    return shapley_regression(game, np.asarray(features, dtype=np.float64), **settings)


def methods(game: CoalitionGame, coords: Int64) -> dict[str, Attribution]:
    return {
        "occlusion": occlusion(game),
        "keep_one": keep_one(game),
        "partition_shap": partition_shap(game, by_place(coords), max_evals=ALL, tolerance=0),
        "shapley_regression": regression(game, coords, max_evals=400),
    }


def test_every_method_returns_the_weights_of_an_additive_model(toy_game: MakeGame, square: Square) -> None:
    # Multiples of 1/64, so that float32 logits are exact.
    weights = np.random.default_rng(0).integers(-64, 64, 64) / 64
    found = methods(toy_game(lambda keep: keep @ weights + 0.25, 64), square(8))
    for name, result in found.items():
        # The regression's prior leaves a billionth of itself.
        assert np.abs(result.values[:, 0] - weights).max() < (1e-6 if "regression" in name else 1e-9), name
        assert result.completeness_gap[0] < 1e-9, name
        assert result.base[0] == 0.25, name
    assert np.abs(stderrs(found["shapley_regression"])).max() < 1e-4
    assert (leaf_sizes(found["partition_shap"]) == 1).all()


def test_the_other_class_gets_the_negative_of_two_classes(toy_game: MakeGame, square: Square) -> None:
    weights = np.random.default_rng(0).integers(-64, 64, 64) / 64
    result = partition_shap(toy_game(lambda keep: keep @ weights, 64), by_place(square(8)))
    np.testing.assert_allclose(result.values[:, 1], -result.values[:, 0], atol=1e-12)


@pytest.mark.parametrize("positives", [2, 3, 8])
def test_redundant_evidence_is_invisible_to_occlusion_and_shared_by_shapley(
    toy_game: MakeGame, square: Square, positives: int
) -> None:
    tumour = np.zeros(64, dtype=bool)
    tumour[np.random.default_rng(positives).choice(64, positives, replace=False)] = True
    game = toy_game(lambda keep: (keep & tumour).any(axis=1).astype(float), 64)
    assert (occlusion(game).values == 0).all()
    np.testing.assert_array_equal(keep_one(game).values[:, 0], tumour)
    owen = partition_shap(game, by_place(square(8)), max_evals=ALL, tolerance=0)
    assert owen.values[tumour, 0].min() > 0
    assert np.abs(owen.values[~tumour, 0]).max() < 1e-12
    assert owen.values[:, 0].sum() == pytest.approx(1, abs=1e-9)
    fitted = regression(game, square(8), max_evals=4000)
    np.testing.assert_allclose(fitted.values[:, 0], tumour / positives, atol=0.1)


def test_owen_gives_symmetric_redundant_tiles_their_equal_share(toy_game: MakeGame, square: Square) -> None:
    # One tile in each quadrant: the tree treats all four alike, so Owen equals Shapley, 1/4 each.
    tumour = np.isin(np.arange(64), [0, 7, 56, 63])
    game = toy_game(lambda keep: (keep & tumour).any(axis=1).astype(float), 64)
    owen = partition_shap(game, by_place(square(8)), max_evals=ALL, tolerance=0)
    np.testing.assert_allclose(owen.values[:, 0], tumour / 4, atol=1e-12)


def test_evidence_that_needs_two_tiles_is_invisible_to_keep_one(toy_game: MakeGame, square: Square) -> None:
    pair = np.isin(np.arange(64), [27, 28])
    game = toy_game(lambda keep: keep[:, pair].all(axis=1).astype(float), 64)
    assert (keep_one(game).values == 0).all()
    np.testing.assert_array_equal(occlusion(game).values[:, 0], pair)
    owen = partition_shap(game, by_place(square(8)), max_evals=ALL, tolerance=0)
    np.testing.assert_allclose(owen.values[:, 0], pair / 2, atol=1e-12)


def test_evidence_for_and_against_keeps_its_sign(toy_game: MakeGame, square: Square) -> None:
    support, against = np.arange(64) < 10, np.arange(64) >= 50
    game = toy_game(
        lambda keep: np.tanh((keep @ support) * 1.0 - (keep @ against) * 0.5).astype(np.float32), 64
    )
    fitted = regression(game, square(8), max_evals=8000)
    exact = partition_shap(game, by_place(square(8)), max_evals=ALL, tolerance=0)
    for name, result, nothing in (("regression", fitted, 0.02), ("partition_shap", exact, 1e-9)):
        values = result.values[:, 0]
        assert values[support].min() > 0, name
        assert values[against].max() < 0, name
        assert np.abs(values[~support & ~against]).max() < nothing, name


@pytest.mark.parametrize("budget", [2, 3, 4, 5, 17, 64, 111, 512])
def test_owen_sums_exactly_at_every_budget(toy_game: MakeGame, square: Square, budget: int) -> None:
    rng = np.random.default_rng(5)
    weights, pairs = rng.normal(size=256), rng.integers(0, 256, (200, 2))
    game = toy_game(
        lambda keep: keep @ weights + 3 * (keep[:, pairs[:, 0]] & keep[:, pairs[:, 1]]).sum(axis=1), 256
    )
    result = partition_shap(game, by_place(square(16)), max_evals=budget, tolerance=0)
    assert result.evaluations <= budget
    assert result.completeness_gap.max() < 1e-9
    # Every tile's Owen average is complete: the weights of its terms sum to one.
    assert leaf_sizes(result).min() >= 1
    assert leaf_sizes(result).max() <= 256
    assert (result.unresolved > 0) == (leaf_sizes(result).max() > 1)


def test_unresolved_mass_is_flagged_where_the_budget_ended(toy_game: MakeGame, square: Square) -> None:
    tumour = np.isin(np.arange(256), [3, 77, 130, 201, 250])
    game = toy_game(lambda keep: np.log1p((keep & tumour).sum(axis=1)), 256)
    short = partition_shap(game, by_place(square(16)), max_evals=32)
    long = partition_shap(game, by_place(square(16)), max_evals=4096)
    assert short.unresolved > 0.05 >= long.unresolved
    assert leaf_sizes(short)[tumour].mean() > 4 * leaf_sizes(long)[tumour].mean()


def test_a_parent_is_the_sum_of_its_leaves(toy_game: MakeGame, square: Square) -> None:
    # Owen values of the four quadrants as players are the sums of their tiles' Owen values.
    rng = np.random.default_rng(2)
    weights = rng.normal(size=16)
    rule = lambda keep: np.tanh(keep @ weights) + keep[:, 0] * keep[:, 15]  # noqa: E731
    coords = square(4)
    quadrant = (coords[:, 0] // 512 + 2 * (coords[:, 1] // 512)).astype(np.int64)
    tiles = partition_shap(toy_game(rule, 16), by_place(coords), max_evals=ALL, tolerance=0)
    regions = partition_shap(
        toy_game(rule, 16, quadrant), by_place(player_means(coords, quadrant)), max_evals=ALL, tolerance=0
    )
    sums = np.bincount(quadrant, tiles.values[:, 0])
    np.testing.assert_allclose(sums, np.bincount(quadrant, regions.values[:, 0]), atol=1e-6)


def exact_shapley(rule: Rule, players: int) -> Float64:
    """Shapley's formula over all 2^n coalitions."""
    codes = np.arange(2**players)
    keep: KeepMask = (codes[:, None] >> np.arange(players) & 1).astype(bool)
    value = rule(keep).astype(np.float32).astype(np.float64)
    size = keep.sum(axis=1)
    weight = np.array(
        [factorial(s) * factorial(players - s - 1) / factorial(players) for s in range(players)]
    )
    values = np.zeros(players)
    for player in range(players):
        without = codes[~keep[:, player]]
        values[player] = (weight[size[without]] * (value[without | 1 << player] - value[without])).sum()
    return values


def test_standard_errors_cover_exact_shapley_values(toy_game: MakeGame) -> None:
    rng = np.random.default_rng(8)
    weights, features = rng.normal(size=12), rng.normal(size=(12, 4))
    triples = list(combinations(range(12), 3))

    def rule(keep: KeepMask) -> Float64:
        hidden = np.stack([keep[:, list(triple)].all(axis=1) for triple in triples[::7]], axis=1)
        return np.asarray(np.maximum(keep @ weights, -1) + 2 * np.tanh(hidden.sum(axis=1) / 4))

    exact = exact_shapley(rule, 12)
    errors, covered = [], []
    for seed in range(40):
        result = regression(toy_game(rule, 12), features, max_evals=354, seed=seed)
        errors.append(np.abs(result.values[:, 0] - exact))
        covered.append(errors[-1] <= 2 * stderrs(result)[:, 0])
        assert result.evaluations == 354
        assert result.completeness_gap[0] < 1e-6
    assert np.mean(errors) < 0.2 * np.abs(exact).mean()
    assert np.mean(covered) >= 0.90
    assert np.mean(covered) < 0.999  # an error bar that covers everything says nothing


def test_complements_are_exact_for_interactions_of_two(toy_game: MakeGame) -> None:
    rng = np.random.default_rng(3)
    linear, pairwise = rng.integers(-8, 8, 12) / 8, np.triu(rng.integers(-8, 8, (12, 12)) / 8, 1)
    result = regression(
        toy_game(lambda keep: keep @ linear + np.einsum("mi,ij,mj->m", keep, pairwise, keep), 12),
        np.eye(12),
        max_evals=60,
    )
    np.testing.assert_allclose(
        result.values[:, 0], linear + (pairwise.sum(axis=0) + pairwise.sum(axis=1)) / 2, atol=1e-6
    )


def test_likeness_of_looks_saves_masks(toy_game: MakeGame) -> None:
    # Five looks of 40 tiles each; one of them is the evidence.
    rng = np.random.default_rng(0)
    look = np.repeat(np.arange(5), 40)
    features = 3 * np.eye(5)[look] + 0.3 * rng.normal(size=(200, 5))
    game = toy_game(lambda keep: np.asarray(np.tanh(keep @ ((look == 2) / 10.0)), dtype=np.float64), 200)
    alike, apart = (regression(game, one, max_evals=128) for one in (features, np.eye(200)))
    truth = (look == 2) * float(np.tanh(4)) / 40
    errors = [float(np.abs(one.values[:, 0] - truth).mean()) for one in (alike, apart)]
    assert errors[0] < 0.5 * errors[1]
    assert errors[0] < 0.15 * truth.max()


def test_the_regression_refuses_what_it_cannot_do(toy_game: MakeGame) -> None:
    with pytest.raises(ClientError, match="at most 300 players, not 301"):
        regression(toy_game(lambda keep: keep.sum(axis=1) * 1.0, 301), np.eye(301))
    with pytest.raises(ClientError, match="at least 6 masks"):
        regression(toy_game(lambda keep: keep.sum(axis=1) * 1.0, 3), np.eye(3), max_evals=5)
    assert regression(toy_game(lambda keep: keep.sum(axis=1) * 3.0, 1), np.ones((1, 2))).values[0, 0] == 3
    pair = regression(toy_game(lambda keep: keep @ np.array([1.0, 4.0]), 2), np.eye(2)).values[:, 0]
    np.testing.assert_allclose(pair, [1, 4], atol=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_values_do_not_depend_on_masks_per_request(toy_game: MakeGame, square: Square, batch: int) -> None:
    weights = np.random.default_rng(4).integers(-64, 64, 16) / 64
    game = toy_game(lambda keep: (keep @ weights) ** 2, 16)
    parts = CoalitionGame(game.scorer, game.outputs, game.feature_mask, perturbations_per_eval=batch)
    found = methods(parts, square(4))
    for name, result in methods(game, square(4)).items():
        np.testing.assert_array_equal(result.values, found[name].values, err_msg=name)


def test_cancelling_evidence_is_found_though_its_node_has_no_mass(toy_game: MakeGame, square: Square) -> None:
    # Left half for, right half against, in equal parts: the whole slide scores 0, as does every row.
    weights = np.tile(np.repeat([1.0, -1.0], 8), 16) / 64
    result = partition_shap(toy_game(lambda keep: keep @ weights, 256), by_place(square(16)), max_evals=512)
    np.testing.assert_allclose(result.values[:, 0], weights, atol=1e-9)


def test_a_slide_that_looks_empty_is_searched_evenly_and_called_unresolved(
    toy_game: MakeGame, square: Square
) -> None:
    # All evidence cancels between two neighbouring tiles: no node of the tree has any mass.
    pair = np.zeros(1024)
    pair[[100, 101]] = 1, -1
    result = partition_shap(toy_game(lambda keep: keep @ pair, 1024), by_place(square(32)), max_evals=2048)
    assert result.unresolved == 1
    assert leaf_sizes(result).max() <= 1024 / 32
