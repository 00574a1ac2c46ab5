"""Content hash and modification fingerprint of a slide's files."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from typing import Any

from gigapath_contract.files import file_sha256

from ..errors import SlideError


def slide_files(path: Path) -> list[Path]:
    """Every file that makes up a slide: with a MIRAX index its folder, with a DICOM instance its series."""
    match path.suffix.lower():
        case ".mrxs":
            return [path, *sorted(p for p in path.with_suffix("").glob("*") if p.is_file())]
        case ".dcm":
            return sorted(path.parent.glob("*.dcm"))
        case _:
            return [path]


def file_fingerprint(path: Path) -> list[list[Any]]:
    """Name, size and modification time (ns) of a slide's files: unchanged while nobody writes to them.

    Raises:
        SlideError: a file is missing, or no file (opening a pipe would wait for ever).
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SlideError(f"{path}: not a file: give a slide (of a DICOM series, any one of its files)")
        return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in slide_files(path)]
    except OSError as error:
        raise SlideError(f"{path}: {error.strerror or error}: check the path") from error


def slide_sha256(path: Path) -> str:
    """The digest of all bytes of a slide; of a slide of several files, of their names and digests."""
    try:
        digests = [(file.name, file_sha256(file)) for file in slide_files(path)]
    except OSError as error:
        raise SlideError(f"{path}: {error.strerror or error}: check the file and its permissions") from error
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256(repr(digests).encode()).hexdigest()
