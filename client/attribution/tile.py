"""Occlusion inside one tile, on the grid of the tile encoder's own patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from ..errors import ClientError
from .curves import spearman
from .methods.scorer import Float32, Float64
from .methods.target import Target
from .model.masked_slide import MaskedSlide

Pixels = NDArray[np.uint8]
Fill = Literal["glass", "blur", "mean"]
Encode = Callable[[Pixels], Float32]
"""Tiles uint8 [B, 224, 224, 3] -> embeddings [B, D]."""

PATCH_PX = 16
BLUR_SIGMA = 12.0


@dataclass(frozen=True, eq=False)
class TileMap:
    """What covering each 16-px patch of one tile costs; positive: the patch supports the score.

    values: float64 [rows, columns], means over the windows that cover a patch.
    other: the same with `other_fill`.
    """

    fill: Fill
    values: Float64
    other_fill: Fill
    other: Float64

    @property
    def agreement(self) -> float:
        """Spearman correlation of the two fills' maps: low where a map shows the fill, not the tissue."""
        return spearman(self.values.ravel(), self.other.ravel())


def tile_occlusion(
    pixels: Pixels,
    encode: Encode,
    score: Callable[[Float32], Float64],
    *,
    fill: Fill = "blur",
    glass: tuple[int, int, int] = (245, 245, 245),
    window: int = 2,
    batch: int = 32,
    progress_callback: Callable[[int], None] = lambda windows: None,
) -> TileMap:
    """Cover windows of `window` x `window` patches of a tile in turn and score what the encoder makes of it.

    pixels: the encoder's input, uint8 [224, 224, 3]. encode: the tile encoder.
    score: embeddings [B, D] -> numbers [B]: `embedding_score` or `slide_score`.
    fill: `blur` keeps colour and loses texture, `glass` is the slide's empty background, `mean` the tile's
        mean colour. Black is on no slide and isn't offered. A second fill is mapped too, for comparison.
    """
    other: Fill = "glass" if fill != "glass" else "blur"
    first, second = (
        _occlude(pixels, encode, score, _filled(pixels, kind, glass), window, batch, progress_callback)
        for kind in (fill, other)
    )
    return TileMap(fill, first, other, second)


def embedding_score(encode: Encode, pixels: Pixels) -> Callable[[Float32], Float64]:
    """Cosine to the untouched tile's embedding: a patch's value is the mean 1 - cosine of covering it."""
    whole = encode(pixels[None])[0].astype(np.float64)
    whole /= np.linalg.norm(whole)

    def score(embeddings: Float32) -> Float64:
        wide = embeddings.astype(np.float64)
        return np.asarray(wide @ whole / np.linalg.norm(wide, axis=1))

    return score


def slide_score(subject: MaskedSlide, tile: int, target: Target, focus: int) -> Callable[[Float32], Float64]:
    """The slide's score with the tile's embedding put back at its place: from pixels to the slide."""
    everyone = np.ones((1, len(subject.coords)), dtype=bool)

    def score(embeddings: Float32) -> Float64:
        values = np.empty(len(embeddings))
        changed = subject.embeddings.copy()
        for index, embedding in enumerate(embeddings):
            changed[tile] = embedding
            values[index] = target(subject.forward(changed, subject.coords, everyone))[0, focus]
        return values

    return score


def _filled(pixels: Pixels, fill: Fill, glass: tuple[int, int, int]) -> Pixels:
    if fill == "blur":
        return np.asarray(cv2.GaussianBlur(pixels, (0, 0), BLUR_SIGMA), dtype=np.uint8)
    colour = np.array(glass) if fill == "glass" else np.rint(pixels.reshape(-1, 3).mean(axis=0))
    return np.broadcast_to(colour.astype(np.uint8), pixels.shape)


def _occlude(
    pixels: Pixels,
    encode: Encode,
    score: Callable[[Float32], Float64],
    filled: Pixels,
    window: int,
    batch: int,
    progress_callback: Callable[[int], None],
) -> Float64:
    rows, columns = (side // PATCH_PX for side in pixels.shape[:2])
    if not 1 <= window <= min(rows, columns):
        raise ClientError(f"a window of {window} patches does not fit a tile of {rows} x {columns}")
    corners = [(r, c) for r in range(rows - window + 1) for c in range(columns - window + 1)]
    whole = float(score(encode(pixels[None]))[0])
    total, covered = np.zeros((rows, columns)), np.zeros((rows, columns))
    for start in range(0, len(corners), batch):
        some = corners[start : start + batch]
        tiles = np.repeat(pixels[None], len(some), axis=0)
        for tile, (r, c) in zip(tiles, some, strict=True):
            place = np.s_[r * PATCH_PX : (r + window) * PATCH_PX, c * PATCH_PX : (c + window) * PATCH_PX]
            tile[place] = filled[place]
        for value, (r, c) in zip(score(encode(tiles)), some, strict=True):
            total[r : r + window, c : c + window] += whole - value
            covered[r : r + window, c : c + window] += 1
        progress_callback(len(some))
    return total / covered
