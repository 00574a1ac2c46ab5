"""Files that appear whole or not at all, locks, the digests of files, and JSON from strangers."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_SUCH = "no such file or folder: check the path"


def why_unreadable(path: Path, error: OSError) -> str:
    """The line for a file that could not be read."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: {NO_SUCH}"
    return f"cannot read {path}: {error.strerror}"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A hidden path in the same folder to write to; it replaces `path` when the block ends without an error.

    The folder is made. The content is on the disk before it takes its name. The hidden name is always the
    same, so the next run overwrites what a killed one left.

    Raises:
        OSError: it cannot be written; as the functions below do.
    """
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        flush(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the operating system write a file's content to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def locked(path: Path, busy: Exception | None = None) -> Iterator[None]:
    """Hold a lock file, which no two processes hold at a time and which a killed one sets free.

    Raises:
        busy: another process holds it; where that is None, wait for it.
        OSError: the file cannot be written.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            if busy is None:
                raise
            raise busy from None
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table, whole or not at all; None is an empty cell.

    A text that a spreadsheet would run (it begins with = + - @ and is no number) gets a ' before it.
    """
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [_defused(cell) for cell in row] for row in (header, *rows)
        )


def _defused(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.lstrip().startswith(("=", "+", "-", "@")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def parse_json(text: str | bytes) -> Any:
    """JSON that anyone may have written.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
