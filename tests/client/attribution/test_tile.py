"""Occlusion inside a tile, and what-if questions about whole regions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapely

from client.arrays import Float32, Int64, KeepMask, Pixels
from client.attribution.counterfactual import counterfactual, tiles_inside
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.scorer import Scores
from client.attribution.model.masked_slide import MaskedSlide
from client.attribution.render.contact_sheet import ENLARGED, draw_tile_map
from client.attribution.render.tiles import glass_colour, read_crops
from client.attribution.tile import embedding_score, slide_score, tile_occlusion
from client.errors import ClientError
from client.reading.stream import read_tiles
from client.slides.slide import open_slide
from client.slides.tiling import plan_tiles
from gigapath_contract.schema import Contract

TARGET = ModelOutputs(("tumour", "normal"))
SPOT = np.s_[64:80, 112:128]  # patch row 4, column 7


def encode(tiles: Pixels) -> Float32:
    """A tile encoder that sees nothing but how red one patch is."""
    red = tiles[:, SPOT[0], SPOT[1], 0].mean(axis=(1, 2)) / 255
    return np.stack([red, np.ones_like(red)], axis=1).astype(np.float32)


def additive(embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
    value = (keep @ embeddings[:, 0]).astype(np.float32)
    return Scores(np.stack([value, 0 * value], axis=1), np.ones((len(keep), 1), np.float32))


@pytest.fixture
def tile() -> Pixels:
    pixels = np.full((224, 224, 3), (200, 180, 210), np.uint8)
    pixels[SPOT] = (255, 0, 0)
    return pixels


@pytest.mark.parametrize("window", [1, 2, 3])
def test_only_patches_near_what_the_encoder_sees_matter(tile: Pixels, window: int) -> None:
    found = tile_occlusion(
        tile, encode, embedding_score(encode, tile), window=window, fill="glass", glass=(0, 0, 255)
    )
    assert found.values.shape == (14, 14)
    rows, columns = np.nonzero(np.abs(found.values) > 1e-9)
    assert rows.min() == 4 - (window - 1)
    assert rows.max() == 4 + (window - 1)
    assert columns.min() == 7 - (window - 1)
    assert columns.max() == 7 + (window - 1)
    assert found.values.argmax() == 4 * 14 + 7
    # One window: red 1 -> 0, so the embedding turns from (1, 1) to (0, 1).
    assert found.values[4, 7] == pytest.approx(1 - 1 / np.sqrt(2), abs=1e-6)


def test_a_patch_inside_a_tile_is_traced_to_the_slide_s_score(tile: Pixels) -> None:
    embeddings = np.concatenate([encode(tile[None]), np.ones((3, 2), np.float32)])
    coords = np.arange(8).reshape(4, 2) * 256
    masked_slide = MaskedSlide(additive, embeddings, coords)
    found = tile_occlusion(tile, encode, slide_score(masked_slide, 0, TARGET, 0), window=1, fill="mean")
    mean_red = round(float(tile[..., 0].mean())) / 255
    assert found.values[4, 7] == pytest.approx(1 - mean_red, abs=1e-5)
    assert np.abs(np.delete(found.values.ravel(), 4 * 14 + 7)).max() < 1e-6


def test_a_flat_tile_has_nothing_to_blur(tile: Pixels) -> None:
    flat = np.full_like(tile, 90)
    found = tile_occlusion(flat, encode, embedding_score(encode, flat), fill="blur")
    assert np.abs(found.values).max() < 1e-6
    assert np.abs(found.other).max() > 1e-3  # glass does change it
    with pytest.raises(ClientError, match="window"):
        tile_occlusion(flat, encode, embedding_score(encode, flat), window=15)


def test_the_rim_that_the_model_never_sees_is_marked(tile: Pixels) -> None:
    whole = np.full((256, 256, 3), 120, np.uint8)
    found = tile_occlusion(tile, encode, embedding_score(encode, tile), window=1)
    drawn, _ = draw_tile_map(whole, found)
    assert drawn.shape == (256 * ENLARGED, 256 * ENLARGED, 3)
    grey = np.ptp(drawn.astype(int), axis=2) == 0
    rim = np.ones(grey.shape, bool)
    rim[16 * ENLARGED : -16 * ENLARGED, 16 * ENLARGED : -16 * ENLARGED] = False
    assert grey[rim].all()
    assert len(np.unique(drawn[rim])) == 2  # the tile and its hatching
    red = (drawn[..., 0].astype(int) - drawn[..., 2]) > 30
    rows, columns = np.nonzero(red)
    assert (rows.min(), rows.max()) == ((16 + 64) * ENLARGED, (16 + 80) * ENLARGED - 1)
    assert (columns.min(), columns.max()) == ((16 + 112) * ENLARGED, (16 + 128) * ENLARGED - 1)


def test_crops_are_the_pixels_that_were_scored(real_slide: Path, toy_contract: Contract) -> None:
    with open_slide(real_slide) as slide:
        plan = plan_tiles(slide, None)
        chosen = np.array([30, 7])
        scored = np.concatenate([batch.pixels for batch in read_tiles(plan)])
        np.testing.assert_array_equal(read_crops(slide, plan.coords[chosen], toy_contract), scored[chosen])
        whole = read_crops(slide, plan.coords[chosen], toy_contract, 256)
        np.testing.assert_array_equal(whole[:, 16:240, 16:240], scored[chosen])
        assert min(glass_colour(slide)) > 230


@pytest.fixture
def masked_slide() -> MaskedSlide:
    rows, columns = np.divmod(np.arange(16), 4)
    embeddings = np.zeros((16, 2), np.float32)
    embeddings[:, 0] = np.arange(16)
    return MaskedSlide(additive, embeddings, np.stack([columns, rows], axis=1).astype(np.int64) * 256)


def test_counterfactuals_remove_keep_and_replace(masked_slide: MaskedSlide) -> None:
    inside = np.isin(np.arange(16), [14, 15])
    (removed,) = counterfactual(masked_slide, TARGET, {"tumour": inside})
    assert removed.mean[0] == -29
    assert removed.tiles == 2
    assert removed.stderr is None
    (kept,) = counterfactual(masked_slide, TARGET, {"tumour": inside}, change="keep")
    assert kept.mean[0] == 29 - 120
    bank = np.array([[1, 0], [3, 0]], np.float32)
    (swapped,) = counterfactual(
        masked_slide, TARGET, {"tumour": inside}, change="replace", bank=bank, n_samples=200
    )
    assert swapped.draws.shape == (200, 2)
    assert swapped.stderr is not None
    # Two tiles of mean 2 come for 29; the error of the mean of 200 draws is sqrt(2) / sqrt(200).
    assert swapped.mean[0] == pytest.approx(-29 + 4, abs=4 * 0.1)
    assert swapped.stderr[0] == pytest.approx(np.sqrt(2) / np.sqrt(200), rel=0.2)


def test_counterfactuals_refuse_what_makes_no_sense(masked_slide: MaskedSlide) -> None:
    inside = np.isin(np.arange(16), [14, 15])
    with pytest.raises(ClientError, match="bank"):
        counterfactual(masked_slide, TARGET, {"tumour": inside}, change="replace")
    with pytest.raises(ClientError, match="'stroma' holds no tile"):
        counterfactual(masked_slide, TARGET, {"stroma": ~np.ones(16, bool)})


def test_a_tile_belongs_to_the_annotation_that_holds_its_centre(masked_slide: MaskedSlide) -> None:
    area = shapely.box(0, 0, 256 + 129, 256)
    assert np.flatnonzero(tiles_inside(area, masked_slide.coords, (256, 256))).tolist() == [0, 1]
    assert np.flatnonzero(
        tiles_inside(shapely.box(0, 0, 383, 256), masked_slide.coords, (256, 256))
    ).tolist() == [0]
