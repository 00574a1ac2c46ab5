"""A small cohort of slides with planted lesions, made from the tissue of one real slide.

`plan_cohort` assigns slides to patients and splits, and decides where tissue, lesions and smears lie and how
a slide is stained and scanned. `draw_slide` draws one slide's pixels. Held-out slides take their tissue from
another part of the real slide than training slides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from training.cohort.lesions import blur, plant_lesion, plant_smear
from training.cohort.stain import FloatImage, Staining, unmix

TILE_PX, TILE_MPP = 256, 0.5
GRID = 10  # a slide is GRID x GRID tiles of 128 um, tissue in the middle
BLOCK = 2  # side in tiles of the blocks of tissue, so that a slide has structure beyond one tile
RIM_PX = 16  # blocks blend over twice this, at a tile's edges, which the model's centre crop does not see
PATCH = BLOCK * TILE_PX + 2 * RIM_PX
SCANNERS_MPP = (0.5, 0.25, 0.4)
# Bands of the real slide's rows that slides of a split are made of: each has dermis and epidermis.
TRAIN_ROWS, TEST_ROWS = ((560, 1250), (2110, 2967)), ((1260, 2100),)
TISSUE_ROWS = {"train": TRAIN_ROWS, "val": TRAIN_ROWS, "test": TEST_ROWS}

Cell = tuple[int, int]  # (column, row) in tiles
Pattern = Literal["none", "contiguous", "scattered"]


@dataclass(frozen=True)
class SlidePlan:
    """One slide of the cohort, without its pixels."""

    slide_id: str
    patient_id: str
    split: str
    pattern: Pattern
    mpp: float
    staining: Staining
    tissue: tuple[Cell, ...]
    lesion: tuple[Cell, ...]
    smear: tuple[Cell, ...]
    seed: int

    @property
    def tile_level0_px(self) -> int:
        """Side of a 0.5-mpp tile in the slide's own pixels."""
        return round(TILE_PX * TILE_MPP / self.mpp)


def plan_cohort(seed: int = 0, patients: tuple[int, int, int] = (20, 4, 12)) -> list[SlidePlan]:
    """Two slides per patient, one with a lesion and one without; `patients` in train, val and test.

    Lesions are alternately contiguous and scattered. A patient's slides share staining and scanner, so that
    neither depends on the label.
    """
    plans: list[SlidePlan] = []
    splits = [name for name, count in zip(TISSUE_ROWS, patients, strict=True) for _ in range(count)]
    for number, split in enumerate(splits):
        staining = _staining(np.random.default_rng([seed, number]))
        for with_lesion in (False, True):
            rng = np.random.default_rng([seed, number, with_lesion])
            pattern: Pattern = ("contiguous", "scattered")[number % 2] if with_lesion else "none"
            tissue = _tissue_cells(rng)
            lesion = _lesion_cells(pattern, tissue, rng)
            benign = sorted(set(tissue) - set(lesion))
            smears = rng.choice(len(benign), size=rng.integers(3, 9), replace=False)
            plans.append(
                SlidePlan(
                    slide_id=f"{split}-{number:02d}{'AB'[with_lesion]}",
                    patient_id=f"P{number:02d}",
                    split=split,
                    pattern=pattern,
                    mpp=SCANNERS_MPP[number % len(SCANNERS_MPP)],
                    staining=staining,
                    tissue=tissue,
                    lesion=lesion,
                    smear=tuple(benign[i] for i in sorted(smears)),
                    seed=int(rng.integers(2**32)),
                )
            )
    return plans


