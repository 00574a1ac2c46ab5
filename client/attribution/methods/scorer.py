"""Scorer protocol (masks in, scores out) and the occluders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ...arrays import Float32, Int64, KeepMask


class Scores(NamedTuple):
    """Scores of one slide under M masks."""

    logits: Float32  # [M, C]; C = 0 where the served model has no head
    slide: Float32  # [M, E]


class Scorer(Protocol):
    """`keep` bool [M, N] (True: the tile stays) -> scores of the M masked slides."""

    def __call__(self, keep: KeepMask) -> Scores: ...


class Forward(Protocol):
    """A slide (embeddings [N, D] and the model's coords [N, 2] by position) -> scores under masks [M, N]."""

    def __call__(self, embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores: ...


def in_place(forward: Forward, embeddings: Float32, coords: Int64) -> Scorer:
    """Mask in place: an occluded tile keeps its position and coordinates, and no query sees it as a key."""

    def score(keep: KeepMask) -> Scores:
        return forward(embeddings, coords, keep)

    return score


def replace(forward: Forward, embeddings: Float32, coords: Int64, reference: Float32) -> Scorer:
    """An occluded tile's embedding becomes `reference`: [D] for all tiles, or [N, D] with one per tile.

    Masks differ in their embeddings, so every mask is a separate forward.
    """

    def score(keep: KeepMask) -> Scores:
        everything = np.ones((1, len(embeddings)), dtype=bool)
        return concatenate(
            [forward(np.where(row[:, None], embeddings, reference), coords, everything) for row in keep]
        )

    return score


def drop(forward: Forward, embeddings: Float32, coords: Int64) -> Scorer:
    """An occluded tile is taken out of the sequence, as HIPPO, xMIL and MILLI do.

    In LongNet that moves every later tile to another position, hence to other heads and segments: use it for
    bags of one tile (`keep_one`) and for models without positions, not for `occlusion`.

    The scorer raises ValueError for a mask that keeps no tile.
    """

    def score(keep: KeepMask) -> Scores:
        if not keep.any(axis=1).all():
            raise ValueError("a slide with every tile dropped has no score; use the in-place mask")
        return concatenate(
            [forward(embeddings[row], coords[row], np.ones((1, int(row.sum())), dtype=bool)) for row in keep]
        )

    return score


def average(scorers: Sequence[Scorer]) -> Scorer:
    """Mean logits and slide embeddings of several scorers, for example of draws from a bank."""

    def score(keep: KeepMask) -> Scores:
        scores = [scorer(keep) for scorer in scorers]
        return Scores(_mean([s.logits for s in scores]), _mean([s.slide for s in scores]))

    return score


def _mean(arrays: Sequence[Float32]) -> Float32:
    return np.asarray(np.mean(arrays, axis=0, dtype=np.float64), dtype=np.float32)


def concatenate(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches of masks as one."""
    return Scores(np.concatenate([p.logits for p in parts]), np.concatenate([p.slide for p in parts]))


def medoid(embeddings: Float32, *, sample: int = 2000, seed: int = 0) -> Float32:
    """The embedding [D] of the tile with the least summed Euclidean distance to the others.

    Of more than `sample` tiles, the medoid of a random sample, so that the cost is bounded.
    """
    if len(embeddings) > sample:
        chosen = np.sort(np.random.default_rng(seed).choice(len(embeddings), sample, replace=False))
        embeddings = embeddings[chosen]
    wide = embeddings.astype(np.float64)
    squares = (wide**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * wide @ wide.T, 0))
    chosen_one: Float32 = embeddings[int(distances.sum(axis=1).argmin())]
    return chosen_one


def bank_draws(bank: Float32, tiles: int, draws: int, seed: int = 0) -> list[Float32]:
    """`draws` references [N, D] for `replace`: for each tile one of `bank` [B, D], with replacement."""
    rng = np.random.default_rng(seed)
    return [bank[rng.integers(0, len(bank), tiles)] for _ in range(draws)]
