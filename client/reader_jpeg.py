"""Tiles of a tiled JPEG TIFF (Aperio SVS, generic TIFF) straight from the stored tiles, each decoded once.

OpenSlide's compositing, not JPEG decoding, is most of what a tile costs. In these two formats its pixels are
the stored tiles' own, so they can be had without it, byte for byte.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG

from client.slide import Pixels
from client.tiling import TilePlan

VENDORS = ("aperio", "generic-tiff")  # the others overlap their tiles, shift them or draw something beneath
BUDGET = 256 << 20  # bytes of decoded tiles kept for the next rows; beyond it some are decoded again


@dataclass(frozen=True, eq=False)
class StoredTiles:
    """Where one level's JPEG tiles lie in the file."""

    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    tile: tuple[int, int]
    size: tuple[int, int]  # the level's, pixels
    columns: int
    prefix: bytes  # what comes before a tile's own stream, in place of its first marker


class NotDirect(Exception):
    """Why a plan can't be read from the stored tiles; never leaves the readers."""


def stored_tiles(path: Path, vendor: str, size: tuple[int, int]) -> StoredTiles:
    """Find the tiles of the level that is `size` (w, h) large.

    Raises:
        NotDirect: they are not of a kind that this reader knows.
    """
    if vendor not in VENDORS:
        raise NotDirect(f"OpenSlide composes {vendor} slides")
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page.aspage() for page in file.pages]
            tiled = [page for page in pages if page.is_tiled and (page.imagewidth, page.imagelength) == size]
            if len(tiled) != 1:
                raise NotDirect(f"{len(tiled)} TIFF pages match the level")
            return _layout(tiled[0])
    except (tifffile.TiffFileError, OSError, ValueError, LookupError) as error:
        raise NotDirect(f"tifffile: {error}") from error


def _layout(page: tifffile.TiffPage) -> StoredTiles:
    if page.compression != COMPRESSION.JPEG or page.bitspersample != 8:
        raise NotDirect("its tiles are not 8-bit JPEG")
    if page.photometric not in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR) or page.samplesperpixel != 3:
        raise NotDirect("its tiles are not RGB or YCbCr")
    if page.planarconfig != PLANARCONFIG.CONTIG:
        raise NotDirect("its channels are stored apart")
    # TIFF's word on the colour space goes before a guess from the stream, as in OpenSlide: a marker tells it.
    transform = bytes([page.photometric == PHOTOMETRIC.YCBCR])
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + transform
    tables = (page.jpegtables or b"")[2:-2]
    tile = (page.tilewidth, page.tilelength)
    counts = np.array(page.databytecounts, np.int64)
    counts[counts > 4 * 3 * tile[0] * tile[1]] = 0  # no JPEG is that long: damaged, and not worth the memory
    return StoredTiles(
        offsets=np.array(page.dataoffsets, np.int64),
        counts=counts,
        tile=tile,
        size=(page.imagewidth, page.imagelength),
        columns=-(-page.imagewidth // tile[0]),
        prefix=b"\xff\xd8" + adobe + tables,
    )


class JpegReader:
    """Puts the plan's regions together from stored tiles; shared by all threads.

    A stored tile is kept as long as regions still to come need it, and no longer: `uses` counts them.
    """

    def __init__(self, plan: TilePlan, stored: StoredTiles) -> None:
        self._stored = stored
        self._positions = plan.level_positions()
        self._read_size = plan.read_size
        self._uses = np.zeros(len(stored.offsets), np.int32)
        self._kept: dict[int, Future[Pixels | None]] = {}
        self._room = BUDGET // (3 * stored.tile[0] * stored.tile[1])
        self._lock = threading.Lock()
        self._file = os.open(plan.path, os.O_RDONLY)

    def expect(self, start: int) -> None:
        """Count how often each stored tile is needed from tile `start` on; until then none is kept."""
        first, last = self._span(self._positions[start:])
        for dy in range(int((last - first)[:, 1].max(initial=-1)) + 1):
            for dx in range(int((last - first)[:, 0].max(initial=-1)) + 1):
                cell = first + np.array((dx, dy))
                cell = cell[(cell <= last).all(axis=1)]
                np.add.at(self._uses, cell[:, 1] * self._stored.columns + cell[:, 0], 1)

    def read(self, index: int, out: Pixels) -> bool:
        """Fill `out` RGB uint8 [h, w, 3] with one region; False where a stored tile is missing or damaged."""
        (width, height), (tile_width, tile_height) = self._stored.size, self._stored.tile
        x, y = (int(v) for v in self._positions[index])
        right, bottom = min(x + self._read_size[0], width), min(y + self._read_size[1], height)
        if right - x < self._read_size[0] or bottom - y < self._read_size[1] or min(x, y) < 0:
            out[:] = 255
        first, last = self._span(self._positions[index])
        complete = True
        for row in range(first[1], last[1] + 1):
            top = row * tile_height
            y0, y1 = max(y, top), min(bottom, top + tile_height)
            for column in range(first[0], last[0] + 1):
                pixels = self._take(row * self._stored.columns + column)
                if pixels is None:
                    complete = False
                    continue
                left = column * tile_width
                x0, x1 = max(x, left), min(right, left + tile_width)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        return complete

    def close(self) -> None:
        """Close the file; no thread may be reading."""
        os.close(self._file)

    def _span(self, position: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First and last stored tile (column, row) under regions at `position` [..., 2]."""
        size, tile = np.array(self._stored.size), np.array(self._stored.tile)
        end = np.minimum(position + np.array(self._read_size), size)
        return np.maximum(position, 0) // tile, (end - 1) // tile

    def _take(self, key: int) -> Pixels | None:
        with self._lock:
            self._uses[key] -= 1
            again = self._uses[key] > 0
            kept = self._kept.get(key) if again else self._kept.pop(key, None)
            if kept is None and again and len(self._kept) < self._room:
                mine = self._kept[key] = Future()
            else:
                mine = None
        if kept is not None:
            return kept.result()  # its decoder never waits for anybody, so this ends
        pixels = self._decode(key)
        if mine is not None:
            mine.set_result(pixels)
        return pixels

    def _decode(self, key: int) -> Pixels | None:
        """A stored tile's pixels, or None where OpenSlide has to say what to make of it."""
        count = int(self._stored.counts[key])
        if count < 4:
            return None
        try:
            data = os.pread(self._file, count, int(self._stored.offsets[key]))
            pixels: Pixels = simplejpeg.decode_jpeg(self._stored.prefix + data[2:], "RGB", strict=True)
        except (OSError, ValueError):
            return None
        return pixels if pixels.shape[:2] == self._stored.tile[::-1] else None
