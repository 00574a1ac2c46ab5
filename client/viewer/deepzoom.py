"""A slide as Deep Zoom tiles: JPEG squares of levels that halve, down to one pixel."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator

import numpy as np
import simplejpeg

from ..arrays import Pixels
from ..reading.stream import resize
from ..slides.address import RemotePath
from ..slides.overview import Overview
from ..slides.slide import ROUNDING, Slide
from ..slides.stored_tiles import StoredTiles

TILE = 256
QUALITY = 85
SHRINK = 4
"""Levels that are coarser than the slide's own by more than this come from an overview of the slide ..."""
OVERVIEW_PX = 4096  # ... whose longer side is at most this


class DeepZoom:
    """The tiles of an open slide; used by any number of threads.

    A stored JPEG tile is passed on as it is where the slide has a level of the same downsample whose tiles
    lie on Deep Zoom's grid; what is left, and a slide on a server, is read and encoded.

    Attributes:
        slide: the open slide.
        tile: side of a tile in px, the stored tiles' own where they are square.
        levels: number of levels; the last one is level 0 of the slide.
    """

    def __init__(self, slide: Slide) -> None:
        self.slide = slide
        self.levels = math.ceil(math.log2(max(slide.dimensions))) + 1
        remote = isinstance(slide.path, RemotePath)
        self._file = None if remote else os.open(slide.path, os.O_RDONLY)
        self._lock = threading.Lock()
        self._overview: Overview | None = None
        factors = [2**n for n in range(self.levels) if max(slide.dimensions) <= OVERVIEW_PX * 2**n]
        self._overview_factor = next((f for f in factors if self._source(f)[1] > SHRINK), 2**self.levels)
        finest = self._stored_level(1)
        square = finest is not None and finest.tile[0] == finest.tile[1]
        self.tile = finest.tile[0] if finest and square else TILE
        found = ((level, self._stored_level(self.downsample(level))) for level in range(self.levels))
        self._stored = {
            level: stored
            for level, stored in found
            if stored is not None and stored.tile == (self.tile, self.tile)
        }

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def downsample(self, level: int) -> int:
        """Level-0 pixels per pixel of a level."""
        return int(2 ** (self.levels - 1 - level))

    def size(self, level: int) -> tuple[int, int]:
        """Width and height of a level in px."""
        factor = self.downsample(level)
        return math.ceil(self.slide.dimensions[0] / factor), math.ceil(self.slide.dimensions[1] / factor)

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Level, column and row of every tile, the coarsest level first."""
        for level in range(self.levels):
            columns, rows = (math.ceil(side / self.tile) for side in self.size(level))
            yield from ((level, column, row) for row in range(rows) for column in range(columns))

    def read(self, level: int, column: int, row: int) -> bytes | None:
        """One tile as JPEG; None where there is no such tile.

        Raises:
            SlideError: it cannot be decoded.
        """
        if not 0 <= level < self.levels or min(column, row) < 0:
            return None
        x, y, (width, height) = column * self.tile, row * self.tile, self.size(level)
        if x >= width or y >= height:
            return None
        size = min(self.tile, width - x), min(self.tile, height - y)
        return self._stored_jpeg(level, column, row) or encode_jpeg(self._shrunk(level, (x, y), size))

    def _stored_jpeg(self, level: int, column: int, row: int) -> bytes | None:
        """The stored tile, None where there is none or it reaches over the slide's edge."""
        stored = self._stored.get(level)
        if stored is None or self._file is None:
            return None
        width, height = (min(pair) for pair in zip(stored.size, self.size(level), strict=True))
        if (column + 1) * self.tile > width or (row + 1) * self.tile > height:
            return None
        key = row * stored.columns + column
        return stored.jpeg(self._file, key)

    def _shrunk(self, level: int, corner: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """RGB uint8 [h, w, 3] of the tile at `corner` (x, y), of `size` (w, h) in pixels of `level`."""
        factor = self.downsample(level)
        source, ratio = self._source(factor)
        if factor >= self._overview_factor:
            overview = self._coarse()
            ratio = factor / overview.downsample[0]
            left, top = (round(side * ratio) for side in corner)
            width, height = (max(1, round(side * ratio)) for side in size)
            part = overview.pixels[top : top + height, left : left + width]
            pixels = np.full((height, width, 3), 255, np.uint8)  # beyond the edge, as OpenSlide has it
            pixels[: part.shape[0], : part.shape[1]] = part
        else:
            region = (max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio)))
            with self._lock:
                pixels = self.slide.read(source, (corner[0] * factor, corner[1] * factor), region)
        return resize(pixels, size)

    def _source(self, factor: int) -> tuple[int, float]:
        """The slide's level to shrink a level of this downsample from, and by how much."""
        level = self.slide.level_for(factor * ROUNDING)
        return level, factor / self.slide.level_downsamples[level]

    def _coarse(self) -> Overview:
        """The slide shrunk, once, to the finest level that comes from it."""
        with self._lock:
            if self._overview is None:
                self._overview = self.slide.overview(self._overview_factor)
            return self._overview

    def _stored_level(self, downsample: int) -> StoredTiles | None:
        """The stored JPEG tiles of the slide's level of this downsample, None where it has none."""
        level, ratio = self._source(downsample)
        if not 1 / ROUNDING <= ratio <= ROUNDING:
            return None
        stored = self.slide.stored_tiles(level)
        return stored if isinstance(stored, StoredTiles) else None


def encode_jpeg(pixels: Pixels) -> bytes:
    """RGB uint8 [h, w, 3] as JPEG."""
    data: bytes = simplejpeg.encode_jpeg(pixels.copy(order="C"), quality=QUALITY, colorspace="RGB")
    return data
