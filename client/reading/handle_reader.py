"""Tiles through OpenSlide, or another library where it reads the format: the reference for pixels."""

from __future__ import annotations

import numpy as np

from ..arrays import Pixels
from ..errors import SlideError
from ..slides.handles import Handles, SlideHandle
from ..slides.slide_file import OPENSLIDE
from ..slides.tiling import TilePlan


class HandleReader:
    """Reads a plan's regions with one handle per thread; a handle that met an error is replaced.

    OpenSlide's handle refuses everything after one failed read, so a shared one would fail good tiles too.
    `name` is the library's, `reason` says why no faster reader was taken.
    """

    def __init__(self, plan: TilePlan, name: str = OPENSLIDE, reason: str = "") -> None:
        self.name = name
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
