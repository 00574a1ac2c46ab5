"""Deletion and insertion curves of a map, SRG and rank correlation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Float64, Int64, KeepMask
from .methods.game import CoalitionGame

HALVINGS = 9


@dataclass(frozen=True)
class Curves:
    """The target's output v with a part of the tiles occluded, most or least important first.

    Attributes:
        fractions: fractions occluded, [S + 2]: 0, at most S of 1/512, 1/256, … 1/2, and 1.
        mif: v without the most important fraction (most important first: the deletion curve), [S + 2].
        lif: v without the least important fraction (least important first), [S + 2].
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
        """Symmetric relevance gain: the mean of LIF - MIF over the fractions between 0 and 1.

        About 0 for a random map; negating a map negates it. (Blücher et al., TMLR 2024, take the area over
        evenly spaced fractions; here they halve, as a large slide's evidence may lie in a hundredth of it.)
        """
        return float((self.lif - self.mif)[1:-1].mean()) if len(self.fractions) > 2 else 0.0


def curves(game: CoalitionGame, order: Int64, target_index: int) -> Curves:
    """Curves of the output `target_index` for an `order` [G] of the players, most important first.

    Raises as `CoalitionGame.values` does.
    """
    players = len(order)
    counts = halving_counts(players)
    kept = np.concatenate([_without_first(order, counts), _without_first(order[::-1], counts)])
    base, full = (float(end[target_index]) for end in game.base_and_full)
    mif, lif = (np.array([full, *inner, base]) for inner in game.values(kept)[:, target_index].reshape(2, -1))
    return Curves(np.array([0, *counts, players]) / players, mif, lif)


def halving_counts(players: int) -> Int64:
    """1/512, 1/256, … 1/2 of the players as whole numbers above 0, increasing."""
    counts = np.unique(np.rint(players / 2.0 ** np.arange(1, HALVINGS + 1)).astype(np.int64))
    return counts[counts > 0]


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
