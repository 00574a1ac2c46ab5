"""Bags out of HDF5: our client's and Prov-GigaPath's layout, coordinate rules, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from training.data.h5_features import check_bags, read_bag
from training.errors import TrainingError


def write(path: Path, **datasets: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


GRID = np.array([[0, 0], [512, 0], [0, 512]])


def test_unread_tiles_are_left_out_and_half_precision_is_widened(tmp_path: Path) -> None:
    features = np.arange(12, dtype=np.float16).reshape(3, 4)
    bag = read_bag(write(tmp_path / "a.h5", features=features, coords=GRID, valid=[True, False, True]))
    assert bag.features.dtype == np.float32
    np.testing.assert_array_equal(bag.features, features[[0, 2]])
    np.testing.assert_array_equal(bag.coords, GRID[[0, 2]])


def test_tiles_are_row_major_as_they_are_served_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    """CLAM writes column by column; segments and dilation depend on the order."""
    x, y = np.meshgrid(np.arange(5) * 256, np.arange(4) * 256)
    row_major = np.stack([x.ravel(), y.ravel()], axis=1)
    features = np.arange(20.0).reshape(20, 1)
    by_column = np.lexsort((row_major[:, 1], row_major[:, 0]))
    assert by_column.tolist() != list(range(20))
    path = write(tmp_path / "a.h5", features=features[by_column], coords=row_major[by_column])
    bag = read_bag(path)
    np.testing.assert_array_equal(bag.coords, row_major)
    np.testing.assert_array_equal(bag.features, features)


def test_coordinate_rules_scale_as_the_served_contract_has_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", features=np.zeros((3, 4)), coords=GRID)
    with h5py.File(path, "a") as file:
        file["coords"].attrs.update({"patch_size_level0": 512})
        file["features"].attrs.update({"mpp_level0_x": 0.25, "mpp_level0_y": 0.25})
    np.testing.assert_array_equal(read_bag(path, "level0/256").coords, GRID)
    np.testing.assert_array_equal(read_bag(path, "level0/patch_size_level0").coords, GRID // 2)
    np.testing.assert_array_equal(read_bag(path, "target-mpp/256").coords, GRID // 2)


BROKEN = {
    "missing": (None, "no such file"),
    "no_tile": ({"features": np.zeros((0, 4)), "coords": np.zeros((0, 2), int)}, "holds no tile"),
    "none_valid": ({"features": np.zeros((1, 4)), "coords": [[0, 0]], "valid": [False]}, "holds no tile"),
    "nan": ({"features": np.full((3, 4), np.nan), "coords": GRID}, "tile 0 has a NaN"),
    "infinite": ({"features": [[1.0], [np.inf], [1.0]], "coords": GRID}, "tile 1 has a NaN or infinite"),
    "no_coords": ({"features": np.zeros((3, 4))}, "lacks coords"),
    "misshapen": ({"features": np.zeros((2, 4)), "coords": GRID}, r"are not \[N, D\] and \[N, 2\]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_bag_is_one_clear_line(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    path = tmp_path / "slide.h5"
    if content is not None:
        write(path, **content)
    with pytest.raises(TrainingError, match=message) as caught:
        read_bag(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_and_a_missing_scale_are_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", features=np.zeros((3, 4)), coords=GRID)
    with pytest.raises(TrainingError, match="needs the slide's scale"):
        read_bag(path, "target-mpp/256")
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(TrainingError, match="not a readable HDF5 file"):
        read_bag(path)


def test_features_of_another_encoder_are_refused_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write(tmp_path / f"{width}.h5", features=np.ones((3, width)), coords=GRID) for width in (4, 5)]
    digests, assumed, _ = check_bags(paths[:1], 4, "level0/256")
    assert set(digests) == set(assumed) == {"4.h5"}
    assert f"1 of 1 feature files: {assumed['4.h5']}" in caplog.text
    assert assumed["4.h5"].startswith("the file does not say what its coordinates are")
    with pytest.raises(TrainingError, match=r"5\.h5: features are 5 wide and the slide encoder takes 4"):
        check_bags(paths, 4, "level0/256")


def test_bags_name_one_tile_encoder_or_none(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.h5", features=np.ones((3, 4)), coords=GRID) for name in "abc"]
    assert check_bags(paths, 4, "level0/256").encoder is None
    for path, encoder in zip(paths[:2], ("a" * 64, "b" * 64), strict=True):
        with h5py.File(path, "a") as file:
            file["features"].attrs["encoder_sha256"] = encoder
    assert check_bags(paths[1:], 4, "level0/256").encoder == "b" * 64
    with pytest.raises(TrainingError, match=r"a\.h5 has embeddings of the tile encoder aaaaaaaa, b\.h5 of b"):
        check_bags(paths, 4, "level0/256")
