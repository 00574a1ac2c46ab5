"""Inputs for the parity report: real tiles of a real slide, and seeded slides of given lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from export.errors import ExportError
from gigapath_contract.schema import TileContract

SIZES = (1, 37, 1023, 1024, 1068, 5000)
# Tile i of every slide is rows[i % 61] + columns[i % 67]. That keeps the reference file small, and its reader
# needs no random numbers, whose streams NumPy may change between versions.
BASIS = (61, 67)
TILE = TileContract()


def real_tiles(slide: Path, count: int = 4, tile: TileContract = TILE) -> NDArray[np.uint8]:
    """The `count` darkest tiles (most tissue) of a slide's grid, uint8 [count, crop, crop, 3], row-major.

    Raises:
        ExportError: the slide is missing, unreadable, without a resolution, or smaller than `count` tiles.
    """
    try:
        with openslide.OpenSlide(slide) as source:
            mpp = float(source.properties.get(openslide.PROPERTY_NAME_MPP_X, 0))
            if mpp <= 0:
                raise ExportError(
                    f"{slide} has no resolution (openslide.mpp-x): give another slide with --slide"
                )
            step = round(tile.size_px * tile.mpp / mpp)
            columns, rows = (side // step for side in source.dimensions)
            if columns * rows < count:
                raise ExportError(
                    f"{slide} holds {columns * rows} tiles, {count} are needed: give a larger --slide"
                )
            thumbnail = (
                source.get_thumbnail((columns * 8, rows * 8))
                .convert("L")
                .resize((columns, rows), Image.Resampling.BOX)
            )
            darkest = np.sort(np.argsort(np.asarray(thumbnail).ravel(), kind="stable")[:count])
            tiles = [
                source.read_region(
                    (int(i % columns) * step, int(i // columns) * step), 0, (step, step)
                ).convert("RGB")
                for i in darkest
            ]
    except (OSError, openslide.OpenSlideError) as error:
        raise ExportError(f"the slide {slide} cannot be read ({error}): give one with --slide") from None
    edge = (tile.size_px - tile.crop_px) // 2
    return np.stack(
        [
            np.asarray(image.resize((tile.size_px, tile.size_px), Image.Resampling.BICUBIC))[
                edge:-edge, edge:-edge
            ]
            for image in tiles
        ]
    )


def seeded_basis(dim: int, seed: int = 11) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The two short tables that `seeded_embeddings` adds up, float32 [61, dim] and [67, dim]."""
    generator = np.random.default_rng(seed)
    rows, columns = (
        generator.standard_normal((n, dim), dtype=np.float32) / np.float32(2**0.5) for n in BASIS
    )
    return rows, columns


def seeded_coords(tiles: int, seed: int = 11) -> NDArray[np.int64]:
    """Row-major grid positions with gaps, int64 [tiles, 2], as COORDS wants them (grid index * 256)."""
    side = int(np.ceil(np.sqrt(1.7 * tiles)))
    cells = np.sort(np.random.default_rng([seed, tiles]).choice(side * side, tiles, replace=False))
    return np.stack([cells % side, cells // side], axis=-1).astype(np.int64) * 256


def seeded_keep(tiles: int, seed: int = 11) -> NDArray[np.bool_]:
    """Masks bool [M, tiles]: the first keeps about half of the tiles, the second all of them.

    The first keeps tile 0 at least; slides of more than 2,000 tiles get the first alone.
    """
    keep = np.random.default_rng([seed, tiles, 2]).random((1 if tiles > 2000 else 2, tiles)) < 0.5
    keep[0, 0] = True
    keep[1:] = True
    return keep
