"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A hidden path in the same folder to write to; it replaces `path` when the block ends without an error.

    Its name is always the same, so the next run overwrites what a killed one left.

    Raises:
        OutputError: it can't be written, because the disk is full or the folder not writable, for example.
    """
    part = path.with_name(f".{path.name}.part")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one line about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise OutputError(f"cannot write {path}: {reason}; free some space or choose another path") from error


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


def write_text(path: Path, text: str) -> None:
    """Write a small text file as a whole."""
    with atomic_path(path) as part:
        part.write_text(text)
