"""Where a tiled JPEG TIFF (Aperio SVS, generic TIFF) has the tiles of a level, and their pixels.

Most of the time that OpenSlide takes for a region is compositing, not JPEG decoding. In these two formats its
pixels are the stored tiles' own, so the same bytes can be read without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG

from ..arrays import Int64, Pixels
from ..errors import SlideError

OME_TIFF = "ome-tiff"  # what `ome_tiff` reads: unlike OpenSlide it never interpolates
ReadRegion = Callable[[tuple[int, int], tuple[int, int]], Pixels]
"""Gives the region at a corner (x, y) of a level, of a size (w, h): RGB uint8 [h, w, 3]."""
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


def find_tiles(page: tifffile.TiffPage, offsets: Int64, counts: Int64) -> StoredTiles | str:
    """A page's tiles, of which `offsets` and `counts` say where they lie, or why they can't be read here."""
    if page.compression != COMPRESSION.JPEG or page.bitspersample != 8:
        return "its tiles are not 8-bit JPEG"
    if page.photometric not in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR) or page.samplesperpixel != 3:
        return "its tiles are not RGB or YCbCr"
    if page.planarconfig != PLANARCONFIG.CONTIG:
        return "its channels are stored apart"
    # As in OpenSlide, TIFF's tag decides the colour space, not the stream: an Adobe marker states it.
    transform = bytes([page.photometric == PHOTOMETRIC.YCBCR])
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + transform
    tables = (page.jpegtables or b"")[2:-2]
    return StoredTiles(
        tile=(page.tilewidth, page.tilelength),
        size=(page.imagewidth, page.imagelength),
        offsets=offsets,
        counts=counts,
        prefix=b"\xff\xd8" + adobe + tables,
    )


class StoredLevel:
    """Any region of a level from its stored tiles, for many threads; each read decodes what it needs.

    `size` is the level's, (w, h).

    Raises:
        SlideError: the file cannot be opened any more.
    """

    def __init__(self, path: Path, stored: StoredTiles) -> None:
        self.size = stored.size
        self._stored = stored
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SlideError(
                f"{path}: cannot be read ({error.strerror}): check path and permissions"
            ) from None

    def read(self, corner: tuple[int, int], size: tuple[int, int]) -> Pixels | None:
        """RGB uint8 [h, w, 3] at `corner` (x, y) of the level; None where a tile is missing or damaged."""
        pixels = np.empty((*size[::-1], 3), np.uint8)
        whole = self._stored.fill(pixels, corner, partial(self._stored.decode, self._file))
        return pixels if whole else None

    def agrees(
        self, other: ReadRegion, corners: Iterable[tuple[int, int]], size: tuple[int, int]
    ) -> bool | None:
        """Whether regions are the same bytes through `other`; None if both can read none of them."""
        compared = []
        for corner in corners:
            try:
                reference = other(corner, size)
            except SlideError:
                continue
            if (pixels := self.read(corner, size)) is not None:
                compared.append(np.array_equal(pixels, reference))
        return all(compared) if compared else None

    def close(self) -> None:
        """Close the file; no thread may be reading."""
        os.close(self._file)
