"""A slide made small, block by block."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass

import cv2
import numpy as np

from ..arrays import Bool, Pixels
from ..errors import SlideError
from .handles import RegionReaders
from .regions import LevelRegions
from .slide_file import SlideFile

BLOCK = 2048  # side in pixels of what is read at once ...
FINEST_BLOCK = 256  # ... and of the smallest part that is tried where a block cannot be decoded
MOST_THREADS = 8
MAX_FAILURES = 300  # failed reads; beyond it the slide counts as damaged

Block = tuple[int, int, int, int]
"""Top, left, rows and columns in pixels of the overview."""


@dataclass(frozen=True, eq=False)
class Overview:
    """A whole slide made small: RGB uint8 [h, w, 3]; a pixel is `downsample` (x, y) level-0 pixels wide.

    Where `unreadable` bool [h, w], the slide could not be decoded and the pixels are white.
    """

    pixels: Pixels
    downsample: tuple[float, float]
    unreadable: Bool


class OverviewReader:
    """Makes a level of `size` (width, height) small: each `factor` x `factor` pixels averaged into one."""

    def __init__(self, file: SlideFile, regions: LevelRegions, size: tuple[int, int], factor: int) -> None:
        self._file, self._regions, self._factor = file, regions, factor
        width, height = (math.ceil(side / factor) for side in size)
        self._pixels = np.full((height, width, 3), 255, np.uint8)
        self._unreadable = np.zeros((height, width), np.bool_)
        self._failures: list[str] = []

    def read(self, downsample: float) -> Overview:
        """The overview; `downsample` is the level's.

        Raises:
            SlideError: the slide cannot be opened, or too much of it cannot be decoded.
        """
        blocks = self._blocks()
        count = min(len(blocks), os.cpu_count() or 1, MOST_THREADS)
        with ExitStack() as opened:
            if count == 1:
                for block in blocks:
                    self._fill(block)
            else:
                self._regions.reader = opened.enter_context(closing(RegionReaders(self._file)))
                threads = ThreadPoolExecutor(count, "overview")
                opened.callback(threads.shutdown, cancel_futures=True)
                for _ in threads.map(self._fill, blocks):
                    pass
        side = self._factor * downsample
        return Overview(self._pixels, (side, side), self._unreadable)

    def _blocks(self) -> list[Block]:
        height, width = self._unreadable.shape
        side = max(1, BLOCK // self._factor)
        return [
            (top, left, min(side, height - top), min(side, width - left))
            for top in range(0, height, side)
            for left in range(0, width, side)
        ]

    def _fill(self, block: Block) -> None:
        """Read a block; one that cannot be decoded is bisected until its unreadable part is small."""
        factor, (top, left, rows, columns) = self._factor, block
        part = slice(top, top + rows), slice(left, left + columns)
        try:
            region = self._regions.read((left * factor, top * factor), (columns * factor, rows * factor))
        except SlideError as error:
            self._regions.reader.handle()  # raises where it is the slide that cannot be opened
            self._failures.append(str(error))
            if len(self._failures) > MAX_FAILURES:
                raise SlideError(f"{self._file.path}: {error}: copy the slide again") from None
            if max(rows, columns) * factor > FINEST_BLOCK and max(rows, columns) > 1:
                for half in _bisected(block):  # the damage may be small
                    self._fill(half)
            else:
                self._unreadable[part] = True
        else:
            self._pixels[part] = cv2.resize(region, (columns, rows), interpolation=cv2.INTER_AREA)


def _bisected(block: Block) -> list[Block]:
    """Two halves of a block, across its longer side."""
    top, left, rows, columns = block
    if rows >= columns:
        half = rows // 2
        return [(top, left, half, columns), (top + half, left, rows - half, columns)]
    half = columns // 2
    return [(top, left, rows, half), (top, left + half, rows, columns - half)]
