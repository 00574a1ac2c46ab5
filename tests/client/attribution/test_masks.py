"""Scoring masks: each once, resumed, replaced, explained as the number that was asked for."""

from __future__ import annotations

import sqlite3
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from client.arrays import Float32, Int64, KeepMask
from client.attribution.attribute import Settings, attribute, scorer_for
from client.attribution.methods.game import CoalitionGame
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.scorer import Scores, medoid
from client.attribution.model.cache import ScoreCache
from client.attribution.model.masked_slide import MaskedSlide
from client.errors import ClientError


class Counting:
    """A slide model (logit: sum of kept embeddings' channel 0) that counts its forwards and can fail."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.forwards = 0
        self.fail_after = fail_after

    def __call__(self, embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        if self.fail_after is not None and self.forwards + len(keep) > self.fail_after:
            raise ClientError("the server is gone")
        self.forwards += len(keep)
        value = (keep @ embeddings[:, 0]).astype(np.float32)
        return Scores(np.stack([value, 0 * value], axis=1), np.ones((len(keep), 3), np.float32))


@pytest.fixture
def tiles() -> tuple[Float32, Int64]:
    embeddings = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    return embeddings, np.stack([np.arange(30), np.zeros(30, int)], axis=1).astype(np.int64) * 256


def masks(count: int, tiles: int = 30) -> KeepMask:
    return np.random.default_rng(1).random((count, tiles)) < 0.5


def test_a_mask_is_scored_once(tiles: tuple[Float32, Int64]) -> None:
    model = Counting()
    masked_slide = MaskedSlide(model, *tiles)
    keep = masks(10)
    first = masked_slide.in_place()(np.concatenate([keep, keep]))
    again = masked_slide.in_place()(keep[::-1])
    assert model.forwards == masked_slide.cost.forwards == 10
    np.testing.assert_array_equal(first.logits[:10], first.logits[10:])
    np.testing.assert_array_equal(again.logits[::-1], first.logits[:10])
    np.testing.assert_array_equal(again.slide, np.ones((10, 3)))


def test_an_interrupted_run_resumes_where_it_stopped(tiles: tuple[Float32, Int64], tmp_path: Path) -> None:
    path, keep = tmp_path / "masks.sqlite", masks(40)
    dying = Counting(fail_after=24)
    with ScoreCache(path) as cache, pytest.raises(ClientError, match="gone"):
        CoalitionGame(
            MaskedSlide(dying, *tiles, cache=cache).in_place(),
            ModelOutputs(("a", "b")),
            np.arange(30),
            perturbations_per_eval=8,
        ).values(keep)
    assert dying.forwards == 24
    healthy = Counting()
    with ScoreCache(path) as cache:
        resumed = MaskedSlide(healthy, *tiles, cache=cache).in_place()(keep)
    assert healthy.forwards == 40 - 24
    np.testing.assert_array_equal(resumed.logits, Counting()(*tiles, keep).logits)


def test_scores_of_another_model_slide_or_occluder_are_not_mixed_up(
    tiles: tuple[Float32, Int64], tmp_path: Path
) -> None:
    embeddings, coords = tiles
    model, keep = Counting(), masks(5)
    with ScoreCache(tmp_path / "masks.sqlite") as cache:
        MaskedSlide(model, embeddings, coords, model="v1", cache=cache).in_place()(keep)
        MaskedSlide(model, embeddings, coords, model="v2", cache=cache).in_place()(keep)
        MaskedSlide(model, embeddings + 1, coords, model="v1", cache=cache).in_place()(keep)
        MaskedSlide(model, embeddings, coords + 256, model="v1", cache=cache).in_place()(keep)
        masked_slide = MaskedSlide(model, embeddings, coords, model="v1", cache=cache)
        masked_slide.shifted(1)(keep)
        scorer_for(masked_slide, "mean")(keep)
        assert model.forwards == 30
        masked_slide.in_place()(keep)
        assert model.forwards == 30


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    path = tmp_path / "masks.sqlite"
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(ClientError, match=r"masks\.sqlite.*delete it"):
        ScoreCache(path)
    with pytest.raises(ClientError, match="can't be used"):
        ScoreCache(tmp_path / "no folder" / "masks.sqlite")
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    ScoreCache(tmp_path / "empty.sqlite").close()


def test_occluders_replace_what_is_left_out(tiles: tuple[Float32, Int64]) -> None:
    embeddings, _ = tiles
    masked_slide, keep = MaskedSlide(Counting(), *tiles), masks(6)
    kept = keep @ embeddings[:, 0].astype(np.float64)
    absent = (~keep).sum(axis=1)
    expected = {
        "in_place": kept,
        "mean": kept + absent * embeddings[:, 0].mean(),
        "medoid": kept + absent * medoid(embeddings)[0],
    }
    for name, value in expected.items():
        logits = scorer_for(masked_slide, name)(keep).logits[:, 0]  # type: ignore[arg-type]
        np.testing.assert_allclose(logits, value, atol=1e-5, err_msg=name)
    bank = np.full((3, 2), 7, np.float32)
    np.testing.assert_allclose(
        scorer_for(masked_slide, bank)(keep).logits[:, 0], kept + 7 * absent, atol=1e-4
    )
    np.testing.assert_array_equal(
        scorer_for(masked_slide, embeddings, seed=1)(keep).logits,
        scorer_for(masked_slide, embeddings, seed=1)(keep).logits,
    )
    with pytest.raises(ClientError, match="width 2"):
        scorer_for(masked_slide, np.ones((3, 5), np.float32))


def test_shifting_moves_tiles_and_masks_together(tiles: tuple[Float32, Int64]) -> None:
    masked_slide, keep = MaskedSlide(Counting(), *tiles), masks(6)
    np.testing.assert_allclose(
        masked_slide.shifted(3)(keep).logits, masked_slide.in_place()(keep).logits, atol=1e-5
    )


def test_the_medoid_is_the_tile_nearest_to_all() -> None:
    embeddings = np.array([[0, 0], [1, 0], [2, 0], [10, 0]], np.float32)
    np.testing.assert_array_equal(medoid(embeddings), [1, 0])
    # A sample of a long slide still gives one of its own tiles.
    many = np.random.default_rng(0).normal(size=(3000, 4)).astype(np.float32)
    assert (medoid(many, sample=100) == many).all(axis=1).any()


LOGITS = np.array([[2.0, -1.0, 0.5], [80.0, -80.0, 0.0]], np.float32)
SLIDE = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)


def test_scores_are_what_they_are_called() -> None:
    names = ("a", "b", "c")
    scores = Scores(LOGITS, SLIDE)
    probability = np.exp(LOGITS[0]) / np.exp(LOGITS[0]).sum()
    np.testing.assert_allclose(ModelOutputs(names, "probability")(scores)[0], probability, rtol=1e-6)
    odds = np.log(probability / (1 - probability))
    np.testing.assert_allclose(ModelOutputs(names, "log_odds")(scores)[0], odds, rtol=1e-6)
    # Where a probability has long rounded to 1, its log-odds are still exact.
    np.testing.assert_allclose(ModelOutputs(names, "log_odds")(scores)[1], [80, -160, -80], rtol=1e-6)
    np.testing.assert_array_equal(ModelOutputs(names, "logit")(scores), LOGITS)
    np.testing.assert_array_equal(ModelOutputs(names, "log_odds", "multilabel")(scores), LOGITS)
    np.testing.assert_allclose(
        ModelOutputs(names, "probability", "multilabel")(scores)[0], 1 / (1 + np.exp(-LOGITS[0])), rtol=1e-6
    )
    one = Scores(LOGITS[:, :1], SLIDE)
    np.testing.assert_array_equal(ModelOutputs(("a",), "log_odds", "binary")(one), LOGITS[:, :1])
    np.testing.assert_allclose(
        ModelOutputs(("a",), "probability", "binary")(one)[0], 1 / (1 + np.exp(-2.0)), rtol=1e-6
    )
    likeness = ModelOutputs(("embedding",), "embedding", reference=SLIDE[0])(scores)
    np.testing.assert_allclose(likeness, [[1], [1 / np.sqrt(2)]], rtol=1e-6)
    with pytest.raises(ClientError, match="embedding"):
        ModelOutputs(("embedding",), "embedding")


def test_bad_input_is_one_line(tiles: tuple[Float32, Int64]) -> None:
    embeddings, coords = tiles
    with pytest.raises(ClientError, match="no tiles"):
        MaskedSlide(Counting(), embeddings[:0], coords[:0])
    broken = MaskedSlide(Counting(), np.full_like(embeddings, np.nan), coords)
    with pytest.raises(ClientError, match="tile 0 is NaN or infinite"):
        attribute(broken, ModelOutputs(("a", "b")))
    scorer = MaskedSlide(Counting(), embeddings, coords).in_place()
    with pytest.raises(ClientError, match="without a gap"):
        CoalitionGame(scorer, ModelOutputs(("a", "b")), np.array([0, 2]))
    with pytest.raises(ClientError, match="at least 1"):
        CoalitionGame(scorer, ModelOutputs(("a", "b")), np.arange(30), perturbations_per_eval=0)


def test_only_a_mask_that_keeps_it_minds_a_tile_that_is_not_finite(tiles: tuple[Float32, Int64]) -> None:
    embeddings, coords = tiles[0].copy(), tiles[1]
    embeddings[7] = np.nan
    scorer = MaskedSlide(lambda *slide: Scores(LOGITS[:1], SLIDE[:1]), embeddings, coords).in_place()
    keep = np.ones((1, len(coords)), dtype=bool)
    with pytest.raises(ClientError, match="tile 7 is NaN or infinite"):
        scorer(keep)
    keep[:, 7] = False
    np.testing.assert_array_equal(scorer(keep).logits, LOGITS[:1])


def test_two_thousand_masks_of_twenty_thousand_tiles_take_little_memory() -> None:
    rows, columns = np.divmod(np.arange(20_000), 160)
    embeddings = np.random.default_rng(0).normal(size=(20_000, 16)).astype(np.float32)
    masked_slide = MaskedSlide(
        Counting(), embeddings, np.stack([columns, rows], axis=1).astype(np.int64) * 256
    )
    tracemalloc.start()
    result = attribute(masked_slide, ModelOutputs(("a", "b")), Settings(max_evals=2000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1990 <= result.evaluations <= 2000  # what does not divide among the trees is left
    assert result.completeness_gap.max() < 1e-6
    assert peak < 32e6  # all masks at once would be 40 MB, and 2,000 times the embeddings 2.6 GB
