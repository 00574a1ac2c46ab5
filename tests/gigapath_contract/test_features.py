"""HDF5 files from strangers: one line each, before anything is read, in every room."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from client.attribution.model.embedded import read_embedded
from client.errors import ClientError
from client.outputs.hdf5 import read_features
from training.data.h5_features import read_bag
from training.errors import TrainingError

COORDS = np.array([[0, 0], [256, 0], [0, 256]])
FEATURES = np.arange(12, dtype=np.float32).reshape(3, 4)
SECRET = "root:x:0:0:root:/root:/bin/sh\n" * 20


def sound(file: h5py.File) -> None:
    file["features"], file["coords"] = FEATURES, COORDS
    file["coords"].attrs.update({"patch_size_level0": 256, "name": "s"})


def without(*names: str) -> Callable[[h5py.File, Path], None]:
    def write(file: h5py.File, _: Path) -> None:
        sound(file)
        for name in names:
            del file[name]

    return write


def with_dataset(name: str, values: Any) -> Callable[[h5py.File, Path], None]:
    def write(file: h5py.File, _: Path) -> None:
        sound(file)
        if name in file:
            del file[name]
        file[name] = values

    return write


def claims(file: h5py.File, _: Path) -> None:
    sound(file)
    del file["features"]
    file.create_dataset("features", (10**9, 96), "f4", chunks=(1000, 96))


def large_chunks(file: h5py.File, _: Path) -> None:
    sound(file)
    del file["features"]
    file.create_dataset("features", (3, 4), "f4", chunks=(3 * 10**8, 3), maxshape=(None, None))


def external_storage(file: h5py.File, secret: Path) -> None:
    sound(file)
    del file["features"]
    file.create_dataset("features", (3, 4), "f4", external=[(str(secret), 0, 48)])


def external_storage_elsewhere(file: h5py.File, secret: Path) -> None:
    """In an array that we would only copy, into the output."""
    sound(file)
    file.create_dataset("more/notes", (48,), "u1", external=[(str(secret), 0, 48)])


def external_link(file: h5py.File, secret: Path) -> None:
    sound(file)
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["features"] = FEATURES
    del file["features"]
    file["features"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "/features")


def soft_link(file: h5py.File, _: Path) -> None:
    sound(file)
    file["again"] = h5py.SoftLink("/features")


def virtual(file: h5py.File, secret: Path) -> None:
    sound(file)
    del file["features"]
    layout = h5py.VirtualLayout((3, 4), "f4")
    layout[:] = h5py.VirtualSource(str(secret.with_suffix(".h5")), "features", (3, 4))
    file.create_virtual_dataset("features", layout)


def group(file: h5py.File, _: Path) -> None:
    sound(file)
    del file["features"]
    file.create_group("features")


def loop(file: h5py.File, _: Path) -> None:
    sound(file)
    file.create_group("a")["b"] = file["/"]


STRANGE: dict[str, tuple[Callable[[h5py.File, Path], None], str]] = {
    "no features": (without("features"), "lacks features"),
    "neither": (without("features", "coords"), "lacks coords and features"),
    "a group": (group, "features is no array"),
    "one axis": (with_dataset("features", np.ones(4, "f4")), r"are not \[N, D\] and \[N, 2\]"),
    "unequal rows": (with_dataset("coords", COORDS[:2]), r"are not \[N, D\] and \[N, 2\]"),
    "three coordinates": (with_dataset("coords", np.ones((3, 3))), r"are not \[N, D\] and \[N, 2\]"),
    "strings": (with_dataset("features", [["a", "b"]] * 3), "features holds object"),
    "complex": (with_dataset("features", FEATURES.astype("c8")), "features holds complex64"),
    "records": (with_dataset("coords", np.zeros((3, 2), [("x", "i4")])), "coords holds"),
    "empty": (with_dataset("features", h5py.Empty("f4")), "features is no array"),
    "unequal valid": (with_dataset("valid", [True]), "valid .1,. has not one value per tile"),
    "not finite": (with_dataset("features", np.where(FEATURES == 5, np.nan, FEATURES)), "tile 1 has a NaN"),
    "far away": (with_dataset("coords", COORDS * 1e30), "coordinates that no slide has"),
    "claims": (claims, r"claims \(1000000000, 96\) values, more than the file can hold"),
    "large chunks": (large_chunks, "more than the file can hold"),
    "external storage": (external_storage, "features takes its values from another file"),
    "external storage elsewhere": (external_storage_elsewhere, "more/notes takes its values from another"),
    "external link": (external_link, "features is a link to elsewhere"),
    "soft link": (soft_link, "again is a link to elsewhere"),
    "virtual": (virtual, "features takes its values from another file"),
    "loop": (loop, "more objects than a feature file has"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_strange_file_is_one_line_everywhere_and_costs_nothing(case: str, tmp_path: Path) -> None:
    write, message = STRANGE[case]
    secret, path = tmp_path / "secret", tmp_path / "s.h5"
    secret.write_text(SECRET)
    with h5py.File(path, "w") as file:
        write(file, secret)
    tracemalloc.start()
    began = time.process_time()
    for read in (read_features, read_embedded, read_bag):
        with pytest.raises((ClientError, TrainingError), match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert time.process_time() - began < 10
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"patch_size_level0": "wide"}, "scale makes no sense"),
        ({"patch_size_level0": 256, "overlap": "much"}, "make no sense"),
        ({"patch_size_level0": 256, "overlap": 2, "patch_size": 1}, "which no tiles do"),
        ({"patch_size_level0": 256, "level0_width": [1, 2]}, "make no sense"),
        ({"patch_size_level0": 256, "mpp_level0_x": np.nan, "mpp_level0_y": 0.5}, "scale makes no sense"),
        ({"patch_size_level0": 256, "name": "../../elsewhere"}, "can't name files"),
    ],
)
def test_strange_attributes_are_one_line(attributes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = FEATURES, COORDS
        file["coords"].attrs.update(attributes)
    with pytest.raises(ClientError, match=message) as caught:
        read_embedded(path)
    assert "\n" not in str(caught.value)


def test_compressed_features_and_tiles_that_were_not_decoded_pass(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        sound(file)
        del file["features"]
        features = np.vstack([np.zeros((40_000, 1536), np.float32), np.full((1, 1536), np.nan, np.float32)])
        file.create_dataset("features", data=features, compression="gzip", chunks=(1000, 1536))
        del file["coords"]
        file["coords"] = np.zeros((40_001, 2), np.int64)
        file["valid"] = np.arange(40_001) < 40_000
    stored = read_features(path)
    np.testing.assert_array_equal(stored.embeddings, features)
    assert stored.valid.sum() == 40_000
