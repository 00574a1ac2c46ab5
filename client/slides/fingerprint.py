"""Content hash and modification fingerprint of a slide's files."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from typing import Any

from gigapath_contract.files import file_sha256

from ..errors import SlideError
from .address import RemotePath, extra_of
from .detect import first_bytes, is_dicom, read_instance

_LONGEST_INDEX = 1 << 20  # bytes of Hamamatsu's index; real ones have some kilobytes


def slide_files(path: Path) -> list[Path]:
    """Every file that makes up a slide.

    With a MIRAX index that is its folder; with Hamamatsu's, the files it names; with a DICOM instance, all
    instances of the same series in its folder, whatever they are called.
    """
    if path.suffix.lower() == ".mrxs":
        return [path, *sorted(p for p in path.with_suffix("").glob("*") if p.is_file())]
    head = first_bytes(path)
    if is_dicom(head) and (instance := read_instance(path)):
        beside = sorted(other for other in path.parent.iterdir() if other.is_file())
        return [other for other in beside if _series(other) == instance.series]
    if head.startswith(b"[") and b"Virtual Microscope Specimen]" in head:
        lines = first_bytes(path, _LONGEST_INDEX).decode(errors="replace").splitlines()
        named = {name.strip() for line in lines if (name := line.partition("=")[2].strip())}
        return [path, *sorted(p for name in named if "/" not in name and (p := path.parent / name).is_file())]
    return [path]


def _series(path: Path) -> str | None:
    instance = read_instance(path)
    return instance.series if instance else None


def file_fingerprint(path: Path) -> list[list[Any]]:
    """Name, size and modification time (ns) of a slide's files: unchanged while nobody writes to them.

    Of a slide on a server: its digest, for which it is not read.

    Raises:
        SlideError: a file is missing, or no file (opening a pipe would wait for ever).
    """
    if isinstance(path, RemotePath):
        return [[path.name, 0, slide_sha256(path)]]
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SlideError(f"{path}: not a file: give a slide (of a DICOM series, any one of its files)")
        return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in slide_files(path)]
    except FileNotFoundError:
        raise SlideError(f"{path}: no such file: check the path") from None
    except OSError as error:
        raise SlideError(f"{path}: {error.strerror or error}: check the path") from error


def slide_sha256(path: Path) -> str:
    """The digest of all bytes of a slide; of one of several files, of their digests, whatever their names.

    Of a file on a server: of address, size and ETag; of a DICOMweb series: of its instances' UIDs.
    """
    if isinstance(path, RemotePath):
        return _remote_sha256(path)
    try:
        digests = sorted(file_sha256(file) for file in slide_files(path))
    except OSError as error:
        raise SlideError(f"{path}: {error.strerror or error}: check the file and its permissions") from error
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(repr(digests).encode()).hexdigest()


def _remote_sha256(path: RemotePath) -> str:
    with extra_of(path):
        if path.series:
            from .dicomweb import open_series

            return open_series(path).sha256
        from .mirror import find_version

        return find_version(path).sha256
