"""Regions of a slide's level, the fastest way that gives OpenSlide's bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..arrays import Pixels
from ..errors import SlideError
from .handles import Handles
from .levels import SPOT, spots
from .stored_tiles import OME_TIFF, DirectReadUnsupported, StoredLevel

WORTHWHILE = 512 * 512  # pixels of a level from which on comparing some spots takes less time than it saves


class LevelRegions:
    """Regions of one level for many threads, from its stored tiles where these give OpenSlide's bytes."""

    def __init__(self, path: Path, vendor: str, level: int, size: tuple[int, int], downsample: float) -> None:
        self._level, self._downsample = level, downsample
        self._handles = Handles(path)
        self._direct: StoredLevel | None = None
        if vendor != OME_TIFF and (not downsample.is_integer() or size[0] * size[1] < WORTHWHILE):
            return  # OpenSlide interpolates between the level's pixels, or reads it sooner than we compare
        try:
            direct = StoredLevel(path, vendor, size)
        except DirectReadUnsupported:
            return
        if self._agrees(direct):
            self._direct = direct
        else:
            direct.close()

    def check(self) -> None:
        """Open this thread's OpenSlide.

        Raises:
            SlideError: the slide cannot be opened.
        """
        self._handles.get()

    def read(self, corner: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """RGB uint8 [h, w, 3] of a region at `corner` (x, y), both in pixels of the level.

        Raises:
            SlideError: it cannot be decoded.
        """
        if self._direct and (pixels := self._direct.read(corner, size)) is not None:
            return pixels
        position = (round(corner[0] * self._downsample), round(corner[1] * self._downsample))
        return self._handles.read(position, self._level, size)

    def close(self) -> None:
        """Close the files; no thread may be reading."""
        if self._direct:
            self._direct.close()
        self._handles.close()

    def _agrees(self, direct: StoredLevel) -> bool:
        """Whether some spots are the same bytes through OpenSlide; those that can't be read don't count."""
        compared = []
        for corner in spots(direct.stored.size):
            try:
                reference = self.read(corner, (SPOT, SPOT))
            except SlideError:
                continue
            if (pixels := direct.read(corner, (SPOT, SPOT))) is not None:
                compared.append(np.array_equal(pixels, reference))
        return bool(compared) and all(compared)
