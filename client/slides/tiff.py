"""What a TIFF's directories claim, checked against the file before OpenSlide allocates what they say."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from ..arrays import Array, Int64
from ..errors import SlideError
from .stored_tiles import StoredTiles, find_tiles

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFF and BigTIFF begin in both byte orders."""
VENDORS = ("aperio", "generic-tiff", "leica", "philips", "trestle", "ventana")
"""OpenSlide's formats of tiled TIFF pages; Hamamatsu's NDPI holds one JPEG stream per page."""
LARGEST_TILE = 1 << 28  # bytes of a decoded tile: 8,192 px a side in RGBA
_TILE_OFFSETS, _TILE_BYTE_COUNTS, _ORIENTATION, _SUBFILE = 324, 325, 274, 254
_AS_STORED = (7, 33003, 33004, 33005)
"""JPEG and JPEG 2000: OpenSlide shows them whatever the orientation says."""
DAMAGE = (
    *(tifffile.TiffFileError, struct.error, ArithmeticError, AttributeError, LookupError, MemoryError),
    *(NotImplementedError, OSError, RuntimeError, TypeError, ValueError),
)
"""What tifffile raises over a damaged file."""


@dataclass(frozen=True)
class Page:
    """A tiled page; pairs are (x, y). `mpp` is None where the page has no resolution."""

    size: tuple[int, int]
    tile: tuple[int, int]
    layout: tuple[int, int]  # samples per pixel, bits per sample
    subfile: int  # TIFF's NewSubfileType: bit 0 a reduced image, bit 2 a mask
    mpp: tuple[float, float] | None
    first: bool  # of the file
    ome: bool  # described by OME-XML
    stored: StoredTiles | str  # its tiles, or why they can't be read without OpenSlide


def read_pages(path: Path, vendor: str) -> list[Page]:
    """The tiled pages of a TIFF slide, whose claims the file can hold; none of another format.

    Raises:
        SlideError: the directories claim more, or larger, tiles than the file has, or turn the picture.
    """
    if vendor not in VENDORS:
        return []
    try:
        with tifffile.TiffFile(path) as file:
            size = path.stat().st_size
            return [_checked(path, size, page) for page in all_pages(file) if page.is_tiled]
    except DAMAGE as error:
        raise SlideError(f"{path}: damaged, copy it again (TIFF: {' '.join(str(error).split())})") from None


def all_pages(file: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """The pages of a TIFF, and those in the first one's SubIFDs, where OME-TIFF has its smaller levels.

    Raises:
        TiffFileError: a page is followed by an earlier one, so that there is no last one.
    """
    pages: dict[int, tifffile.TiffPage] = {}
    for page in file.pages:
        if page.offset in pages:
            raise tifffile.TiffFileError("its directories lead back to an earlier one")
        pages[page.offset] = page.aspage()
    first = file.pages.first
    below = (first.pages or ()) if first.is_ome else ()
    return [*pages.values(), *(page.aspage() for page in below)]


def _checked(path: Path, file_size: int, page: tifffile.TiffPage) -> Page:
    size, tile = (page.imagewidth, page.imagelength), (page.tilewidth, page.tilelength)
    claim = f"{path}: a page claims {size[0]}x{size[1]} px in tiles of {tile[0]}x{tile[1]} px"
    if not all(side > 0 for side in size + tile) or 4 * tile[0] * tile[1] > LARGEST_TILE:
        raise SlideError(f"{claim}, which no scanner writes: damaged, copy it again")
    needed = -(-size[0] // tile[0]) * -(-size[1] // tile[1])
    listed = min(page.tags[code].count for code in (_TILE_OFFSETS, _TILE_BYTE_COUNTS))
    if listed < needed:
        raise SlideError(f"{claim}, but lists {listed} of {needed} tiles: damaged, copy it again")
    starts, lengths = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    end = int((starts + lengths)[lengths > 0].max(initial=0))
    if end > file_size or lengths.max(initial=0) > file_size or min(starts.min(), lengths.min()) < 0:
        raise SlideError(f"{path}: cut off, {file_size} of at least {end} bytes are there: copy it again")
    if (turned := orientation_of(page)) != 1 and page.compression not in _AS_STORED:
        raise SlideError(
            f"{path}: turned or mirrored by TIFF's orientation {turned}: turn it upright "
            "(gigapath-client convert)"
        )
    return Page(
        size=size,
        tile=tile,
        layout=(page.samplesperpixel, page.bitspersample),
        # A SubIFD is a reduced image.
        subfile=(int(page.tags[_SUBFILE].value) if _SUBFILE in page.tags else 0) | (len(page.treeindex) > 1),
        mpp=page_mpp(page),
        first=page.treeindex == (0,),
        ome=page.is_ome,
        stored=_stored(page, starts, lengths),
    )


def _stored(page: tifffile.TiffPage, offsets: Int64, counts: Int64) -> StoredTiles | str:
    try:
        return find_tiles(page, offsets, counts)
    except (tifffile.TiffFileError, OSError, ValueError, LookupError) as error:
        return f"tifffile: {error}"


def orientation_of(page: tifffile.TiffPage) -> int:
    """How a page is turned and mirrored, 1 (not at all) to 8; over 4 its sides are swapped."""
    tag = page.tags.get(_ORIENTATION)
    return int(tag.value) if tag and tag.value in range(1, 9) else 1


def upright(pixels: Array, orientation: int) -> Array:
    """Pixels [h, w, ...] as viewers show them."""
    pixels = pixels.swapaxes(0, 1) if orientation > 4 else pixels
    down, right = orientation in (1, 2, 5, 6), orientation in (1, 4, 5, 8)
    return np.asarray(pixels[:: 1 if down else -1, :: 1 if right else -1])


def page_mpp(page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Microns per pixel (x, y) by a page's resolution; None where it has none, or no unit."""
    unit = page.tags.get("ResolutionUnit")
    if not unit or unit.value not in (2, 3):  # inch, centimetre
        return None
    x, y = page.get_resolution(unit=3)
    return (10_000 / x, 10_000 / y) if x > 0 and y > 0 else None
