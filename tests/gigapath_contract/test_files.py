"""Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from gigapath_contract.files import atomic_path, file_sha256, locked, write_csv, write_text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with atomic_path(path) as part:
            part.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_place_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file" / "a.txt", "text")


def test_an_empty_cell_is_empty(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ("id", "mpp"), [("a", None), ("b", 0.5)])
    assert (tmp_path / "a.csv").read_bytes() == b"id,mpp\na,\nb,0.5\n"


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()


def test_a_lock_is_one_process_s_until_it_ends(tmp_path: Path) -> None:
    """Killed as it is, a process leaves no lock; who is told to wait gets it then."""
    lock, busy = tmp_path / "lock", RuntimeError("busy")
    holding = f"""
from pathlib import Path
from gigapath_contract.files import locked
with locked(Path({str(lock)!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RuntimeError, match="busy"), locked(lock, busy):
            pass
        other.kill()
        with locked(lock):
            pass
    with locked(lock, busy):
        pass
