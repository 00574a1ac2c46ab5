"""Slides of any size with planted lesions, put together from the embeddings of the cohort's tiles; no pixels.

Benign tissue lies in blocks that look alike, in lumps on a grid; a lesion's tiles lie in one place or apart.
Every tile is interpolated between a tile of the cohort and one of its nearest neighbours of the same kind, so
that no two tiles of a slide are equal.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import h5py
import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

Pattern = Literal["contiguous", "scattered"]

STEP = 256
BLOCK = 6
"""Side, in tiles, of the blocks of tissue that look alike."""
NEIGHBOURS = 5
ALIKE = 24
SOURCES = 6
"""Slides of the cohort that one slide is put together from."""


@dataclass(frozen=True, eq=False)
class CohortTiles:
    """Embedded tiles of the cohort: embeddings [n, D], each one's kind and slide."""

    embeddings: Float32
    kind: NDArray[np.str_]  # benign, smear or lesion
    slide: NDArray[np.str_]

    def of_split(self, split: str) -> CohortTiles:
        """The tiles of `train`, `val` or `test`."""
        inside = np.char.startswith(self.slide, f"{split}-")
        return CohortTiles(self.embeddings[inside], self.kind[inside], self.slide[inside])


@dataclass(frozen=True, eq=False)
class PlantedSlide:
    """Embeddings [N, D] at coords [N, 2] in row-major order, and which tiles are planted [N]."""

    embeddings: Float32
    coords: Int64
    planted: Bool

    def precision(self, values: Float64, wanted: Bool) -> float:
        """Precision among the k strongest tiles for k `wanted` ones; other planted tiles are left out."""
        inside = wanted | ~self.planted
        strongest = np.argsort(-values[inside], kind="stable")[: wanted.sum()]
        return float(wanted[inside][strongest].mean())


def read_cohort(features: Path, tiles: Path) -> CohortTiles:
    """The tiles of the H5 files in the folder `features`; their kinds are in the cohort's table `tiles`."""
    with tiles.open(newline="", encoding="utf-8") as table:
        kinds = {
            (row["slide_id"], int(row["x"]), int(row["y"])): row["kind"] for row in csv.DictReader(table)
        }
    embeddings, kind, slide = [], [], []
    for path in sorted(features.glob("*.h5")):
        with h5py.File(path) as file:
            embeddings.append(file["features"][:])
            places = file["coords"][:].tolist()
        kind += [kinds.get((path.stem, x, y), "benign") for x, y in places]
        slide += [path.stem] * len(places)
    return CohortTiles(np.concatenate(embeddings), np.array(kind), np.array(slide))


def planted_slide(
    tiles: CohortTiles, count: int, planted: int, pattern: Pattern, rng: np.random.Generator,
    kind: str = "lesion",
) -> PlantedSlide:  # fmt: skip
    """A slide of `count` tiles, of which `planted` are of `kind`."""
    cells = tissue(count, rng)
    where = place(cells, planted, pattern, rng)
    embeddings = benign_tissue(tiles, cells, rng, without=kind)
    if not planted:
        return PlantedSlide(embeddings, cells * STEP, where)
    embeddings[where] = _draw(tiles.embeddings[tiles.kind == kind], planted, rng)
    return PlantedSlide(embeddings, cells * STEP, where)


def tissue(count: int, rng: np.random.Generator) -> Int64:
    """`count` cells (column, row) of a grid in row-major order: the highest of a smooth random landscape."""
    side = int(np.ceil(np.sqrt(2 * count)))
    landscape = cv2.GaussianBlur(rng.standard_normal((side, side)), (0, 0), max(1.0, side / 10))
    highest = np.argsort(-landscape.ravel(), kind="stable")[:count]
    rows, columns = np.divmod(np.sort(highest), side)
    return np.stack([columns, rows], axis=1).astype(np.int64)


def place(cells: Int64, count: int, pattern: Pattern, rng: np.random.Generator) -> Bool:
    """Which cells [N] hold the lesion: `count` of them at random, or those around a random one."""
    chosen = rng.permutation(len(cells))[:count]
    if pattern == "contiguous":
        chosen = np.argsort(np.square(cells - cells[chosen[0]]).sum(axis=1), kind="stable")[:count]
    where = np.zeros(len(cells), dtype=bool)
    where[chosen] = True
    return where


def benign_tissue(
    tiles: CohortTiles, cells: Int64, rng: np.random.Generator, without: str = "lesion"
) -> Float32:
    """Embeddings [N, D] of benign tiles and smears; those of a block are like one tile of the cohort."""
    sources = rng.choice(np.unique(tiles.slide), SOURCES, replace=False)
    pool = tiles.embeddings[np.isin(tiles.slide, sources) & ~np.isin(tiles.kind, ["lesion", without])]
    distances = _distances(pool, pool)
    alike = np.argsort(distances, axis=1)[:, :ALIKE]
    embeddings = np.empty((len(cells), pool.shape[1]), dtype=np.float32)
    _, block = np.unique(cells // BLOCK, axis=0, return_inverse=True)
    for number in range(int(block.max()) + 1):
        inside = np.flatnonzero(block == number)
        embeddings[inside] = _draw(pool[alike[rng.integers(len(pool))]], len(inside), rng)
    return embeddings


def _draw(pool: Float32, count: int, rng: np.random.Generator) -> Float32:
    """`count` embeddings, each between one of `pool` and one of its nearest neighbours."""
    near = np.argsort(_distances(pool, pool), axis=1)[:, 1 : NEIGHBOURS + 1]
    first = rng.integers(len(pool), size=count)
    second = near[first, rng.integers(near.shape[1], size=count)]
    part = rng.random((count, 1), dtype=np.float32)
    return np.asarray(pool[first] + part * (pool[second] - pool[first]), dtype=np.float32)


def _distances(a: Float32, b: Float32) -> Float32:
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(squares, 0)))
