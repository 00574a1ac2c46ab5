"""Kinds of tissue as players: who they are, what they carry, and how they are shown."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from client.arrays import Float32, Int64, KeepMask
from client.attribution.attribute import Settings
from client.attribution.explain import explain
from client.attribution.look_groups import find_look_groups
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.scorer import Scores
from client.attribution.model.embedded import read_embedded
from client.attribution.model.masked_slide import MaskedSlide
from client.attribution.render.files import write_explanation
from client.slides.slide import open_slide
from gigapath_contract.schema import Contract

LOOKS = np.random.default_rng(3).permutation(np.repeat([0, 1, 2, 3], [5, 10, 10, 15]))
"""Look of each of 40 tiles, in no order of places."""
WORTH = np.array([6.0, 2.0, 0.0, -1.0])


def forward(embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
    """Each look has its worth, shared by its tiles."""
    look = (embeddings[:, 0] > 5) + 2 * (embeddings[:, 1] > 20)
    value = np.asarray(keep @ (WORTH / np.bincount(LOOKS))[look]).astype(np.float32)
    return Scores(np.stack([value, 0 * value], axis=1), np.ones((len(keep), 2), np.float32))


@pytest.fixture
def embeddings() -> Float32:
    corners = np.array([[0, 0], [10, 0], [0, 40], [10, 40]])
    looks = corners[LOOKS] + np.random.default_rng(0).normal(size=(40, 2))
    return np.asarray(looks, dtype=np.float32)


@pytest.fixture
def coords() -> Int64:
    rows, columns = np.divmod(np.arange(40), 5)
    return np.stack([columns, rows], axis=1).astype(np.int64) * 257 + 100


def test_every_look_is_a_group_and_carries_its_worth(embeddings: Float32, coords: Int64) -> None:
    slide = MaskedSlide(forward, embeddings, coords)
    outputs = ModelOutputs(("tumour", "normal"))
    groups = find_look_groups(slide, outputs, Settings(), count=4, target_index=0)
    np.testing.assert_array_equal(groups.labels, LOOKS)  # looks are numbered by their worth, as groups are
    np.testing.assert_allclose(groups.values, WORTH, atol=1e-5)
    np.testing.assert_allclose(groups.tissue, [5 / 40, 10 / 40, 10 / 40, 15 / 40])
    assert groups.span == pytest.approx(7, abs=1e-5)
    assert groups.lines()[0] == "group 1, 12% of the tissue, carries 86% (± 0%) of the score"
    for number, tiles in enumerate(groups.typical):
        assert (LOOKS[tiles] == number).all()
        assert len(tiles) == min(8, np.count_nonzero(number == LOOKS))
    assert len(find_look_groups(slide, outputs, Settings(), count=99, target_index=0).values) == 32


def test_groups_are_stored_by_row_and_shown_with_typical_tiles(
    embeddings: Float32, coords: Int64, toy_contract: Contract, real_slide: Path, tmp_path: Path
) -> None:
    path = tmp_path / "toy.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = embeddings, coords
        file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 257, "name": "toy"})
    explained = explain(
        read_embedded(path), forward, toy_contract, target="tumour", checks=False, look_groups=4
    )
    with open_slide(real_slide) as opened:
        written = write_explanation(explained, path, tmp_path, opened)
    assert "toy-partition_shap-tumour-looks.png" in {each.name for each in written}
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["look_group_tumour"][:], LOOKS + 1)
        np.testing.assert_allclose(file["look_group_tumour"].attrs["values"], WORTH, atol=1e-5)
    picture = np.asarray(Image.open(tmp_path / "toy-partition_shap-tumour-looks.png").convert("RGB"))
    assert picture.std() > 10
    assert picture.shape[0] > 4 * 200  # a row for each group
