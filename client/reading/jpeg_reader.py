"""Tiles of a tiled JPEG TIFF (Aperio SVS, generic TIFF) straight from the stored tiles, each decoded once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np

from ..arrays import Int64, Pixels
from ..slides.stored_tiles import StoredTiles
from ..slides.tiling import TilePlan
from .handle_reader import HandleReader

CACHE_BYTES = 256 << 20  # bytes of decoded tiles kept for the next rows; beyond it some are decoded again


class JpegReader:
    """Puts a plan's regions together from stored tiles, each region once.

    A stored tile is kept while regions from `start` on still need it, and no longer: `_uses` counts them.
    Regions over a stored tile that the scanner left out go to `fallback`, which `close` closes too. Damage is
    judged more strictly than by OpenSlide, which shows some damaged tiles.
    """

    name = "jpeg tiles"
    reason = ""

    def __init__(self, plan: TilePlan, stored: StoredTiles, fallback: HandleReader, start: int = 0) -> None:
        self._stored = stored
        self._fallback = fallback
        self._positions = plan.level_positions()
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
        x, y = self._positions[index].tolist()
        return self._stored.fill(out, (x, y), self._take)

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
            pixels = self._stored.decode(self._file, key)
        finally:
            mine.set_result(pixels)
        return pixels
