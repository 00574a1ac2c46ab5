"""What a tile reader does, and which reader a plan gets.

Adding a format is adding a file with a `TileReader` and a line to `open_reader`.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from typing import Protocol

import numpy as np

from ..arrays import Pixels
from ..slides.slide_file import library_of
from ..slides.stored_tiles import OME_TIFF, DirectReadUnsupported, StoredTiles, stored_tiles
from ..slides.tiling import TilePlan
from .handle_reader import HandleReader
from .jpeg_reader import JpegReader

logger = logging.getLogger(__name__)

PROBE_REGIONS = 3  # across the plan, on which both readers must agree ...
PROBE_ROWS = 32  # ... in as many pixel rows: enough to compare colours and places, at a fraction of the time


class TileReader(Protocol):
    """Reads the regions of one plan; shared by all threads.

    `name` is "jpeg tiles" or the library's, `reason` says why the plan is not read from stored JPEG tiles.
    """

    name: str
    reason: str

    def read(self, index: int, out: Pixels) -> bool:
        """Fill `out` RGB uint8 [h, w, 3] (the plan's `read_size`) with region `index` of the plan.

        False where it cannot be decoded.

        Raises:
            SlideError: the slide cannot be opened.
        """

    def close(self) -> None:
        """Close the files; no thread may be reading."""


def open_reader(plan: TilePlan, start: int = 0) -> TileReader:
    """The direct JPEG reader where it reproduces OpenSlide's pixels, else OpenSlide or the format's library.

    `start` is the first region that will be read.

    Raises:
        SlideError: the slide cannot be opened.
    """
    reader: TileReader
    probes = _probes(plan, start)
    with closing(HandleReader(probes)) as reference:
        library = library_of(reference.handle())
        try:
            stored = _validated_layout(plan, probes, reference)
            reader = JpegReader(plan, stored, HandleReader(plan, library), start)
        except DirectReadUnsupported as error:
            reader = HandleReader(plan, library, str(error))
    logger.info("%s: tiles through %s%s", plan.path, reader.name, reader.reason and f" ({reader.reason})")
    return reader


def _probes(plan: TilePlan, start: int) -> TilePlan:
    """The upper rows of some regions across the plan."""
    chosen = np.unique(np.linspace(start, max(start, len(plan) - 1), PROBE_REGIONS).astype(int))
    size = (plan.read_size[0], min(plan.read_size[1], PROBE_ROWS))
    return replace(plan, coords=plan.coords[chosen[chosen < len(plan)]], read_size=size)


def _validated_layout(plan: TilePlan, probes: TilePlan, reference: HandleReader) -> StoredTiles:
    """Where the plan's stored tiles lie, after comparing `probes` of it with the pixels of `reference`.

    Raises:
        DirectReadUnsupported: another format, or other pixels.
        SlideError: the slide cannot be opened.
    """
    handle = reference.handle()
    vendor, level_size = handle.properties["openslide.vendor"], handle.level_dimensions[plan.level]
    stored = stored_tiles(plan.path, vendor, level_size)
    if vendor != OME_TIFF and not _on_level_pixels(plan):
        raise DirectReadUnsupported(
            f"OpenSlide interpolates level {plan.level}, 1/{plan.downsample:.6g} of level 0"
        )
    with closing(JpegReader(probes, stored, reference)) as direct:
        compared = [
            _same_pixels(direct, reference, index, probes.read_size)
            for index in range(len(probes))
            if direct.covers(index)
        ]
    if False in compared:
        raise DirectReadUnsupported("its stored tiles don't give OpenSlide's pixels")
    if True not in compared:
        raise DirectReadUnsupported("no stored tile to compare with OpenSlide's")
    return stored


def _same_pixels(one: TileReader, other: TileReader, index: int, size: tuple[int, int]) -> bool | None:
    """Whether both readers give the same bytes; None where one of them cannot decode them."""
    ours, theirs = (np.empty((*size[::-1], 3), np.uint8) for _ in range(2))
    if one.read(index, ours) and other.read(index, theirs):
        return np.array_equal(ours, theirs)
    return None


def _on_level_pixels(plan: TilePlan) -> bool:
    """Whether whole level-0 positions fall on whole pixels of the level; else OpenSlide interpolates."""
    positions = plan.level_positions()
    level0 = np.rint(positions * plan.downsample)
    return bool(np.allclose(level0 / plan.downsample, positions, rtol=0, atol=1e-6))
