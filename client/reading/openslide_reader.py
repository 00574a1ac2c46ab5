"""Tiles through OpenSlide: every format, and the reference for pixels."""

from __future__ import annotations

import numpy as np

from ..arrays import Pixels
from ..errors import SlideError
from ..slides.handles import Handles, SlideHandle
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
        self._handles = Handles(plan.path)

    def handle(self) -> SlideHandle:
        """This thread's handle.

        Raises:
            SlideError: the slide cannot be opened.
        """
        return self._handles.get()

    def read(self, index: int, out: Pixels) -> bool:
        """Fill `out` RGB uint8 [h, w, 3] with one region; False where it cannot be decoded.

        Raises:
            SlideError: the slide cannot be opened.
        """
        x, y = (int(v) for v in self._positions[index])
        self._handles.get()
        try:
            out[:] = self._handles.read((x, y), self._plan.level, self._plan.read_size)
        except SlideError:
            return False
        return True

    def close(self) -> None:
        """Close every handle; no thread may be reading."""
        self._handles.close()
