"""Which reader a plan gets."""

from __future__ import annotations

import logging
from contextlib import closing

import numpy as np

from ..slides.slide_file import library_of
from ..slides.stored_tiles import OME_TIFF, StoredLevel, StoredTiles
from ..slides.tiling import TilePlan
from .handle_reader import HandleReader
from .jpeg_reader import JpegReader

logger = logging.getLogger(__name__)

PROBE_REGIONS = 3  # across the plan, on which both readers must agree ...
PROBE_ROWS = 32  # ... in as many pixel rows: enough to compare colours and places, at a fraction of the time


TileReader = JpegReader | HandleReader
"""Reads the regions of one plan; shared by all threads.

`name` is "jpeg tiles" or the library's, `reason` says why the plan is not read from stored JPEG tiles.
"""


def open_reader(plan: TilePlan, start: int = 0) -> TileReader:
    """The direct JPEG reader where it reproduces OpenSlide's pixels, else OpenSlide or the format's library.

    `start` is the first region that will be read.

    Raises:
        SlideError: the slide cannot be opened.
    """
    fallback = HandleReader(plan)
    fallback.name = library_of(fallback.handle())
    stored = _confirmed(plan, start, fallback)
    reader: TileReader = fallback
    if isinstance(stored, StoredTiles):
        reader = JpegReader(plan, stored, fallback, start)
    else:
        fallback.reason = stored
    logger.info("%s: tiles through %s%s", plan.path, reader.name, reader.reason and f" ({reader.reason})")
    return reader


def _confirmed(plan: TilePlan, start: int, reference: HandleReader) -> StoredTiles | str:
    """The plan's stored tiles, if regions across the plan have OpenSlide's pixels; else why not.

    Raises:
        SlideError: the slide cannot be opened.
    """
    vendor = reference.handle().properties["openslide.vendor"]
    if isinstance(plan.stored, str):
        return plan.stored
    if vendor != OME_TIFF and not _on_level_pixels(plan):
        return f"OpenSlide interpolates level {plan.level}, 1/{plan.downsample:.6g} of level 0"
    chosen = np.unique(np.linspace(start, max(start, len(plan) - 1), PROBE_REGIONS).astype(int))
    corners = [(x, y) for x, y in plan.level_positions()[chosen[chosen < len(plan)]].tolist()]
    size = (plan.read_size[0], min(plan.read_size[1], PROBE_ROWS))
    with closing(StoredLevel(plan.path, plan.stored)) as direct:
        agrees = direct.agrees(reference.level.read, corners, size)
    if agrees is None:
        return "no stored tile to compare with OpenSlide's"
    return plan.stored if agrees else "its stored tiles don't give OpenSlide's pixels"


def _on_level_pixels(plan: TilePlan) -> bool:
    """Whether whole level-0 positions fall on whole pixels of the level; else OpenSlide interpolates."""
    positions = plan.level_positions()
    level0 = np.rint(positions * plan.downsample)
    return bool(np.allclose(level0 / plan.downsample, positions, rtol=0, atol=1e-6))
