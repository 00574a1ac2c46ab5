"""Tiles through OpenSlide: every format, and the reference for pixels."""

from __future__ import annotations

import threading

import numpy as np
import openslide

from ..arrays import Pixels
from ..errors import SlideError
from ..slides.slide import open_handle, read_region
from ..slides.tiling import TilePlan


class OpenSlideReader:
    """Reads a plan's regions with one OpenSlide handle per thread; a handle that met an error is replaced.

    OpenSlide's handle refuses everything after one failed read, so a shared one would fail good tiles too.
    `reason` says why no faster reader was taken.
    """

    name = "openslide"

    def __init__(self, plan: TilePlan, reason: str = "") -> None:
        self.reason = reason
        self._plan = plan
        self._positions = np.rint(plan.level_positions() * plan.downsample).astype(np.int64)
        self._handles: dict[int, openslide.OpenSlide] = {}
        self._lock = threading.Lock()

    def handle(self) -> openslide.OpenSlide:
        """This thread's OpenSlide.

        Raises:
            SlideError: the slide cannot be opened.
        """
        thread = threading.get_ident()
        if thread not in self._handles:
            handle = open_handle(self._plan.path)
            with self._lock:
                self._handles[thread] = handle
        return self._handles[thread]

    def read(self, index: int, out: Pixels) -> bool:
        """Fill `out` RGB uint8 [h, w, 3] with one region; False where it cannot be decoded.

        Raises:
            SlideError: the slide cannot be opened.
        """
        x, y = (int(v) for v in self._positions[index])
        handle = self.handle()
        try:
            out[:] = read_region(handle, (x, y), self._plan.level, self._plan.read_size)
        except SlideError:
            with self._lock:
                del self._handles[threading.get_ident()]
            handle.close()
            return False
        return True

    def close(self) -> None:
        """Close every handle; no thread may be reading."""
        while self._handles:
            self._handles.popitem()[1].close()
