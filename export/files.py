"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is complete, and on the disk, before it takes its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    flush(part)
    part.replace(path)


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    write_bytes(path, text.encode())


def flush(path: Path) -> None:
    """Have the operating system write a file's content to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
