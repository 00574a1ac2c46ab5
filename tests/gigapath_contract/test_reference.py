"""The reference file: read as it was written, refused where damaged; the comparison by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gigapath_contract.reference import (
    Case,
    Gate,
    Reference,
    SlideReference,
    compare,
    distance,
    read_reference,
    write_reference,
)
from gigapath_contract.schema import Contract

GATES = {
    "tile_encoder": Gate(1e-4, 0.999, 1e-3),
    "slide_encoder": Gate(float("inf"), 0.99, 0.05),
    "slide_occlusion": Gate(1e-3, 0.9, float("inf")),
}


@pytest.fixture
def reference() -> Reference:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    slides = tuple(
        SlideReference(
            coords=np.arange(2 * n).reshape(n, 2),
            keep=rng.random((2, n)) < 0.5,
            encoder={"LAYERS": draw(3, 2, 4), "SLIDE": draw(4)},
            occlusion={"SLIDE": draw(2, 4), "LOGITS": draw(2, 3)},
        )
        for n in (1, 10)  # n1. is no prefix of n10.
    )
    tiles = rng.integers(0, 255, (2, 224, 224, 3), np.uint8)
    return Reference(
        tiles, {"EMBEDDINGS": draw(2, 4), "TILE_LOGITS": draw(2, 3)}, draw(3, 4), draw(5, 4), slides
    )


@pytest.fixture
def path(reference: Reference, contract: Contract, tmp_path: Path) -> Path:
    write_reference(tmp_path / "reference.npz", reference, contract, GATES)
    return tmp_path / "reference.npz"


def test_what_was_written_is_read(reference: Reference, contract: Contract, path: Path) -> None:
    read, its_contract, gates = read_reference(path)
    assert its_contract == contract
    assert gates == GATES
    pairs = list(zip(reference.cases(), read.cases(), strict=True))
    assert [(case.model, case.name) for case, _ in pairs] == [
        ("tile_encoder", "2 tiles"),
        ("slide_encoder", "N=1"),
        ("slide_encoder", "N=10"),
        ("slide_occlusion", "N=1"),
        ("slide_occlusion", "N=10"),
    ]
    for written, found in pairs:
        for wanted, arrays in ((written.inputs, found.inputs), (written.outputs, found.outputs)):
            assert wanted.keys() == arrays.keys()
            for name, array in wanted.items():
                assert arrays[name].dtype == array.dtype
                np.testing.assert_array_equal(arrays[name], array)


def test_embeddings_are_the_sum_of_a_row_and_a_column(reference: Reference) -> None:
    case = list(reference.cases())[2]
    np.testing.assert_array_equal(case.inputs["EMBEDDINGS"][7], reference.rows[1] + reference.columns[2])


def test_a_file_that_is_damaged_or_something_else_is_a_value_error(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"not a NumPy \.npz archive"):
            read_reference(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    with pytest.raises(ValueError, match=r".+"):
        read_reference(path)
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    with pytest.raises(ValueError, match="it has no array"):
        read_reference(tmp_path / "other.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"not a NumPy \.npz archive"):
        read_reference(tmp_path / "array.npy")
    with pytest.raises(FileNotFoundError):
        read_reference(tmp_path / "none.npz")


def test_distance_by_hand() -> None:
    expected = np.array([[1, 0], [3, 4]], np.float32)
    assert distance(expected, expected) == pytest.approx((0, 1, 0))
    largest, cosine, relative = distance(np.array([[1, 1], [3, 4]], np.float32), expected)
    assert (largest, cosine, relative) == pytest.approx((1, 0.5**0.5, 0.25))
    assert distance(expected[:1], expected) == (float("inf"), -1, float("inf"))


def test_what_has_no_direction_is_judged_by_its_differences() -> None:
    zeros = np.zeros(2, np.float32)
    assert distance(zeros, zeros) == (0, 1, 0)
    assert distance(np.array([0, 0.5], np.float32), zeros) == (0.5, 1, float("inf"))
    logits = np.array([[2], [1e-6]], np.float32)
    flipped = np.array([[2], [-1e-6]], np.float32)
    assert distance(flipped, logits) == pytest.approx((2e-6, 1, 1e-6))


def test_a_wrong_scale_fails_although_no_direction_changes() -> None:
    expected = np.array([3, 4], np.float32)
    case = Case("slide_encoder", "N=1", {}, {"SLIDE": expected})
    gate = Gate(float("inf"), 0.999, 0.05)
    (right,), (wrong,) = (compare(case, {"SLIDE": scale * expected}, gate) for scale in (1.01, 1.1))
    assert right.passed
    assert wrong.min_cosine == pytest.approx(1)
    assert not wrong.passed


@pytest.mark.parametrize(
    ("answer", "passed"),
    [([3.0, 4.0], True), ([3.0, 4.2], False), ([-3.0, -4.0], False), ([np.nan, 4.0], False), ([3.0], False)],
)
def test_a_row_passes_within_its_gate_alone(answer: list[float], passed: bool) -> None:
    case = Case("slide_encoder", "N=1", {}, {"SLIDE": np.array([3, 4], np.float32)})
    (row,) = compare(case, {"SLIDE": np.array(answer, np.float32)}, Gate(0.1, 0.999, 1.0))
    assert (row.model, row.case, row.output, row.passed) == ("slide_encoder", "N=1", "SLIDE", passed)
