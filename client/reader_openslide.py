"""Tiles through OpenSlide: every format, and the reference for pixels."""

from __future__ import annotations

import threading

import numpy as np
import openslide

from client.errors import SlideError
from client.slide import Pixels, open_handle, read_region
from client.tiling import TilePlan


class OpenSlideReader:
    """Reads the plan's regions with one OpenSlide handle a thread; a handle that met an error is replaced.

    OpenSlide's handle refuses everything after one failed read, so a shared one would take good tiles along.
    """

    def __init__(self, plan: TilePlan) -> None:
        self._plan = plan
        self._positions = np.rint(plan.level_positions() * plan.downsample).astype(np.int64)
        self._handles: dict[int, openslide.OpenSlide] = {}
        self._lock = threading.Lock()
        open_handle(
            plan.path
        ).close()  # a slide that's gone is an error now, not a plan full of invalid tiles

    def read(self, index: int) -> Pixels:
        """RGB uint8 [h, w, 3] of the plan's `read_size` for one tile.

        Raises:
            SlideError: it cannot be decoded.
        """
        thread = threading.get_ident()
        handle = self._handles.get(thread)
        if handle is None:
            handle = open_handle(self._plan.path)
            with self._lock:
                self._handles[thread] = handle
        x, y = self._positions[index]
        try:
            return read_region(handle, (int(x), int(y)), self._plan.level, self._plan.read_size)
        except SlideError:
            with self._lock:
                del self._handles[thread]
            handle.close()
            raise

    def close(self) -> None:
        """Close every handle; no thread may be reading."""
        while self._handles:
            self._handles.popitem()[1].close()
