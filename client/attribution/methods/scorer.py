"""Scorers, which take masks and return scores, and what occluded tiles are replaced by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ...arrays import Float32, Int64, KeepMask


class Scores(NamedTuple):
    """Scores of one slide under M masks."""

    logits: Float32  # [M, C]; C = 0 where the served model has no head
    slide: Float32  # [M, E]


Scorer = Callable[[KeepMask], Scores]
"""Masks bool [M, N] (True: the tile stays) -> scores of the M masked slides."""
Forward = Callable[[Float32, Int64, KeepMask], Scores]
"""A slide (embeddings [N, D] and the model's coords [N, 2] by position) and masks [M, N] -> scores."""


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


def medoid(embeddings: Float32, *, sample: int = 2000) -> Float32:
    """The embedding [D] of the tile with the least summed Euclidean distance to the others.

    Of more than `sample` tiles, the medoid of a random sample, so that the cost is bounded.
    """
    if len(embeddings) > sample:
        chosen = np.sort(np.random.default_rng(0).choice(len(embeddings), sample, replace=False))
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
