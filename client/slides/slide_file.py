"""Open a slide file with the library that reads its format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

import openslide
from tifffile import COMPRESSION

from ..errors import SlideError
from .czi import Czi, open_czi
from .damage import check_claims, check_file, is_truncated_tiff, one_line
from .detect import lacks_frames, misplaces_frames
from .fingerprint import slide_files
from .ome_tiff import OmeTiff, open_ome_tiff
from .tiff import Page, read_pages

# What OpenSlide says of sound files: in codecs that it lacks, and DICOM in grey, 16 bit or without a flavour.
_OTHER_KIND = re.compile(
    rf"Unsupported TIFF compression: ({'|'.join(str(int(code)) for code in COMPRESSION)})$"
    r"|Unsupported transfer syntax|Attribute \w+ value|Couldn't get image flavor|No pyramid levels found"
)


OPENSLIDE = "openslide"


def library_of(handle: object) -> str:
    """The library that gives the pixels of an open slide."""
    return str(getattr(handle, "library", OPENSLIDE))  # OpenSlide's own class has no such attribute


def check_content(path: Path) -> list[Page]:
    """Check what OpenSlide can't allocate, or misses, and would end the process; the pages of a tiled TIFF.

    Raises:
        SlideError: the file is missing, empty or damaged.
    """
    check_file(path)
    try:
        lost = [file for file in slide_files(path) if lacks_frames(file) or misplaces_frames(file)]
    except OSError as error:
        raise SlideError(f"{path}: its folder cannot be read ({error.strerror}): check permissions") from None
    if lost:
        raise SlideError(f"{lost[0]}: does not say where its frames lie: damaged, copy it again")
    return read_pages(path, openslide.OpenSlide.detect_format(path) or "")


def open_file(path: Path, stream: BinaryIO | None = None) -> openslide.OpenSlide | OmeTiff | Czi:
    """Open a file with OpenSlide, or for some OME-TIFF and CZI what it lacks.

    Raises:
        SlideError: the file is missing, empty, cut off, damaged or no slide.
    """
    check_file(path)
    handle = open_ome_tiff(path, stream) or open_czi(path) or _open_openslide(path)
    try:
        check_claims(path, handle.level_dimensions, handle.properties)
    except SlideError:
        handle.close()
        raise
    return handle


def _open_openslide(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        if is_truncated_tiff(path):
            raise SlideError(f"{path}: cut off, its directory is missing: copy it again") from None
        raise SlideError(
            f"{path}: no slide that OpenSlide knows, or damaged: copy it again or convert it to tiled TIFF "
            "(gigapath-client convert)"
        ) from None
    except openslide.OpenSlideError as error:
        message = one_line(error).removeprefix(f"Reading {path}: ")
        if _OTHER_KIND.match(message):
            raise SlideError(
                f"{path}: of a kind that OpenSlide does not read ({_named(message)}): convert it, for "
                "example to tiled JPEG TIFF"
            ) from None
        raise SlideError(f"{path}: damaged, copy it again (OpenSlide: {message})") from None


def _named(message: str) -> str:
    """OpenSlide's message with the name of a TIFF's compression."""
    code = message.removeprefix("Unsupported TIFF compression: ")
    return f"TIFF compression {COMPRESSION(int(code)).name}" if code.isdecimal() else message
