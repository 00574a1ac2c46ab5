"""Tiles through OpenSlide, or another library where it reads the format: the reference for pixels."""

from __future__ import annotations

from ..arrays import Pixels
from ..errors import SlideError
from ..slides.handles import RegionReaders, SlideHandle
from ..slides.regions import LevelRegions
from ..slides.slide_file import OPENSLIDE
from ..slides.tiling import TilePlan


class HandleReader:
    """Reads a plan's regions with one handle per thread; a handle that met an error is replaced.

    OpenSlide's handle refuses everything after one failed read, so a shared one would fail good tiles too.
    `name` is the library's, `reason` says why no faster reader was taken; `level` gives any region.
    """

    def __init__(self, plan: TilePlan) -> None:
        self.name, self.reason = OPENSLIDE, ""
        self._corners, self._size = plan.level_positions(), plan.read_size
        self._readers = RegionReaders(plan.file)
        self.level = LevelRegions(self._readers, plan.level, plan.downsample)

    def handle(self) -> SlideHandle:
        """This thread's handle.

        Raises:
            SlideError: the slide cannot be opened.
        """
        return self._readers.handle()

    def read(self, index: int, out: Pixels) -> bool:
        """Fill `out` RGB uint8 [h, w, 3] with one region; False where it cannot be decoded.

        Raises:
            SlideError: the slide cannot be opened.
        """
        self.handle()
        x, y = self._corners[index].tolist()
        try:
            out[:] = self.level.read((x, y), self._size)
        except SlideError:
            return False
        return True

    def close(self) -> None:
        """Close every handle; no thread may be reading."""
        self._readers.close()
