"""Where a tiled JPEG TIFF (Aperio SVS, generic TIFF) has the tiles of a level, and their pixels.

Most of the time that OpenSlide takes for a region is compositing, not JPEG decoding. In these two formats its
pixels are the stored tiles' own, so the same bytes can be read without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG

from ..arrays import Int64, Pixels
from .address import RemotePath
from .tiff import all_pages

OME_TIFF = "ome-tiff"  # what `ome_tiff` reads: unlike OpenSlide it never interpolates
VENDORS = ("aperio", "generic-tiff", OME_TIFF)  # others overlap their tiles, shift them or draw beneath them


@dataclass(frozen=True, eq=False)
class TileGrid:
    """How a level is cut into tiles; pairs are (x, y) in its pixels."""

    tile: tuple[int, int]
    size: tuple[int, int]

    @property
    def columns(self) -> int:
        """Tiles in a row."""
        return -(-self.size[0] // self.tile[0])

    def fill(self, out: Pixels, position: tuple[int, int], take: Callable[[int], Pixels | None]) -> bool:
        """Fill `out` RGB uint8 [h, w, 3] from `position` (x, y) of the level on, white beyond its edge.

        `take` gives the pixels of each tile that is needed, once; False if it has one of them not.
        """
        (x, y), (width, height), (tile_width, tile_height) = position, self.size, self.tile
        right, bottom = min(x + out.shape[1], width), min(y + out.shape[0], height)
        if min(x, y) < 0 or (bottom - y, right - x) != out.shape[:2]:
            out[:] = 255
        complete = True
        for row in range(max(0, y) // tile_height, -(-bottom // tile_height)):
            top = row * tile_height
            y0, y1 = max(y, top), min(bottom, top + tile_height)
            for column in range(max(0, x) // tile_width, -(-right // tile_width)):
                left = column * tile_width
                x0, x1 = max(x, left), min(right, left + tile_width)
                pixels = take(row * self.columns + column)
                if pixels is None:
                    complete = False  # but take the others, whose uses may be counted
                else:
                    out[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        return complete


@dataclass(frozen=True, eq=False)
class StoredTiles(TileGrid):
    """Where one level's JPEG tiles lie in the file."""

    offsets: Int64
    counts: Int64
    prefix: bytes  # what comes before a tile's own stream, in place of its first marker

    def jpeg(self, file: int, key: int) -> bytes | None:
        """The stream of tile `key` from an open file; None where it is missing or longer than any JPEG is."""
        count = int(self.counts[key])
        if not 0 < count <= 12 * self.tile[0] * self.tile[1]:
            return None
        return self.prefix + os.pread(file, count, int(self.offsets[key]))[2:]

    def decode(self, file: int, key: int) -> Pixels | None:
        """The pixels of tile `key` from an open file; None where it is missing or damaged in the least.

        OpenSlide shows some streams that are well formed and wrong, half of them zeros for example.
        """
        width, height = self.tile
        try:
            data = self.jpeg(file, key)
            pixels: Pixels | None = simplejpeg.decode_jpeg(data, "RGB", strict=True) if data else None
        except (OSError, ValueError):
            return None
        return pixels if pixels is not None and pixels.shape == (height, width, 3) else None


class DirectReadUnsupported(Exception):
    """Why a level can't be read from the stored tiles; caught where OpenSlide can be used instead."""


def stored_tiles(path: Path, vendor: str, size: tuple[int, int]) -> StoredTiles:
    """Find the tiles of the level that is `size` (w, h) large.

    Raises:
        DirectReadUnsupported: they are not of a kind that this reader knows.
    """
    if isinstance(path, RemotePath):
        raise DirectReadUnsupported("it is on a server")
    if vendor not in VENDORS:
        raise DirectReadUnsupported(f"regions of {vendor} slides are composed")
    try:
        with tifffile.TiffFile(path) as file:
            pages = all_pages(file)
            tiled = [page for page in pages if page.is_tiled and (page.imagewidth, page.imagelength) == size]
            if len(tiled) != 1:
                raise DirectReadUnsupported(f"{len(tiled)} TIFF pages match the level")
            return _layout(tiled[0])
    except (tifffile.TiffFileError, OSError, ValueError, LookupError) as error:
        raise DirectReadUnsupported(f"tifffile: {error}") from error


def _layout(page: tifffile.TiffPage) -> StoredTiles:
    if page.compression != COMPRESSION.JPEG or page.bitspersample != 8:
        raise DirectReadUnsupported("its tiles are not 8-bit JPEG")
    if page.photometric not in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR) or page.samplesperpixel != 3:
        raise DirectReadUnsupported("its tiles are not RGB or YCbCr")
    if page.planarconfig != PLANARCONFIG.CONTIG:
        raise DirectReadUnsupported("its channels are stored apart")
    # As in OpenSlide, TIFF's tag decides the colour space, not the stream: an Adobe marker states it.
    transform = bytes([page.photometric == PHOTOMETRIC.YCBCR])
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + transform
    tables = (page.jpegtables or b"")[2:-2]
    tile = (page.tilewidth, page.tilelength)
    return StoredTiles(
        offsets=np.array(page.dataoffsets, np.int64),
        counts=np.array(page.databytecounts, np.int64),
        tile=tile,
        size=(page.imagewidth, page.imagelength),
        prefix=b"\xff\xd8" + adobe + tables,
    )


class StoredLevel:
    """Any region of a level from its stored tiles, for many threads; each read decodes what it needs.

    Raises:
        DirectReadUnsupported: see `stored_tiles`.
    """

    def __init__(self, path: Path, vendor: str, size: tuple[int, int]) -> None:
        self.stored = stored_tiles(path, vendor, size)
        self._file = os.open(path, os.O_RDONLY)

    def read(self, corner: tuple[int, int], size: tuple[int, int]) -> Pixels | None:
        """RGB uint8 [h, w, 3] at `corner` (x, y) of the level; None where a tile is missing or damaged."""
        pixels = np.empty((*size[::-1], 3), np.uint8)
        whole = self.stored.fill(pixels, corner, partial(self.stored.decode, self._file))
        return pixels if whole else None

    def close(self) -> None:
        """Close the file; no thread may be reading."""
        os.close(self._file)
