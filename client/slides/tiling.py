"""Which tiles of a slide are read, and from where: a plan that is complete before any tile is read."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..arrays import Float32, Float64, Int64
from ..errors import PlanError
from .slide import Slide
from .slide_file import SlideFile
from .stored_tiles import StoredTiles
from .tissue import TissueMask

MOST_CELLS = 2_000_000
"""Of a slide's grid: tiles of 0.056 mm on a slide of two inches by three, the largest that is made."""
NO_TILES = "no tissue found, or less than a tile needs"


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Every tile of one slide, row-major, and how each is read.

    Pairs are (x, y). A tile is `tile_size` level pixels large; its centre, `read_size` level pixels at
    `read_offset` from the tile's corner, is read at `level` and becomes `crop_px` x `crop_px` pixels of
    `mpp_effective`.
    """

    file: SlideFile
    stored: StoredTiles | str  # the level's tiles in the file, or why they are read through OpenSlide
    slide_id: str
    coords: Int64  # [N, 2] level-0 pixels of each tile's top-left corner
    tissue: Float32  # [N] fraction of each tile that is tissue
    tile_px: int
    crop_px: int
    level: int
    downsample: float
    tile_size: tuple[int, int]
    read_size: tuple[int, int]
    read_offset: tuple[int, int]
    dimensions: tuple[int, int]  # level 0
    mpp_level0: tuple[float, float]
    mpp_source: str
    mpp_requested: float
    mpp_effective: tuple[float, float]
    fingerprint: dict[str, Any]  # JSON-able: what decides the pixels; a resumed run compares it

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def path(self) -> Path:
        """The slide's file."""
        return self.file.path

    @property
    def resampled(self) -> bool:
        """Whether tiles are resized after reading; False means the slide's own pixels."""
        return self.read_size != (self.crop_px, self.crop_px)

    @property
    def resample(self) -> tuple[float, float]:
        """Level pixels per tile pixel, (x, y)."""
        return self.read_size[0] / self.crop_px, self.read_size[1] / self.crop_px

    @property
    def tile_size_level0(self) -> tuple[int, int]:
        """The tile's size in level-0 pixels, rounded down so that neighbours never share an index."""
        return _pair(math.floor(side * self.downsample + 1e-6) for side in self.tile_size)

    @property
    def patch_size_level0(self) -> int:
        """The tile's width in level-0 pixels, by TRIDENT's name; an anisotropic slide has another height."""
        return self.tile_size_level0[0]

    def level_positions(self) -> Int64:
        """[N, 2] level pixels of the top-left corner of what is read of each tile."""
        positions: Int64 = np.rint(self.coords / self.downsample).astype(np.int64) + np.array(
            self.read_offset
        )
        return positions


