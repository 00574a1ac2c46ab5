"""The figures that tell how far a map can be trusted, on toys where they are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from client.arrays import Float32, Float64, Int64, KeepMask
from client.attribution.attribute import Settings, attribute
from client.attribution.curves import curves, descending, random_orders, spearman
from client.attribution.methods.game import CoalitionGame
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.regions import coarse_regions
from client.attribution.methods.scorer import Scores
from client.attribution.model.masked_slide import MaskedSlide
from client.attribution.reliability import Reliability, assess, redundancy_index

Square = Callable[[int], Int64]
TUMOUR = np.isin(np.arange(144), [13, 14, 25, 26, 27, 40])
TARGET = ModelOutputs(("tumour", "normal"))


class Bag:
    """A slide model without positions: tile i's embedding is its evidence, and only kept tiles count."""

    def __init__(self, rule: Callable[[Float64], Float64]) -> None:
        self.rule = rule

    def __call__(self, embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        value = self.rule(np.asarray(keep @ embeddings[:, 0].astype(np.float64))).astype(np.float32)
        return Scores(np.stack([value, 0 * value], axis=1), np.ones((len(keep), 2), np.float32))


class Positional(Bag):
    """The same, but a tile's evidence depends on its position, as in dilated attention."""

    def __call__(self, embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        weight = 1 + 0.1 * np.cos(np.arange(len(embeddings)))
        return super().__call__((embeddings * weight[:, None]).astype(np.float32), coords, keep)


def evidence(tiles: KeepMask, amount: float = 1.0) -> Float32:
    return (amount * tiles[:, None]).astype(np.float32)


def check(masked_slide: MaskedSlide, method: str = "partition_shap") -> Reliability:
    settings = Settings(method=method)  # type: ignore[arg-type]
    result = attribute(masked_slide, TARGET, settings, target_index=0)
    return assess(masked_slide, TARGET, result, settings, target_index=0)


def test_a_true_map_beats_random_and_a_model_without_positions_has_no_noise(square: Square) -> None:
    trust = check(MaskedSlide(Bag(lambda x: x), evidence(TUMOUR), square(12)))
    assert trust.beats_random
    assert trust.position_sensitivity == 0
    assert trust.noise_floor == 0
    assert trust.completeness_gap < 1e-9
    assert trust.redundancy == pytest.approx(0, abs=1e-6)  # additive: necessity is the Shapley value
    assert trust.base == 0
    assert trust.full == 6


def test_positions_that_matter_are_measured(square: Square) -> None:
    trust = check(MaskedSlide(Positional(lambda x: x), evidence(TUMOUR), square(12)))
    tiles = np.flatnonzero(TUMOUR)
    weight = 1 + 0.1 * np.cos(np.arange(144))
    changes = [weight[(tiles + shift) % 144].sum() - weight[tiles].sum() for shift in range(1, 9)]
    assert trust.position_sensitivity == pytest.approx(np.sqrt(np.mean(np.square(changes))), rel=1e-4)


def test_redundant_evidence_has_a_redundancy_near_one_and_needed_pairs_below_zero(square: Square) -> None:
    either = check(MaskedSlide(Bag(lambda x: np.minimum(x, 1)), evidence(TUMOUR), square(12)))
    assert either.redundancy > 0.9
    corners = np.isin(np.arange(144), [0, 143])
    both = check(MaskedSlide(Bag(lambda x: np.maximum(x - 1, 0)), evidence(corners), square(12)))
    assert both.redundancy == pytest.approx(-1, abs=1e-6)
    assert redundancy_index(np.array([1.0, 1.0]), np.array([0.5, 0.5])) == -1


def test_a_map_of_a_blind_model_does_not_beat_random_and_says_so(square: Square) -> None:
    trust = check(MaskedSlide(Bag(lambda x: 0 * x), evidence(TUMOUR), square(12)))
    assert not trust.beats_random
    assert any("does not beat a random map" in warning for warning in trust.warnings())
    assert any("score alike" in warning for warning in trust.warnings())


def test_the_leave_one_out_map_of_redundant_evidence_is_caught(square: Square) -> None:
    # Two of six tumour tiles suffice: leaving any one out changes nothing, and the map is noise.
    masked_slide = MaskedSlide(Bag(lambda x: np.minimum(x, 2)), evidence(TUMOUR), square(12))
    settings = Settings(method="occlusion", sliding_window_shapes=1, strides=1)
    result = attribute(masked_slide, TARGET, settings, target_index=0)
    assert (result.values == 0).all()
    assert not assess(masked_slide, TARGET, result, settings, target_index=0).beats_random
    assert check(masked_slide).beats_random


def test_srg_is_odd_and_random_orders_have_none(square: Square) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=144)
    game = CoalitionGame(
        MaskedSlide(Bag(np.tanh), (values[:, None] / 9).astype(np.float32), square(12)).in_place(),
        TARGET,
        np.arange(144),
    )
    up, down = curves(game, descending(values), 0), curves(game, descending(-values), 0)
    assert up.srg == pytest.approx(-down.srg, abs=1e-12)
    assert up.srg > 0
    regions = coarse_regions(square(12), 16)
    random = [curves(game, order, 0).srg for order in random_orders(regions, 200, seed=1)]
    assert abs(np.mean(random)) < 3 * np.std(random) / np.sqrt(200)
    assert max(random) < up.srg


def test_curves_start_at_the_slide_and_end_at_nothing(square: Square) -> None:
    game = CoalitionGame(
        MaskedSlide(Bag(lambda x: x + 0.5), evidence(TUMOUR), square(12)).in_place(), TARGET, np.arange(144)
    )
    found = curves(game, descending(TUMOUR.astype(np.float64)), 0)
    assert found.fractions[0] == 0
    assert found.fractions[-1] == 1
    for curve in (found.mif, found.lif):
        assert curve[0] == 6.5
        assert curve[-1] == 0.5
    fractions, kept = found.insertion
    top = [0.5 + min(6, round(fraction * 144)) for fraction in fractions]
    np.testing.assert_allclose(kept, top)


def test_rank_correlation() -> None:
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 15])) == pytest.approx(0.5)
    assert spearman(np.array([1.0, 1, 2]), np.array([3.0, 3, 9])) == pytest.approx(1)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))
