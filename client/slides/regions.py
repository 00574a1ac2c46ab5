"""Regions of a slide's level, the fastest way that gives OpenSlide's bytes."""

from __future__ import annotations

from ..arrays import Pixels
from .handles import RegionReader, RegionReaders
from .levels import SPOT, spots
from .stored_tiles import StoredLevel

WORTHWHILE = 512 * 512  # pixels of a level from which on comparing some spots takes less time than it saves


class LevelRegions:
    """Regions of one level, from its stored tiles (`direct`) where they can be decoded, else by `reader`.

    As many threads may read as may use the reader, which is not closed.
    """

    def __init__(
        self,
        reader: RegionReader | RegionReaders,
        level: int,
        downsample: float,
        direct: StoredLevel | None = None,
    ) -> None:
        self.reader, self._level, self._downsample, self._direct = reader, level, downsample, direct

    def drop_other_pixels(self, *, interpolates: bool) -> None:
        """Read stored tiles from now on only if some spots are the same bytes by the reader.

        `interpolates`: the reader does, where the level's pixels lie between those of level 0.
        """
        if self._direct is None:
            return
        width, height = self._direct.size
        other = interpolates and (not self._downsample.is_integer() or width * height < WORTHWHILE)
        if other or not self._direct.agrees(self._by_reader, spots(self._direct.size), (SPOT, SPOT)):
            self.close()

    def read(self, corner: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """RGB uint8 [h, w, 3] of a region at `corner` (x, y), both in pixels of the level.

        Raises:
            SlideError: it cannot be decoded.
        """
        if self._direct and (pixels := self._direct.read(corner, size)) is not None:
            return pixels
        return self._by_reader(corner, size)

    def close(self) -> None:
        """Close the file of the stored tiles; no thread may be reading."""
        if self._direct:
            self._direct.close()
            self._direct = None

    def _by_reader(self, corner: tuple[int, int], size: tuple[int, int]) -> Pixels:
        position = (round(corner[0] * self._downsample), round(corner[1] * self._downsample))
        return self.reader.read(position, self._level, size)
