"""Pixels of single tiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gigapath_contract.schema import Contract

from ...arrays import Int64, Pixels
from ...errors import SlideError
from ...reading.stream import read_tiles
from ...slides.slide import Slide
from ...slides.tiling import plan_tiles


def read_crops(slide: Slide, coords: Int64, contract: Contract, crop_px: int | None = None) -> Pixels:
    """Pixels uint8 [n, crop, crop, 3] of the tiles at `coords` [n, 2], read as for scoring.

    crop_px: the contract's by default; `contract.tile.size_px` for whole tiles.

    Raises:
        SlideError: a tile can't be decoded.
    """
    tile = contract.tile
    plan = plan_tiles(slide, None, tile_px=tile.size_px, crop_px=crop_px or tile.crop_px, mpp=tile.mpp)
    chosen = replace(plan, coords=coords, tissue=np.ones(len(coords), dtype=np.float32))
    batches = list(read_tiles(chosen, workers=1))
    if not all(batch.valid.all() for batch in batches):
        raise SlideError(f"{slide.path}: a chosen tile could not be decoded: copy the slide again")
    return np.concatenate([batch.pixels for batch in batches])


def glass_colour(slide: Slide) -> tuple[int, int, int]:
    """The slide's background colour: the median of the brightest tenth of its thumbnail."""
    pixels = slide.thumbnail(512).reshape(-1, 3)
    light = pixels.astype(np.int64).sum(axis=1)
    red, green, blue = np.median(pixels[light >= np.quantile(light, 0.9)], axis=0).astype(int).tolist()
    return red, green, blue
