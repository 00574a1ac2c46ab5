"""Open a slide file with the library that reads its format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import openslide
from tifffile import COMPRESSION

from gigapath_contract.errors import one_line

from ..errors import SlideError
from .address import RemotePath
from .czi import Czi, open_czi
from .damage import check_claims, check_file, is_truncated_tiff
from .detect import fault_of_frames, first_bytes, is_dicom, slide_format
from .fingerprint import slide_files
from .ome_tiff import OmeTiff, open_ome_tiff
from .stored_tiles import VENDORS, StoredTiles
from .tiff import Page, read_pages

# What OpenSlide says of sound files: in codecs that it lacks, and DICOM in grey, 16 bit, without a flavour or
# of several focal planes.
_OTHER_KIND = re.compile(
    rf"Unsupported TIFF compression: ({'|'.join(str(int(code)) for code in COMPRESSION)})$"
    r"|Unsupported transfer syntax|Attribute \w+ value|Couldn't get image flavor|No pyramid levels found"
    r"|Slide contains unexpected image"
)

_READING = re.compile(r"Reading [^:]*: ")  # another file of the slide
OPENSLIDE = "openslide"


def library_of(handle: object) -> str:
    """The library that gives the pixels of an open slide."""
    return str(getattr(handle, "library", OPENSLIDE))  # OpenSlide's own class has no such attribute


@dataclass(frozen=True, eq=False)
class SlideFile:
    """A file that was checked before it is opened, with the pages that it has if it is a tiled TIFF."""

    path: Path
    pages: Sequence[Page] = ()

    def stored_tiles(self, vendor: str, size: tuple[int, int]) -> StoredTiles | str:
        """The tiles of the level that is `size` (w, h) large, or why they are read through OpenSlide."""
        if isinstance(self.path, RemotePath):
            return "it is on a server"
        if vendor not in VENDORS:
            return f"regions of {vendor} slides are composed"
        found = [page.stored for page in self.pages if page.size == size]
        return found[0] if len(found) == 1 else f"{len(found)} TIFF pages match the level"


def check_content(path: Path) -> SlideFile:
    """Check what OpenSlide can't allocate, or misses, and would end the process.

    Raises:
        SlideError: the file is missing, empty or damaged.
    """
    check_file(path)
    try:
        faults = [(file, fault) for file in slide_files(path) if (fault := fault_of_frames(file))]
    except OSError as error:
        raise SlideError(f"{path}: its folder cannot be read ({error.strerror}): check permissions") from None
    if faults:
        file, fault = faults[0]
        raise SlideError(f"{file}: {fault}")
    return SlideFile(path, read_pages(path, slide_format(path)))


def open_file(file: SlideFile, stream: BinaryIO | None = None) -> openslide.OpenSlide | OmeTiff | Czi:
    """Open a file with OpenSlide, or for some OME-TIFF and CZI what it lacks.

    Raises:
        SlideError: the file is missing, empty, cut off, damaged or no slide.
    """
    path, ome = file.path, any(page.first and page.ome for page in file.pages)
    check_file(path)
    handle = (open_ome_tiff(path, stream) if ome else open_czi(path)) or _open_openslide(path)
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
        if is_truncated_tiff(path) and not is_dicom(first_bytes(path)):  # which may begin as a TIFF does
            raise SlideError(f"{path}: cut off, its directory is missing: copy it again") from None
        raise SlideError(
            f"{path}: no slide that OpenSlide knows, or damaged: copy it again or convert it to tiled TIFF "
            "(gigapath-client convert)"
        ) from None
    except openslide.OpenSlideError as error:
        message = one_line(error).removeprefix(f"Reading {path}: ")
        if _OTHER_KIND.match(kind := _READING.sub("", message)):
            raise SlideError(
                f"{path}: of a kind that OpenSlide does not read ({_named(kind)}): convert it, for "
                "example to tiled JPEG TIFF"
            ) from None
        raise SlideError(f"{path}: damaged, copy it again (OpenSlide: {message})") from None


def _named(message: str) -> str:
    """OpenSlide's message with the name of a TIFF's compression."""
    code = message.removeprefix("Unsupported TIFF compression: ")
    return f"TIFF compression {COMPRESSION(int(code)).name}" if code.isdecimal() else message
