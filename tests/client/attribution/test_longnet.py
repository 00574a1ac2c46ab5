"""Masks on the real slide encoder: LongNet depends on positions, so dropping a tile is not occluding it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from client.arrays import Float32, Int64, KeepMask
from client.attribution.attribute import Settings, attribute
from client.attribution.curves import spearman
from client.attribution.methods.game import CoalitionGame
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.occlusion import occlusion
from client.attribution.methods.scorer import Scores, concatenate
from client.attribution.model.masked_slide import MaskedSlide
from training.models.build import build_models
from training.models.slide_model import SlideModel

TILES = 60
NULL = 37


class TorchForward:
    """A `Forward` on our own PyTorch slide model, `batch` masks at a time."""

    def __init__(self, model: SlideModel, batch: int = 64) -> None:
        self.model, self.batch = model, batch

    def __call__(self, embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        slices = range(0, len(keep), self.batch)
        return concatenate([self._some(embeddings, coords, keep[i : i + self.batch]) for i in slices])

    @torch.inference_mode()
    def _some(self, embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        score = self.model.score(*map(torch.from_numpy, (embeddings, coords, np.ascontiguousarray(keep))))
        assert score.logits is not None
        return Scores(score.logits.numpy(), score.slide.numpy())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def slide_model() -> SlideModel:
    """The demo slide encoder with seeded weights, to which a tile that carries a flag is invisible by itself.

    Channel 0 is the flag: nothing but the input writes it, and every query gives a flagged key a logit so low
    that it has no share in any softmax of any layer. Leaving such a tile out must change nothing.
    """
    model = build_models("demo", seed=3).slide_model.eval()
    width = model.encoder.config.embed_dim // model.encoder.config.heads
    with torch.no_grad():
        model.encoder.position_table[:, 0] = 0
        for key, weight in model.encoder.state_dict().items():
            if key == "patch_embed.proj.weight":
                weight[:, 0] = 0
                weight[0] = 0
                weight[0, 0] = 1
            elif ".out_proj." in key or ".fc2." in key:
                weight[0] = 0
            elif ".q_proj." in key:  # in each head one channel of q is a constant ...
                weight[::width] = -10 if key.endswith("bias") else 0
            elif ".k_proj." in key:  # ... and that channel of k reads the flag
                weight[::width] = 0
                if key.endswith("weight"):
                    weight[::width, 0] = 1
    return model


@pytest.fixture(scope="module")
def tiles() -> tuple[Float32, Int64]:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((TILES, 96), dtype=np.float32)
    embeddings[:, 0] = 0
    embeddings[NULL, 0] = 1000
    rows, columns = np.divmod(np.arange(TILES), 10)
    return embeddings, np.stack([columns, rows], axis=1).astype(np.int64) * 256


@pytest.fixture
def outputs() -> ModelOutputs:
    return ModelOutputs(("benign", "lesion"))


def test_masking_a_tile_that_means_nothing_changes_nothing_and_dropping_it_does(
    slide_model: SlideModel, tiles: tuple[Float32, Int64], outputs: ModelOutputs
) -> None:
    masked_slide = MaskedSlide(TorchForward(slide_model), *tiles)
    masked = occlusion(CoalitionGame(masked_slide.in_place(), outputs, np.arange(TILES)))
    assert np.median(np.abs(np.delete(masked.values[:, 1], NULL))) > 1e-3  # the other tiles do matter
    assert abs(masked.values[NULL, 1]) < 1e-5
    # Dropped, the same tile seems to matter more than a real one: only positions have changed. It is measured
    # in the slide embedding, since the randomly initialised head sees a single direction of it.
    one_out = np.concatenate([np.ones((1, TILES), dtype=bool), ~np.eye(TILES, dtype=bool)])
    slide = masked_slide.in_place()(one_out).slide
    typical = np.median(np.delete(np.linalg.norm(slide[1:] - slide[0], axis=1), NULL))
    dropped = masked_slide.dropped()(one_out[[0, 1 + NULL]]).slide
    assert np.linalg.norm(dropped[0] - dropped[1]) > typical


def test_masks_give_the_same_scores_one_by_one_and_64_at_a_time(
    slide_model: SlideModel, tiles: tuple[Float32, Int64]
) -> None:
    keep = np.random.default_rng(1).random((64, TILES)) < 0.6
    one = TorchForward(slide_model, batch=1)(*tiles, keep)
    many = TorchForward(slide_model, batch=64)(*tiles, keep)
    np.testing.assert_allclose(one.logits, many.logits, atol=1e-5)
    np.testing.assert_allclose(one.slide, many.slide, atol=1e-5)


def test_head_randomisation_changes_the_map(tiles: tuple[Float32, Int64], outputs: ModelOutputs) -> None:
    maps = []
    settings = Settings(method="occlusion", feature_mask=np.arange(TILES))
    for seed in (3, 4):
        masked_slide = MaskedSlide(TorchForward(build_models("demo", seed=seed).slide_model.eval()), *tiles)
        maps.append(attribute(masked_slide, outputs, settings).values[:, 1])
    assert abs(spearman(np.abs(maps[0]), np.abs(maps[1]))) < 0.5
