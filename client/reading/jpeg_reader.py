"""Tiles of a tiled JPEG TIFF (Aperio SVS, generic TIFF) straight from the stored tiles, each decoded once.

Most of the time that OpenSlide takes for a tile is compositing, not JPEG decoding. In these two formats its
pixels are the stored tiles' own, so the same bytes can be read without it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG

from ..arrays import Int64, Pixels
from ..slides.tiling import TilePlan
from .openslide_reader import OpenSlideReader

VENDORS = ("aperio", "generic-tiff")  # the others overlap their tiles, shift them or draw something beneath
CACHE_BYTES = 256 << 20  # bytes of decoded tiles kept for the next rows; beyond it some are decoded again


@dataclass(frozen=True, eq=False)
class StoredTiles:
    """Where one level's JPEG tiles lie in the file."""

    offsets: Int64
    counts: Int64
    tile: tuple[int, int]
    size: tuple[int, int]  # the level's, pixels
    columns: int
    prefix: bytes  # what comes before a tile's own stream, in place of its first marker

    def jpeg(self, file: int, key: int) -> bytes | None:
        """The stream of tile `key` from an open file; None where it claims more bytes than a tile has."""
        count = int(self.counts[key])
        if count > 12 * self.tile[0] * self.tile[1]:
            return None  # no JPEG is that long, and it would not be worth the memory
        return self.prefix + os.pread(file, count, int(self.offsets[key]))[2:]


class DirectReadUnsupported(Exception):
    """Why a plan can't be read from the stored tiles; `tile_reader.open_reader` catches it."""


def stored_tiles(path: Path, vendor: str, size: tuple[int, int]) -> StoredTiles:
    """Find the tiles of the level that is `size` (w, h) large.

    Raises:
        DirectReadUnsupported: they are not of a kind that this reader knows.
    """
    if vendor not in VENDORS:
        raise DirectReadUnsupported(f"OpenSlide composes {vendor} slides")
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page.aspage() for page in file.pages]
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
        columns=-(-page.imagewidth // tile[0]),
        prefix=b"\xff\xd8" + adobe + tables,
    )


class JpegReader:
    """Puts a plan's regions together from stored tiles, each region once.

    A stored tile is kept while regions from `start` on still need it, and no longer: `_uses` counts them.
    Regions over a stored tile that the scanner left out go to `fallback`, which `close` closes too. Damage is
    judged more strictly than by OpenSlide, which shows some damaged tiles.
    """

    name = "jpeg tiles"
    reason = ""

    def __init__(
        self, plan: TilePlan, stored: StoredTiles, fallback: OpenSlideReader, start: int = 0
    ) -> None:
        self._stored = stored
        self._fallback = fallback
        self._positions = plan.level_positions()
        self._read_size = plan.read_size
        end = np.minimum(self._positions + np.array(plan.read_size), np.array(stored.size))
        # The stored tile (column, row) under each region's first and last pixel.
        self._first = self._positions // np.array(stored.tile)
        self._last = (end - 1) // np.array(stored.tile)
        under = list(self._stored_under(start))
        self._covered = np.ones(len(plan), np.bool_)
        for regions, keys in under:
            self._covered[regions] &= stored.counts[keys] > 0
        self._uses = np.zeros(len(stored.counts), np.int32)
        for regions, keys in under:
            np.add.at(self._uses, keys[self._covered[regions]], 1)
        self._kept: dict[int, Future[Pixels | None]] = {}
        self._room = CACHE_BYTES // (3 * stored.tile[0] * stored.tile[1])
        self._lock = threading.Lock()
        self._file = os.open(plan.path, os.O_RDONLY)

    def covers(self, index: int) -> bool:
        """Whether every stored tile under a region is in the file; scanners leave empty ones out."""
        return bool(self._covered[index])

    def read(self, index: int, out: Pixels) -> bool:
        """Fill `out` RGB uint8 [h, w, 3] with one region; False where a stored tile is damaged."""
        if not self.covers(index):
            return self._fallback.read(index, out)
        (width, height), (tile_width, tile_height) = self._stored.size, self._stored.tile
        x, y = self._positions[index].tolist()
        right, bottom = min(x + self._read_size[0], width), min(y + self._read_size[1], height)
        if (right - x, bottom - y) != self._read_size:
            out[:] = 255  # beyond the edge
        (column0, row0), (column1, row1) = self._first[index].tolist(), self._last[index].tolist()
        complete = True
        for row in range(row0, row1 + 1):
            top = row * tile_height
            y0, y1 = max(y, top), min(bottom, top + tile_height)
            for column in range(column0, column1 + 1):
                left = column * tile_width
                x0, x1 = max(x, left), min(right, left + tile_width)
                pixels = self._take(row * self._stored.columns + column)
                if pixels is None:
                    complete = False  # but take the others, whose uses are counted
                else:
                    out[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        return complete

    def close(self) -> None:
        """Close the files; no thread may be reading."""
        os.close(self._file)
        self._fallback.close()

    def _stored_under(self, start: int) -> Iterator[tuple[Int64, Int64]]:
        """Every pair of a region from `start` on and a stored tile under it, as indices of both."""
        span = self._last[start:] - self._first[start:]
        for dx in range(int(span[:, 0].max(initial=-1)) + 1):
            for dy in range(int(span[:, 1].max(initial=-1)) + 1):
                regions = start + np.flatnonzero((span[:, 0] >= dx) & (span[:, 1] >= dy))
                column, row = (self._first[regions] + np.array((dx, dy))).T
                yield regions, row * self._stored.columns + column

    def _take(self, key: int) -> Pixels | None:
        with self._lock:
            self._uses[key] -= 1
            needed_later = self._uses[key] > 0
            kept = self._kept.get(key) if needed_later else self._kept.pop(key, None)
            if kept is None:
                mine: Future[Pixels | None] = Future()
                if needed_later and len(self._kept) < self._room:
                    self._kept[key] = mine
        if kept is not None:
            return kept.result()  # whoever decodes it waits for nobody, so this ends
        pixels = None
        try:
            pixels = self._decode(key)
        finally:
            mine.set_result(pixels)
        return pixels

    def _decode(self, key: int) -> Pixels | None:
        """A stored tile's pixels, or None where it is damaged in the least.

        OpenSlide shows some streams that are well formed and wrong, half of them zeros for example.
        """
        width, height = self._stored.tile
        try:
            data = self._stored.jpeg(self._file, key)
            pixels: Pixels | None = simplejpeg.decode_jpeg(data, "RGB", strict=True) if data else None
        except (OSError, ValueError):
            return None
        return pixels if pixels is not None and pixels.shape == (height, width, 3) else None
