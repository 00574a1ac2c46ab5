"""What a file is, by its content: a slide, an instance of a DICOM series, or neither."""

from __future__ import annotations

import contextlib
import functools
import logging
import stat
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import openslide

from gigapath_contract.slides import SLIDE_SUFFIXES

from .tiff import SIGNATURES

# TIFF, Zeiss CZI, Hamamatsu's two indices.
_MAGIC = (
    *(*SIGNATURES, b"ZISRAWFILE", b"[Virtual Microscope Specimen]"),
    b"[Uncompressed Virtual Microscope Specimen]",
)
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_SOP_CLASS, _IMAGE_TYPE, _SERIES, _ORGANISATION = 0x00080016, 0x00080008, 0x0020000E, 0x00209311
_OPTICAL_PATHS = 0x00480105
_READ = (_SOP_CLASS, _IMAGE_TYPE, _SERIES, _ORGANISATION, _OPTICAL_PATHS)
_FRAMES = 0x52009230  # PerFrameFunctionalGroupsSequence
_EXTENDED_OFFSETS, _PIXELS = 0x7FE00001, 0x7FE00010
_UNDEFINED = b"\xff\xff\xff\xff"  # the length of pixel data in frames that are compressed
_LOST = "does not say where its frames lie: damaged, copy it again"
_LARGEST_TABLE = 1 << 26  # bytes, 16 million frames


@dataclass(frozen=True)
class Instance:
    """A DICOM file: its series, and whether it may be a level of a slide (no label, overview or mask)."""

    series: str
    is_level: bool


def is_slide(path: Path) -> bool:
    """Whether a file's name or else its content says that it is a slide."""
    return path.suffix.lower() in SLIDE_SUFFIXES or has_slide_content(path)


def slide_format(path: Path) -> str:
    """OpenSlide's name of a slide's format, empty where it is none.

    OpenSlide 4.0.1 does not know TIFFs below 4 GB in big-endian order, as QuPath writes them.
    """
    found = openslide.OpenSlide.detect_format(path)
    return found or ("generic-tiff" if first_bytes(path, 4) == b"MM\0*" else "")


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
    if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for ever
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


def fault_of_frames(path: Path) -> str:
    """Why OpenSlide would die of a DICOM file, or show one of several pictures; empty where it would not.

    It dies where a file should list where each frame lies and does not, or says of one that it begins past
    the file's end.
    """
    listed = False
    tables: list[tuple[bytes, str]] = []

    def at_frames(tag: int) -> bool:
        nonlocal listed
        listed |= tag == _FRAMES
        return tag >= _FRAMES

    def read_tables(file: BinaryIO, encoding: tuple[Any, Any]) -> None:
        from pydicom.filereader import read_dataset

        rest = read_dataset(file, *encoding, stop_when=lambda tag, _vr, _length: tag >= _PIXELS)
        tables.append((rest[_EXTENDED_OFFSETS].value if _EXTENDED_OFFSETS in rest else b"", "<u8"))
        # The element's tag, VR and length, then the table as the first item: its tag, length and offsets.
        if len(start := file.read(20)) == 20 and start[8:12] == _UNDEFINED:
            tables.append((file.read(min(int.from_bytes(start[16:], "little"), _LARGEST_TABLE)), "<u4"))

    header = _read_header(path, at_frames, read_tables) or {}
    if not listed and header.get(_ORGANISATION) not in (None, "", "TILED_FULL"):
        return _LOST
    size = path.stat().st_size
    offsets = (np.frombuffer(table, kind, len(table) // int(kind[-1])) for table, kind in tables)
    if any(bool((found >= size).any()) for found in offsets):
        return _LOST
    paths = len(header.get(_OPTICAL_PATHS) or ())
    return f"holds {paths} optical paths: export one" if paths > 1 else ""


def _read_header(
    path: Path,
    stop: Callable[[int], bool],
    read_rest: Callable[[BinaryIO, tuple[Any, Any]], None] = lambda file, encoding: None,
) -> dict[int, Any] | None:
    """The elements before the one at which `stop(tag)` is true, where `read_rest` may read further.

    None where there is no DICOM to read. `read_rest` is given pydicom's `original_encoding`; damage there
    does not hide what came before.
    """
    if not is_dicom(first_bytes(path)):
        return None
    # pydicom takes longer to import than the other readers, and most folders hold no DICOM.
    import pydicom
    from pydicom.errors import BytesLengthException, InvalidDicomError
    from pydicom.filereader import read_partial

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    warnings.filterwarnings("ignore", module="pydicom")  # odd values, that others write
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    damage = (
        *(InvalidDicomError, BytesLengthException, ValueError, LookupError, TypeError, AttributeError),
        *(OSError, EOFError, struct.error, NotImplementedError),
        MemoryError,  # a length may claim gigabytes
    )
    try:
        with path.open("rb") as file:
            header = read_partial(file, stop_when=lambda tag, _vr, _length: stop(int(tag)))
            with contextlib.suppress(*damage):
                read_rest(file, header.original_encoding)
            return {tag: header[tag].value for tag in _READ if tag in header}
    except damage:
        return None
