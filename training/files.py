"""Write files with `gigapath_contract.files`; what cannot be written is a TrainingError."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from gigapath_contract import files
from gigapath_contract.errors import one_line
from training.errors import TrainingError

_MOST_YAML_BYTES = 256 << 10


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
        reason = error.strerror or one_line(error)
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


def read_json(path: Path) -> Any:
    """Read JSON. Raises TrainingError where it is none or cannot be read."""
    try:
        return files.parse_json(path.read_bytes())
    except OSError as error:
        raise TrainingError(files.why_unreadable(path, error)) from error
    except ValueError as error:
        raise TrainingError(f"{path} is damaged ({error}): make it again") from error


def read_yaml(path: Path) -> Any:
    """Read YAML without aliases, through which few lines can stand for thousands of millions of values.

    Raises:
        TrainingError: it is none, nested too deeply, too long, or cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainingError(files.why_unreadable(path, error)) from error
    if len(data) > _MOST_YAML_BYTES:
        raise TrainingError(f"{path} is no configuration: it has over {_MOST_YAML_BYTES >> 10} KiB")
    return parse_yaml(data, str(path))


def parse_yaml(text: str | bytes, name: str) -> Any:
    """The same of a text; `name` is what errors call it."""
    try:
        return yaml.load(text, _WithoutAliases)
    # A value that contradicts its tag raises whatever its constructor does.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise TrainingError(f"{name} is not YAML: {' '.join(str(error).split())}") from error


class _WithoutAliases(yaml.SafeLoader):
    """PyYAML's safe loader, without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("no aliases here, write the value out")
        return super().compose_node(parent, index)


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
