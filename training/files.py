"""Write files with `gigapath_contract.files`; what cannot be written is a TrainingError."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gigapath_contract import files
from training.errors import TrainingError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A hidden path next to `path` to write to; it replaces `path` when the block ends without an error.

    Raises TrainingError where it cannot be written.
    """
    with _write_errors(path), files.atomic_path(path) as part:
        yield part


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise TrainingError(f"cannot write {path}: {reason}; free space or choose another path") from error


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises TrainingError where it cannot be made or is a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make folder {folder}: {error.strerror}; choose another path") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with _write_errors(path):
        files.write_text(path, text)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON; a NaN or an infinity becomes null."""
    write_text(path, json.dumps(_finite(content), indent=1) + "\n")


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table with a header."""
    with _write_errors(path):
        files.write_csv(path, header, rows)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
