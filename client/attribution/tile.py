"""Occlusion inside one tile, on the grid of the tile encoder's patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from ..arrays import Float32, Float64, Pixels
from ..errors import ClientError
from .curves import spearman
from .methods.model_outputs import ModelOutputs
from .model.masked_slide import MaskedSlide

Fill = Literal["glass", "blur", "mean"]
TileScore = Literal["slide", "embedding"]
"""What a tile's map explains: the slide's score with the tile in its place, or the tile's embedding."""
Encode = Callable[[Pixels], Float32]
"""Tiles uint8 [B, 224, 224, 3] -> embeddings [B, D]."""

PATCH_PX = 16
WINDOWS = 32  # per call of the encoder
BLUR_SIGMA = 12.0


@dataclass(frozen=True, eq=False)
class TileMap:
    """How much the score falls when each 16-px patch of a tile is occluded.

    Attributes:
        values: float64 [rows, columns] with `fill`; means over the windows that cover a patch.
        other: the same with `other_fill`.
    """

    fill: Fill
    values: Float64
    other_fill: Fill
    other: Float64

    @property
    def agreement(self) -> float:
        """Spearman correlation of the two maps: low where they show the fill more than the tissue."""
        return spearman(self.values.ravel(), self.other.ravel())


def tile_occlusion(
    pixels: Pixels,
    encode: Encode,
    score: Callable[[Float32], Float64],
    *,
    fill: Fill = "blur",
    glass: tuple[int, int, int] = (245, 245, 245),
    window: int = 2,
) -> TileMap:
    """Occlude each window of `window` x `window` patches of a tile and score the tile's new embedding.

    pixels: the encoder's input, uint8 [224, 224, 3].
    encode: the tile encoder.
    score: embeddings [B, D] -> scores [B]: `embedding_score` or `slide_score`.
    fill: `blur` keeps the colour and loses the texture, `glass` is the slide's background, `mean` the tile's
        mean colour; not black, which is on no slide. A second fill gives the map to compare with.

    Raises:
        ClientError: the window does not fit the tile, or the encoder or the model fails.
    """
    other: Fill = "glass" if fill != "glass" else "blur"
    first, second = (
        _occlude(pixels, encode, score, _filled(pixels, kind, glass), window) for kind in (fill, other)
    )
    return TileMap(fill, first, other, second)


def embedding_score(encode: Encode, pixels: Pixels) -> Callable[[Float32], Float64]:
    """Cosine similarity to the embedding of the tile as it is: a patch's value is the mean of 1 - cosine."""
    whole = encode(pixels[None])[0].astype(np.float64)
    whole /= np.linalg.norm(whole)

    def score(embeddings: Float32) -> Float64:
        wide = embeddings.astype(np.float64)
        return np.asarray(wide @ whole / np.linalg.norm(wide, axis=1))

    return score


def slide_score(
    masked_slide: MaskedSlide, tile: int, outputs: ModelOutputs, target_index: int
) -> Callable[[Float32], Float64]:
    """The slide's output `target_index` when the embedding of `tile` is replaced by each of those given."""
    keep_all = np.ones((1, len(masked_slide.coords)), dtype=bool)

    def score(embeddings: Float32) -> Float64:
        values = np.empty(len(embeddings))
        changed = masked_slide.embeddings.copy()
        for index, embedding in enumerate(embeddings):
            changed[tile] = embedding
            scores = masked_slide.forward(changed, masked_slide.model_coords, keep_all)
            values[index] = outputs(scores)[0, target_index]
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
) -> Float64:
    """The map [rows, columns] of a tile whose windows are taken from `filled`."""
    rows, columns = (side // PATCH_PX for side in pixels.shape[:2])
    if not 1 <= window <= min(rows, columns):
        raise ClientError(f"a window of {window} patches does not fit a tile of {rows} x {columns}")
    corners = [(r, c) for r in range(rows - window + 1) for c in range(columns - window + 1)]
    whole = float(score(encode(pixels[None]))[0])
    total, covered = np.zeros((rows, columns)), np.zeros((rows, columns))
    for start in range(0, len(corners), WINDOWS):
        some = corners[start : start + WINDOWS]
        tiles = np.repeat(pixels[None], len(some), axis=0)
        for tile, (r, c) in zip(tiles, some, strict=True):
            area = np.s_[r * PATCH_PX : (r + window) * PATCH_PX, c * PATCH_PX : (c + window) * PATCH_PX]
            tile[area] = filled[area]
        for value, (r, c) in zip(score(encode(tiles)), some, strict=True):
            total[r : r + window, c : c + window] += whole - value
            covered[r : r + window, c : c + window] += 1
    return total / covered
