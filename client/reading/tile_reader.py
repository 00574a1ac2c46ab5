"""Which reader a plan gets: the stored tiles' where that is proven to give OpenSlide's bytes, else its."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace

import numpy as np

from ..arrays import Pixels
from ..slides.tiling import TilePlan
from .jpeg_reader import JpegReader, NotDirect, StoredTiles, stored_tiles
from .openslide_reader import OpenSlideReader

log = logging.getLogger(__name__)

DIRECT, REFERENCE = "jpeg tiles", "openslide"
PROBES = 3  # regions across the plan that both readers must agree on ...
STRIP = 32  # ... in as many rows: enough for the stored tiles' colours and places, at a fraction of the time


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
        try:
            self._direct = JpegReader(plan, _proven(plan, start), start)
            self.name = DIRECT
        except NotDirect as error:
            self.reason = str(error)
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


def _proven(plan: TilePlan, start: int) -> StoredTiles:
    """Where the plan's stored tiles lie, once they have shown OpenSlide's own bytes across the plan.

    Raises:
        NotDirect: they have not.
        SlideError: the slide cannot be opened.
    """
    chosen = np.unique(np.linspace(start, max(start, len(plan) - 1), PROBES).astype(int))
    strip = (plan.read_size[0], min(plan.read_size[1], STRIP))
    probes = replace(plan, coords=plan.coords[chosen[chosen < len(plan)]], read_size=strip)
    with closing(OpenSlideReader(probes)) as reference:
        handle = reference.handle()
        vendor, size = handle.properties["openslide.vendor"], handle.level_dimensions[plan.level]
        stored = stored_tiles(plan.path, vendor, size)
        if not _on_level_pixels(plan):
            raise NotDirect(f"OpenSlide interpolates level {plan.level}, 1/{plan.downsample:.6g} of level 0")
        with closing(JpegReader(probes, stored)) as direct:
            compared = [
                _same(direct, reference, index, strip) for index in range(len(probes)) if direct.has(index)
            ]
    if False in compared:
        raise NotDirect("its stored tiles don't give OpenSlide's pixels")
    if True not in compared:
        raise NotDirect("no stored tile to compare with OpenSlide's")
    return stored


def _same(direct: JpegReader, reference: OpenSlideReader, index: int, size: tuple[int, int]) -> bool | None:
    """Whether both readers give the same bytes; None where one of them cannot decode them."""
    ours, theirs = (np.empty((*size[::-1], 3), np.uint8) for _ in range(2))
    if direct.read(index, ours) and reference.read(index, theirs):
        return np.array_equal(ours, theirs)
    return None


def _on_level_pixels(plan: TilePlan) -> bool:
    """Whether whole level-0 positions fall on whole pixels of the level; else OpenSlide interpolates."""
    positions = plan.level_positions()
    return bool(
        np.allclose(np.rint(positions * plan.downsample) / plan.downsample, positions, rtol=0, atol=1e-6)
    )
