"""Which reader a plan gets: the stored tiles' where that is proven to give OpenSlide's bytes, else its."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import numpy as np

from client.reader_jpeg import JpegReader, NotDirect, stored_tiles
from client.reader_openslide import OpenSlideReader
from client.slide import Pixels
from client.tiling import TilePlan

log = logging.getLogger(__name__)

DIRECT, REFERENCE = "jpeg tiles", "openslide"
PROBES = 3  # tiles across the plan that both readers must agree on


class TileReader:
    """Reads a plan's regions; `name` is DIRECT or REFERENCE, `reason` says why it is not DIRECT.

    A region over a stored tile that was left out goes to OpenSlide too: the format says what is there.
    Damage is judged more strictly here than by OpenSlide, which shows some damaged tiles.

    Raises:
        SlideError: the slide cannot be opened.
    """

    def __init__(self, plan: TilePlan, start: int = 0) -> None:
        self.name, self.reason = REFERENCE, ""
        self._openslide = OpenSlideReader(plan)
        self._direct: JpegReader | None = None
        with ExitStack() as undo:
            undo.callback(self.close)
            try:
                self._direct = _proven(plan, self._openslide, start)
                self.name = DIRECT
            except NotDirect as error:
                self.reason = str(error)
            undo.pop_all()
        log.info("%s: tiles through %s%s", plan.path, self.name, self.reason and f" ({self.reason})")

    def read(self, index: int, out: Pixels) -> bool:
        """Fill `out` RGB uint8 [h, w, 3] (the plan's `read_size`); False where it cannot be decoded."""
        if self._direct is not None and self._direct.has(index):
            return self._direct.read(index, out)
        return self._openslide.read(index, out)

    def close(self) -> None:
        """Close the files; no thread may be reading."""
        self._openslide.close()
        if self._direct is not None:
            self._direct.close()


def _proven(plan: TilePlan, reference: OpenSlideReader, start: int) -> JpegReader:
    """The direct reader from tile `start` on, or NotDirect."""
    handle = reference.handle()
    stored = stored_tiles(
        plan.path, handle.properties["openslide.vendor"], handle.level_dimensions[plan.level]
    )
    if not _on_level_pixels(plan):
        raise NotDirect(
            f"OpenSlide interpolates level {plan.level}, which is 1/{plan.downsample:.6g} of level 0"
        )
    with ExitStack() as undo:
        direct = JpegReader(plan, stored)
        undo.callback(direct.close)
        ours, theirs = (np.empty((*plan.read_size[::-1], 3), np.uint8) for _ in range(2))
        compared = 0
        for index in _spread(start, len(plan)):
            if direct.has(index) and direct.read(index, ours) and reference.read(index, theirs):
                if not np.array_equal(ours, theirs):
                    raise NotDirect("its stored tiles don't give OpenSlide's pixels")
                compared += 1
        if not compared:
            raise NotDirect("no stored tile to compare with OpenSlide's")
        direct.expect(start)
        undo.pop_all()
    return direct


def _spread(start: int, end: int) -> list[int]:
    """PROBES of the indices from `start` to before `end`, both ends among them."""
    return (
        sorted({start + step * (end - 1 - start) // (PROBES - 1) for step in range(PROBES)})
        if start < end
        else []
    )


def _on_level_pixels(plan: TilePlan) -> bool:
    """Whether whole level-0 positions fall on whole pixels of the level; else OpenSlide interpolates."""
    positions = plan.level_positions()
    return bool(
        np.allclose(np.rint(positions * plan.downsample) / plan.downsample, positions, rtol=0, atol=1e-6)
    )
