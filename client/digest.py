"""A slide by its content: the key of everything that is kept from one run to the next."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from client.errors import SlideError


def slide_files(path: Path) -> list[Path]:
    """Every file that makes up a slide: a MIRAX index has a folder beside it, a DICOM instance its series."""
    match path.suffix.lower():
        case ".mrxs":
            return [path, *sorted(p for p in path.with_suffix("").glob("*") if p.is_file())]
        case ".dcm":
            return sorted(path.parent.glob("*.dcm"))
        case _:
            return [path]


def slide_stamp(path: Path) -> list[list[Any]]:
    """Name, size and modification time of a slide's files: the same again means that nobody wrote to it."""
    try:
        return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in slide_files(path)]
    except OSError as error:
        raise SlideError(f"{path}: {error.strerror or error}") from error


def slide_sha256(path: Path) -> str:
    """The digest of all bytes of a slide; of a slide of several files, of their names and digests."""
    try:
        digests = []
        for file in slide_files(path):
            with file.open("rb") as stream:
                digests.append((file.name, hashlib.file_digest(stream, "sha256").hexdigest()))
    except OSError as error:
        raise SlideError(f"{path}: {error.strerror or error}") from error
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256(repr(digests).encode()).hexdigest()
