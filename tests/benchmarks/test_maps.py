"""Planted slides and the model on them, before they judge a map."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import captum_estimators
from benchmarks.abmil import Abmil, TrainedAbmil
from benchmarks.planted_slides import STEP, CohortTiles, Pattern, planted_slide
from client.arrays import KeepMask
from client.attribution.methods.game import CoalitionGame
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.scorer import Scores


@pytest.fixture
def tiles() -> CohortTiles:
    """12 slides of 40 tiles; lesions and smears lie apart from benign tiles in one channel each."""
    rng = np.random.default_rng(0)
    kind = np.tile(np.array(["benign"] * 28 + ["smear"] * 6 + ["lesion"] * 6), 12)
    embeddings = rng.normal(size=(480, 6)).astype(np.float32)
    embeddings[kind == "smear", 0] += 50
    embeddings[kind == "lesion", 1] += 50
    return CohortTiles(embeddings, kind, np.repeat([f"test-{n:02d}A" for n in range(12)], 40))


@pytest.mark.parametrize("pattern", ["scattered", "contiguous"])
def test_a_planted_slide_has_its_lesion_where_it_says(tiles: CohortTiles, pattern: Pattern) -> None:
    slide, again = (planted_slide(tiles, 400, 16, pattern, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(slide.embeddings, again.embeddings)
    assert slide.planted.sum() == 16
    np.testing.assert_array_equal(slide.embeddings[:, 1] > 25, slide.planted)
    assert len(np.unique(slide.coords, axis=0)) == 400
    order = np.lexsort((slide.coords[:, 0], slide.coords[:, 1]))
    np.testing.assert_array_equal(order, np.arange(400))  # row-major
    width = np.ptp(slide.coords[slide.planted] // STEP, axis=0).max()
    assert (width <= 8) == (pattern == "contiguous")


def test_no_other_tile_is_of_the_planted_kind(tiles: CohortTiles) -> None:
    slide = planted_slide(tiles, 400, 10, "scattered", np.random.default_rng(1), "smear")
    np.testing.assert_array_equal(slide.embeddings[:, 0] > 25, slide.planted)
    assert (slide.embeddings[:, 1] < 25).all()


def test_the_model_on_a_slide_scores_as_in_pytorch_and_shares_its_score(tiles: CohortTiles) -> None:
    torch.manual_seed(0)
    slide = planted_slide(tiles, 60, 5, "scattered", np.random.default_rng(2))
    model = Abmil(6).eval()
    on_slide = TrainedAbmil(model, np.zeros(6, np.float32), np.ones(6, np.float32)).on(slide)
    rng = np.random.default_rng(4)
    keep = np.concatenate([np.zeros((1, 60), bool), rng.random((20, 60)) < 0.5, np.ones((1, 60), bool)])
    with torch.inference_mode():
        expected = model(torch.from_numpy(slide.embeddings), torch.from_numpy(keep)).numpy()
    logits = on_slide(keep).logits
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    odds = logits[:, 1] - logits[:, 0]
    assert on_slide.shapley(5, rng).sum() == pytest.approx(odds[-1] - odds[0], abs=1e-4)


def test_answered_tiles_are_those_that_raise_the_score(tiles: CohortTiles) -> None:
    class OneLesion(Abmil):
        """Attends to lesion tiles alone, and only to those whose channel 1 is over 50."""

        def tiles(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            strong = (embeddings[:, 1] > 50).float()
            return torch.stack([1 - strong, strong], dim=1), 1 + 1e4 * strong

    slide = planted_slide(tiles, 120, 20, "scattered", np.random.default_rng(5))
    model = OneLesion(6, hidden=2)
    model.head = torch.nn.Sequential(torch.nn.Identity())
    on_slide = TrainedAbmil(model, np.zeros(6, np.float32), np.ones(6, np.float32)).on(slide)
    answered = on_slide.answered(slide.planted, 0.3, np.random.default_rng(0))
    np.testing.assert_array_equal(answered, slide.embeddings[:, 1] > 50)
    assert 0 < answered.sum() < 20


def test_captums_estimators_find_the_values_of_an_additive_game() -> None:
    worth = np.random.default_rng(6).normal(size=20)
    scored: list[int] = []

    def scorer(keep: KeepMask) -> Scores:
        scored.append(len(keep))
        value = (keep @ worth + 2).astype(np.float32)
        return Scores(np.stack([0 * value, value], axis=1), np.ones((len(keep), 1), np.float32))

    for estimate in (captum_estimators.permutation, captum_estimators.kernel):
        scored.clear()
        game = CoalitionGame(scorer, ModelOutputs(("benign", "lesion")), np.arange(20))
        result = estimate(game, 1, 100)
        np.testing.assert_allclose(result.values[:, 1], worth, atol=1e-4)
        assert sum(scored) <= 100 + 4  # some score the whole and the empty slide twice