def plan_tiles(
    slide: Slide,
    tissue: TissueMask | None,
    *,
    tile_px: int = 256,
    crop_px: int = 224,
    mpp: float = 0.5,
    min_tissue: float = 0.1,
    native_tolerance: float = 0.01,
    upsample_tolerance: float = 0.1,
) -> TilePlan:
    """Lay a grid of tiles over a slide and keep those with tissue; tiles don't overlap.

    The level is the coarsest that is still as fine as `mpp`. The grid starts at the slide's origin (or its
    bounds'), not at the tissue, so that tiles coincide with stored ones. Beyond the slide's edge is white.

    Args:
        slide: the open slide; of its pixels only some are read, to check the level.
        tissue: where the tissue is; None keeps every tile.
        tile_px: side of a tile in pixels at the target scale.
        crop_px: side of its centre, in the same pixels: what is read and sent to the model.
        mpp: the target scale, microns per tile pixel.
        min_tissue: fraction of a tile, 0 to 1, that must be tissue.
        native_tolerance: relative deviation from a whole ratio of level pixels to tile pixels, on both axes,
            up to which pixels are joined in that ratio (1: untouched) instead of resampled; `mpp_effective`
            is then the scale that results.
        upsample_tolerance: how much coarser than `mpp` the finest level may be, relative.

    Raises:
        PlanError: an option makes no sense, or the slide is coarser than `mpp` by over `upsample_tolerance`.

    Example::

        with open_slide(Path("CMU-1.svs")) as slide:
            plan = plan_tiles(slide, tissue_mask(slide), tile_px=256, crop_px=224, mpp=0.5)
        print(len(plan), plan.coords[:3])
    """
    _check_options(tile_px, crop_px, mpp, min_tissue)
    level = slide.level_for(mpp * (1 + native_tolerance) / max(slide.mpp))
    downsample = slide.level_downsamples[level]
    scale = tuple(mpp / (level0 * downsample) for level0 in slide.mpp)  # level pixels per tile pixel
    if min(scale) < 1 / (1 + upsample_tolerance):
        raise PlanError(
            f"{slide.path}: too coarse for this model: its finest level has {max(slide.mpp):g} mpp; tiles of "
            f"{mpp:g} would be magnified {1 / min(scale):.4g} times (at most {1 + upsample_tolerance:g} "
            "allowed): scan it finer, or serve a model of coarser tiles"
        )
    whole = tuple(float(max(1, round(s))) for s in scale)
    if all(abs(s / w - 1) <= native_tolerance for s, w in zip(scale, whole, strict=True)):
        scale = whole
    # Rounded up: the level's own grid never gets finer than the target's, so two tiles never share an index.
    tile_size = _pair(math.ceil(tile_px * s - 1e-6) for s in scale)
    read_size = _pair(round(crop_px * s) for s in scale)
    read_offset = _pair((tile - read) // 2 for tile, read in zip(tile_size, read_size, strict=True))
    coords = _grid(slide.bounds, downsample, tile_size, read_offset)
    fraction = _tissue_fraction(tissue, coords, tile_size, downsample)
    keep = fraction >= min_tissue
    return TilePlan(
        file=slide.file,
        stored=slide.stored_tiles(level),
        slide_id=slide.slide_id,
        coords=coords[keep],
        tissue=fraction[keep],
        tile_px=tile_px,
        crop_px=crop_px,
        level=level,
        downsample=downsample,
        tile_size=tile_size,
        read_size=read_size,
        read_offset=read_offset,
        dimensions=slide.dimensions,
        mpp_level0=slide.mpp,
        mpp_source=slide.mpp_source,
        mpp_requested=mpp,
        mpp_effective=_float_pair(
            level0 * downsample * read / crop_px for level0, read in zip(slide.mpp, read_size, strict=True)
        ),
        fingerprint={
            "tile_px": tile_px,
            "crop_px": crop_px,
            "mpp": mpp,
            "min_tissue": min_tissue,
            "mpp_level0": list(slide.mpp),
            "level": level,
            "tile_size": list(tile_size),
            "read_size": list(read_size),
            "coords_sha256": hashlib.sha256(coords[keep].tobytes()).hexdigest()[:16],
        },
    )


def _check_options(tile_px: int, crop_px: int, mpp: float, min_tissue: float) -> None:
    if not 0 < crop_px <= tile_px:
        raise PlanError(f"a crop of {crop_px} px does not fit a tile of {tile_px} px: give 0 < crop <= tile")
    if not (mpp > 0 and math.isfinite(mpp)):
        raise PlanError(f"tiles of {mpp} mpp make no sense: give a positive number, such as 0.5")
    if not 0 <= min_tissue <= 1:
        raise PlanError(f"a tissue fraction of {min_tissue} makes no sense: give 0 to 1")


def _grid(
    bounds: tuple[int, int, int, int], downsample: float, steps: tuple[int, int], offset: tuple[int, int]
) -> Int64:
    """[N, 2] level-0 corners of every tile with something of the bounds in what is read of it, row-major."""
    axes, cells = [], 1
    for start, length, step, skip in zip(bounds[:2], bounds[2:], steps, offset, strict=True):
        first = round(start / downsample)
        count = max(0, math.ceil((math.floor(length / downsample) - skip) / step))
        cells *= count
        if cells > MOST_CELLS:
            raise PlanError(f"{length} px make {count} of over {MOST_CELLS} tiles: check the slide's mpp")
        axes.append(np.rint((first + step * np.arange(count)) * downsample).astype(np.int64))
    y, x = np.meshgrid(axes[1], axes[0], indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _tissue_fraction(
    tissue: TissueMask | None, coords: Int64, tile_size: tuple[int, int], downsample: float
) -> Float32:
    """[N] fraction of each tile that is tissue, exact to a part of a mask pixel; outside the mask is none."""
    if tissue is None:
        return np.ones(len(coords), np.float32)
    sums = np.asarray(cv2.integral(tissue.mask.astype(np.uint8), sdepth=cv2.CV_64F), np.float64)
    low = coords / tissue.downsample
    high = (coords + np.array(tile_size) * downsample) / tissue.downsample
    area = _bilinear(sums, high[:, 0], high[:, 1]) - _bilinear(sums, low[:, 0], high[:, 1])
    area -= _bilinear(sums, high[:, 0], low[:, 1]) - _bilinear(sums, low[:, 0], low[:, 1])
    return np.asarray(area / np.prod(high - low, axis=1), np.float32)


def _bilinear(sums: Float64, x: Float64, y: Float64) -> Float64:
    """The integral image at (x, y): linear between its corners, exact, as a mask pixel has one value."""
    x, y = np.clip(x, 0, sums.shape[1] - 1), np.clip(y, 0, sums.shape[0] - 1)
    column = np.minimum(x.astype(np.int64), max(0, sums.shape[1] - 2))
    row = np.minimum(y.astype(np.int64), max(0, sums.shape[0] - 2))
    dx, dy = x - column, y - row
    above = sums[row, column] * (1 - dx) + sums[row, column + 1] * dx
    below = sums[row + 1, column] * (1 - dx) + sums[row + 1, column + 1] * dx
    result: Float64 = above * (1 - dy) + below * dy
    return result


def _pair(values: Any) -> tuple[int, int]:
    x, y = values
    return x, y


def _float_pair(values: Any) -> tuple[float, float]:
    x, y = values
    return x, y
