"""Write outputs with `gigapath_contract.files`; what cannot be written is an OutputError."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gigapath_contract import files
from gigapath_contract.errors import one_line

from .errors import DiskFull, OutputError

_ROOM = 8 << 20


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A hidden path in the same folder to write to; it replaces `path` when the block ends without an error.

    Raises:
        OutputError: it can't be written, because the disk is full or the folder not writable, for example.
    """
    with output_errors(path), files.atomic_path(path) as part:
        yield part


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one line about `path`."""
    try:
        yield
    except OSError as error:
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else OutputError
        reason = error.strerror or one_line(error)
        raise kind(f"cannot write {path}: {reason}; free some space or choose another path") from error


def make_folder(folder: Path) -> None:
    """Make a folder for outputs and its parents.

    Raises:
        OutputError: it cannot be made, or is a file.
    """
    with output_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OutputError(
                f"cannot write into {folder}: it is not a folder; choose another path"
            ) from None


def check_folder(folder: Path) -> None:
    """Check that a folder for outputs can be made and written to, without making it.

    Raises:
        OutputError: a file is in its place, or permissions forbid it.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise OutputError(f"cannot write into {folder}: {existing} is not a folder; choose another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write into {folder}: no permission in {existing}; choose another path")


def has_room(folder: Path) -> bool:
    """Whether some megabytes can be written into a folder. A quota shows in no number of free bytes."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_ROOM))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file. Raises OutputError."""
    with output_errors(path):
        files.write_text(path, text)


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table; None is an empty cell. Raises OutputError."""
    with output_errors(path):
        files.write_csv(path, header, rows)
