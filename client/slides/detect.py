"""What a file is, by its content: a slide, an instance of a DICOM series, or neither."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import openslide

from gigapath_contract.slides import SLIDE_SUFFIXES

# TIFF and BigTIFF in both byte orders, Zeiss CZI, Hamamatsu's two indices.
_MAGIC = (
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"ZISRAWFILE"),
    *(b"[Virtual Microscope Specimen]", b"[Uncompressed Virtual Microscope Specimen]"),
)
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_READ = _SOP_CLASS, _IMAGE_TYPE, _SERIES, _ORGANISATION, _EXTENDED_OFFSETS = (
    *(0x00080016, 0x00080008, 0x0020000E, 0x00209311),
    0x7FE00001,
)
_FRAMES = 0x52009230  # PerFrameFunctionalGroupsSequence
_PIXELS = 0x7FE00010
_UNDEFINED = b"\xff\xff\xff\xff"  # the length of pixel data in frames that are compressed
_LARGEST_TABLE = 1 << 26  # bytes, 16 million frames


@dataclass(frozen=True)
class Instance:
    """A DICOM file: its series, and whether it may be a level of a slide (no label, overview or mask)."""

    series: str
    is_level: bool


def is_slide(path: Path) -> bool:
    """Whether a file's name or else its content says that it is a slide."""
    return path.suffix.lower() in SLIDE_SUFFIXES or has_slide_content(path)


def has_slide_content(path: Path) -> bool:
    """Whether OpenSlide recognises a file; other files are told from slides by their first bytes."""
    head = first_bytes(path)
    if not (head.startswith(_MAGIC) or is_dicom(head)):
        return False
    return openslide.OpenSlide.detect_format(path) is not None


def first_bytes(path: Path, count: int = 132) -> bytes:
    """The first bytes of a file; none of one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins so is DICOM."""
    return head[128:132] == b"DICM"


def read_instance(path: Path) -> Instance | None:
    """What a DICOM file says of itself; None where it is no DICOM file or cannot be read."""
    try:
        about = path.stat()
    except OSError:
        return None
    return _read_instance(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=100_000)
def _read_instance(path: Path, size: int, modified: int) -> Instance | None:
    header = _read_header(path, lambda tag: tag > _SERIES)
    if header is None:
        return None
    kind, flavours, series = (header.get(tag) for tag in (_SOP_CLASS, _IMAGE_TYPE, _SERIES))
    is_level = kind == _WHOLE_SLIDE and not {"LABEL", "OVERVIEW", "THUMBNAIL"} & set(flavours or ())
    return Instance(str(series or ""), is_level)


def lacks_frames(path: Path) -> bool:
    """Whether a DICOM file should list where each of its frames lies and does not: OpenSlide dies of it."""
    listed = False

    def at_frames(tag: int) -> bool:
        nonlocal listed
        listed |= tag == _FRAMES
        return tag >= _FRAMES

    header = _read_header(path, at_frames) or {}
    return not listed and header.get(_ORGANISATION) not in (None, "", "TILED_FULL")


def misplaces_frames(path: Path) -> bool:
    """Whether a DICOM file says of a frame that it begins past the file's end: OpenSlide dies of it, too."""
    tables: list[tuple[bytes, str]] = []

    def read_basic(file: BinaryIO) -> None:
        # The element's tag, VR and length, then the table as the first item: its tag, length and offsets.
        if len(start := file.read(20)) == 20 and start[8:12] == _UNDEFINED:
            tables.append((file.read(min(int.from_bytes(start[16:], "little"), _LARGEST_TABLE)), "<u4"))

    header = _read_header(path, lambda tag: tag >= _PIXELS, read_basic) or {}
    tables.append((header.get(_EXTENDED_OFFSETS) or b"", "<u8"))
    size = path.stat().st_size
    offsets = (np.frombuffer(table, kind, len(table) // int(kind[-1])) for table, kind in tables)
    return any(bool((found >= size).any()) for found in offsets)


def _read_header(
    path: Path, stop: Callable[[int], bool], read_rest: Callable[[BinaryIO], None] = lambda file: None
) -> dict[int, Any] | None:
    """The elements before the one at which `stop(tag)` is true, where `read_rest` may go on reading.

    None where there is no DICOM to read.
    """
    if not is_dicom(first_bytes(path)):
        return None
    # pydicom takes longer to import than the other readers, and most folders hold no DICOM.
    import pydicom
    from pydicom.errors import BytesLengthException, InvalidDicomError
    from pydicom.filereader import read_partial

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # else it warns of odd values
    damage = (InvalidDicomError, BytesLengthException, ValueError, LookupError, TypeError, AttributeError)
    try:
        with path.open("rb") as file:
            header = read_partial(file, stop_when=lambda tag, _vr, _length: stop(int(tag)))
            read_rest(file)
            return {tag: header[tag].value for tag in _READ if tag in header}
    except (OSError, EOFError, NotImplementedError, MemoryError, *damage):  # a length may claim gigabytes
        return None
