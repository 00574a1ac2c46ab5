"""Feature files as TRIDENT, CLAM, STAMP and we write them: the same tiles, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from client.attribution.model.embedded import own_copy, read_bank, read_embedded
from client.errors import ClientError
from gigapath_contract.errors import CoordinateError
from gigapath_contract.positions import level0_positions
from gigapath_contract.schema import Contract
from training.data.h5_features import read_bag
from training.errors import TrainingError

MPP, SIDE = 0.25, 512
COORDS = np.array([[0, 0], [512, 0], [1536, 0], [0, 512], [1024, 1024]], np.int64)
FEATURES = np.arange(20, dtype=np.float32).reshape(5, 4) / 8  # exact in half precision


def trident(file: h5py.File) -> None:
    file["features"], file["coords"] = FEATURES, COORDS
    file["coords"].attrs.update(
        {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20}
    )


def clam_patches(file: h5py.File) -> None:
    """With the attributes that CLAM gives its coordinates: 128 px of a level that is 4 times smaller."""
    file["features"], file["coords"] = FEATURES, COORDS
    file["coords"].attrs.update({"patch_size": 128, "patch_level": 1, "downsample": np.array([4.0, 4.0])})


def clam_level0(file: h5py.File) -> None:
    file["features"], file["coords"] = FEATURES, COORDS
    file["coords"].attrs.update({"patch_size": 512, "patch_level": 0})


def clam_features(file: h5py.File) -> None:
    file["features"], file["coords"] = FEATURES, COORDS


def stamp(file: h5py.File) -> None:
    file["feats"] = FEATURES.astype(np.float16)
    file["coords"] = (COORDS * MPP).astype(np.float32)
    file.attrs.update(
        {"unit": "um", "tile_size_um": SIDE * MPP, "tile_size_px": 224, "extractor": "gigapath"}
    )


def first_stamp(file: h5py.File) -> None:
    """As before STAMP's version 2, without a unit: tiles of 256 µm, 512 px at 0.5 mpp, are 224 apart."""
    file["feats"], file["coords"] = FEATURES.astype(np.float16), COORDS // SIDE * 224
    file.attrs["extractor"] = "STAMP-extract-v1.0.0_xiyuewang-ctranspath-7c998680"


def custom(file: h5py.File) -> None:
    """As TRIDENT reads CLAM's kin: pixels of half the level's resolution."""
    file["features"], file["coords"] = FEATURES, COORDS
    file["coords"].attrs.update({"patch_size": 256, "patch_level": 0, "custom_downsample": 2})


def batched(file: h5py.File) -> None:
    file["features"], file["coords"] = FEATURES[None], COORDS[None]
    file["coords"].attrs["patch_size_level0"] = 512


def written(write: Callable[[h5py.File], None], folder: Path) -> Path:
    path = folder / "s.h5"
    with h5py.File(path, "w") as file:
        write(file)
    return path


@pytest.mark.parametrize(
    ("write", "options", "assumed"),
    [
        (trident, {}, ""),
        (batched, {}, ""),
        (clam_patches, {}, ""),
        (clam_level0, {}, ""),
        (custom, {}, ""),
        (clam_features, {"tile_size": 512}, "read as level-0 pixels of tiles of 512 px"),
        (stamp, {"mpp": 0.25}, "in µm were converted to level-0 pixels of 0.25 µm"),
        (
            first_stamp,
            {"mpp": 0.5},
            "STAMP's first unit (224 are 256 µm) were converted to level-0 pixels of 0.5",
        ),
    ],
)
def test_the_same_tiles_whoever_wrote_them(
    write: Callable[[h5py.File], None], options: dict[str, Any], assumed: str, tmp_path: Path
) -> None:
    path = written(write, tmp_path)
    before = path.read_bytes()
    slide = read_embedded(path, **options)
    np.testing.assert_array_equal(slide.coords, COORDS)
    np.testing.assert_array_equal(slide.embeddings, FEATURES)
    assert slide.tile_size == (512, 512)
    assert assumed in slide.assumed
    assert bool(assumed) == bool(slide.assumed)
    copy = own_copy(path, slide, tmp_path / "out")
    assert copy == tmp_path / "out" / "attribution" / "s.h5"
    assert path.read_bytes() == before
    again = read_embedded(copy)
    assert (again.digest, again.tile_size, again.assumed) == (slide.digest, slide.tile_size, slide.assumed)
    np.testing.assert_array_equal(again.coords, COORDS)
    with h5py.File(copy, "r+") as file:
        file["attribution_occlusion"] = np.zeros(5)
    with h5py.File(own_copy(path, slide, tmp_path / "out")) as file:
        assert "attribution_occlusion" in file  # an earlier result stays


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (clam_features, {}, "how large its tiles are.*--tile-size"),
        (stamp, {}, "µm: level-0 pixels need the slide's mpp .--mpp.$"),
        (first_stamp, {}, "µm: level-0 pixels need the slide's mpp .--mpp.$"),
        (trident, {"tile_size": 256}, "the file says 512, which contradicts --tile-size 256"),
    ],
)
def test_what_is_missing_is_asked_for(
    write: Callable[[h5py.File], None], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ClientError, match=message) as caught:
        read_embedded(written(write, tmp_path), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [trident, batched, clam_patches, clam_features])
def test_training_reads_them_too(write: Callable[[h5py.File], None], tmp_path: Path) -> None:
    bag = read_bag(written(write, tmp_path))
    np.testing.assert_array_equal(bag.features, FEATURES)
    np.testing.assert_array_equal(bag.coords, COORDS)


@pytest.mark.parametrize("write", [clam_features, stamp, first_stamp])
def test_of_a_bank_no_scale_is_asked(
    write: Callable[[h5py.File], None], contract: Contract, tmp_path: Path
) -> None:
    bank, unknown = read_bank(written(write, tmp_path), contract)
    np.testing.assert_array_equal(bank, FEATURES)
    assert "does not say which tile encoder" in unknown


@pytest.mark.parametrize("write", [stamp, first_stamp])
def test_training_refuses_micrometres(write: Callable[[h5py.File], None], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"µm: .* mpp: embed the slide again$"):
        read_bag(written(write, tmp_path))


@pytest.mark.parametrize(
    "attributes",
    [
        {"patch_level": 1, "patch_size": "wide", "downsample": [4.0, 4.0]},
        {"patch_level": 1, "patch_size": 256, "downsample": "four"},
        {"unit": "um", "mpp_level0_x": 0.5, "mpp_level0_y": 0.5},
        {"unit": "mm", "patch_size_level0": 256},
        {"patch_size_level0": 2**62},
    ],
)
def test_attributes_that_make_no_sense(attributes: dict[str, Any]) -> None:
    with pytest.raises(CoordinateError):
        level0_positions(COORDS, attributes)


@pytest.mark.parametrize("unit", ["um", b"um", np.bytes_(b"um"), "\u00b5m", "\u03bcm", "Microns"])
def test_micrometres_have_many_names(unit: Any) -> None:
    found = level0_positions(COORDS * MPP, {"unit": unit, "tile_size_um": SIDE * MPP}, mpp=MPP)
    np.testing.assert_array_equal(found.coords, COORDS)
