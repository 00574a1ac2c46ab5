"""Deletion and insertion curves of a map, SRG and rank correlation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Float64, Int64, KeepMask
from .methods.game import CoalitionGame

STEPS = 10


@dataclass(frozen=True)
class Curves:
    """The target's output v with a part of the tiles occluded, most or least important first.

    Attributes:
        fractions: fractions occluded, [S + 1], 0 and 1 included.
        mif: v without the most important fraction (most important first: the deletion curve), [S + 1].
        lif: v without the least important fraction (least important first), [S + 1].
    """

    fractions: Float64
    mif: Float64
    lif: Float64

    @property
    def insertion(self) -> tuple[Float64, Float64]:
        """Fractions, and v with only the most important fraction kept: LIF in reverse order."""
        return 1 - self.fractions[::-1], self.lif[::-1]

    @property
    def srg(self) -> float:
        """Symmetric relevance gain: AUC of LIF - AUC of MIF (Blücher et al., TMLR 2024).

        About 0 for a random map; negating a map negates it.
        """
        return auc(self.fractions, self.lif) - auc(self.fractions, self.mif)


def curves(game: CoalitionGame, order: Int64, target_index: int) -> Curves:
    """Curves of the output `target_index` for an `order` [G] of the players, most important first.

    S is `STEPS`, or the number of players if they are fewer. Raises as `CoalitionGame.values` does.
    """
    counts = np.unique(np.rint(np.linspace(0, len(order), STEPS + 1)).astype(np.int64))
    kept = np.concatenate([_without_first(order, counts), _without_first(order[::-1], counts)])
    mif, lif = game.values(kept)[:, target_index].reshape(2, -1)
    return Curves(counts / len(order), mif, lif)


def descending(values: Float64, seed: int = 0) -> Int64:
    """Indices of tiles by decreasing value, [N]; ties in random order, not in that of positions."""
    chance = np.random.default_rng(seed).permutation(len(values))
    return np.lexsort((chance, -values)).astype(np.int64)


def random_orders(regions: Int64, count: int, seed: int) -> list[Int64]:
    """`count` orders of tiles [N] with the `regions` [N] in random order.

    Random single tiles would be an easier control, since maps are as smooth as tissue.
    """
    rng = np.random.default_rng(seed)
    maps = [rng.permutation(int(regions.max()) + 1).astype(np.float64) for _ in range(count)]
    return [descending(values[regions], seed + number) for number, values in enumerate(maps)]


def auc(fractions: Float64, values: Float64) -> float:
    """Area under a curve over [0, 1] by the trapezoidal rule."""
    return float(np.trapezoid(values, fractions))


def spearman(a: Float64, b: Float64) -> float:
    """Spearman's rank correlation with mean ranks for ties; NaN where either is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / norm if norm > 0 else float("nan")


def _ranks(values: Float64) -> Float64:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Float64 = (last - (counts - 1) / 2)[group]
    return ranks


def _without_first(order: Int64, counts: Int64) -> KeepMask:
    """All players but the first `counts[s]` of `order`, [S, G]."""
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    kept: KeepMask = rank[None, :] >= counts[:, None]
    return kept