def _tissue_cells(rng: np.random.Generator) -> tuple[Cell, ...]:
    """A lump of tissue: a tilted ellipse with a wavy rim, one tile away from the slide's edges."""
    column, row = np.meshgrid(np.arange(GRID), np.arange(GRID))
    x, y = column - (GRID - 1) / 2, row - (GRID - 1) / 2
    angle = np.arctan2(y, x)
    wave = sum(rng.uniform(-0.45, 0.45) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
    inside = (np.hypot(x, y) < GRID * 0.44 + wave) & (np.maximum(abs(x), abs(y)) < GRID / 2 - 1)
    return tuple(sorted(zip(column[inside].tolist(), row[inside].tolist(), strict=True)))


def _lesion_cells(pattern: Pattern, tissue: tuple[Cell, ...], rng: np.random.Generator) -> tuple[Cell, ...]:
    """Nothing, 6 to 12 neighbouring tiles grown from one, or 5 to 9 tiles of which no two touch."""
    if pattern == "none":
        return ()
    size = int(rng.integers(6, 13) if pattern == "contiguous" else rng.integers(5, 10))
    chosen: list[Cell] = []
    candidates = [tissue[i] for i in rng.permutation(len(tissue))]
    while candidates and len(chosen) < size:
        chosen.append(candidates.pop(0))
        if pattern == "contiguous":
            nearby = {(c + dc, r + dr) for c, r in chosen for dc, dr in ((1, 0), (-1, 0), (0, 1), (0, -1))}
            growing = sorted(nearby & set(tissue) - set(chosen))
            candidates = [growing[i] for i in rng.permutation(len(growing))]
        else:
            column, row = chosen[-1]
            candidates = [c for c in candidates if max(abs(c[0] - column), abs(c[1] - row)) > 1]
    return tuple(sorted(chosen))


def _staining(rng: np.random.Generator) -> Staining:
    return Staining(
        haematoxylin=rng.uniform(0.75, 1.3),
        eosin=rng.uniform(0.7, 1.3),
        rotation=rng.uniform(-0.12, 0.12),
        glass=(int(rng.integers(236, 250)), int(rng.integers(236, 250)), int(rng.integers(236, 250))),
    )


@dataclass(frozen=True)
class TissueSource:
    """The real slide's stain amounts, and where a block of tissue may be taken, by split."""

    amounts: FloatImage
    corners: dict[str, list[npt.NDArray[np.int64]]]  # [n, 2] (x, y) for each band of rows


def read_source(rgb: npt.NDArray[np.uint8]) -> TissueSource:
    """Prepare the real slide's `rgb` uint8 [H, W, 3] at 0.5 mpp as the source of tissue."""
    amounts = unmix(rgb)
    dense = (amounts[..., :2].sum(axis=2) > 0.25).astype(np.uint8)
    closed = cv2.morphologyEx(dense, cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
    filled = np.asarray(cv2.integral(closed), np.int32)
    corners = {split: [_corners(filled, *band) for band in bands] for split, bands in TISSUE_ROWS.items()}
    return TissueSource(amounts, corners)


def _corners(filled: npt.NDArray[np.int32], top: int, bottom: int) -> npt.NDArray[np.int64]:
    """Where a block of at least 90 % tissue fits between two rows, by the integral image of tissue."""
    rows = filled[top : bottom + 1]
    inside = rows[PATCH:, PATCH:] - rows[:-PATCH, PATCH:] - rows[PATCH:, :-PATCH] + rows[:-PATCH, :-PATCH]
    y, x = np.nonzero(inside > 0.9 * PATCH**2)
    return np.stack([x, y + top], axis=1)


def draw_slide(plan: SlidePlan, source: TissueSource) -> npt.NDArray[np.uint8]:
    """The slide's level 0, RGB uint8 [H, W, 3] at `plan.mpp`."""
    rng = np.random.default_rng(plan.seed)
    canvas = _draw_tissue(source, plan.split, rng)
    for cells, plant in ((plan.lesion, plant_lesion), (plan.smear, plant_smear)):
        for column, row in cells:
            plant(canvas[_around(row), _around(column)], rng)
    silhouette = _silhouette(plan.tissue, rng)[..., None]
    pixels = np.empty(canvas.shape, np.uint8)
    for row in range(GRID):  # in strips that stay in the processor's cache: half the time
        strip = slice(row * TILE_PX, (row + 1) * TILE_PX)
        pixels[strip] = plan.staining.mix(canvas[strip] * silhouette[strip])
    level0 = GRID * plan.tile_level0_px
    if level0 != len(pixels):
        pixels = np.asarray(cv2.resize(pixels, (level0, level0), interpolation=cv2.INTER_CUBIC))
    return pixels


def _around(cell: int, tiles: int = 1) -> slice:
    """The pixels, in one direction, of `tiles` tiles from `cell` on, and their blending rim."""
    return slice(cell * TILE_PX - RIM_PX, (cell + tiles) * TILE_PX + RIM_PX)


def _draw_tissue(source: TissueSource, split: str, rng: np.random.Generator) -> FloatImage:
    """Stain amounts of blocks from anywhere in the split's rows, turned, mirrored, blended at the seams."""
    canvas = np.zeros((GRID * TILE_PX, GRID * TILE_PX, 3), np.float32)
    ramp = np.minimum((np.arange(PATCH, dtype=np.float32) + 0.5) / (2 * RIM_PX), 1)
    ramp = np.minimum(ramp, ramp[::-1])
    fade = (ramp[:, None] * ramp)[..., None]
    bands = source.corners[split]
    for row in range(1, GRID - 1, BLOCK):
        for column in range(1, GRID - 1, BLOCK):
            band = bands[rng.integers(len(bands))]
            x, y = band[rng.integers(len(band))]
            patch = np.rot90(source.amounts[y : y + PATCH, x : x + PATCH], k=int(rng.integers(4)))
            patch = patch[:, ::-1] if rng.integers(2) else patch
            canvas[_around(row, BLOCK), _around(column, BLOCK)] += fade * patch
    return canvas


def _silhouette(tissue: tuple[Cell, ...], rng: np.random.Generator) -> FloatImage:
    """How much tissue a pixel has, 0 to 1, float32 [H, W]: the cells, with round corners and a ragged rim."""
    coarse = TILE_PX // 16  # pixels per cell at which the shape is drawn
    cells = np.zeros((GRID, GRID), np.float32)
    for column, row in tissue:
        cells[row, column] = 1
    blocks = np.kron(cells, np.ones((coarse, coarse), np.float32))
    ragged = blur(rng.standard_normal(blocks.shape, dtype=np.float32), 1.5)
    level = blur(blocks, coarse / 4) + 0.04 * ragged / ragged.std()
    size = (GRID * TILE_PX, GRID * TILE_PX)
    fine = cv2.resize(level, size, interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip((fine - 0.42) * 12, 0, 1))
