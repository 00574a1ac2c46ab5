"""What survives of a slide when the client is killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.scoring.resume import EmbeddingCheckpoint

ROWS = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
VALID = np.array([True, True, False, True, True, True, True, False, True, True])


def fill(path: Path) -> list[int]:
    """Ten rows in four records; returns the file's size after each."""
    sizes = []
    with EmbeddingCheckpoint(path, "key", 3) as checkpoint:
        sizes.append(path.stat().st_size)
        for start, end in ((0, 4), (4, 5), (5, 9), (9, 10)):
            checkpoint.append(ROWS[start:end], VALID[start:end])
            sizes.append(path.stat().st_size)
    return sizes


def kept(path: Path) -> int:
    with EmbeddingCheckpoint(path, "key", 3) as checkpoint:
        n = len(checkpoint.valid)
        np.testing.assert_array_equal(checkpoint.embeddings, ROWS[:n])
        np.testing.assert_array_equal(checkpoint.valid, VALID[:n])
    return n


def test_whole_records_survive_a_cut_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.part"
    sizes = fill(path)
    whole = path.read_bytes()
    assert kept(path) == 10
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        records = sum(size <= cut for size in sizes) - 1
        assert kept(path) == [0, 0, 4, 5, 9][records + 1], cut


def test_a_flipped_bit_ends_what_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.part"
    sizes = fill(path)
    damaged = bytearray(path.read_bytes())
    damaged[sizes[1] + 20] ^= 1
    path.write_bytes(damaged)
    assert kept(path) == 4
    with EmbeddingCheckpoint(path, "key", 3) as checkpoint:
        checkpoint.append(ROWS[4:10], VALID[4:10])
    assert kept(path) == 10


@pytest.mark.parametrize("zeros", [8, 11, 4096])
def test_the_zeros_that_a_power_failure_leaves_are_no_rows(tmp_path: Path, zeros: int) -> None:
    path = tmp_path / "a.part"
    fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(zeros))
    assert kept(path) == 10
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("fingerprint", "dim"), [("another", 3), ("key", 4)])
def test_rows_of_something_else_are_dropped(tmp_path: Path, fingerprint: str, dim: int) -> None:
    path = tmp_path / "a.part"
    fill(path)
    with EmbeddingCheckpoint(path, fingerprint, dim) as checkpoint:
        assert checkpoint.embeddings.shape == (0, dim)
    with EmbeddingCheckpoint(path, "key", 3) as checkpoint:
        assert len(checkpoint.valid) == 0
