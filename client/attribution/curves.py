"""Does removing what the map calls important change the score first? Deletion, insertion and their gain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .methods.game import CoalitionGame
from .methods.scorer import Float64, Int64, Mask

STEPS = 10


@dataclass(frozen=True)
class Curves:
    """The target's score v at `fractions` [S + 1] of the tiles, 0 and 1 included."""

    fractions: Float64
    most_first: Float64  # v without the top fraction: deletion (MIF)
    least_first: Float64  # v without the bottom fraction (LIF)

    @property
    def insertion(self) -> tuple[Float64, Float64]:
        """Fractions, and v of the top fraction alone: LIF read backwards, since the rest is then left out."""
        return 1 - self.fractions[::-1], self.least_first[::-1]

    @property
    def gain(self) -> float:
        """SRG, the symmetric relevance gain: area of LIF - area of MIF (Blücher et al., TMLR 2024).

        About 0 for a random map, and the negative for the negated map.
        """
        return area(self.fractions, self.least_first) - area(self.fractions, self.most_first)


def curves(game: CoalitionGame, order: Int64, focus: int, steps: int = STEPS) -> Curves:
    """Curves of an `order` [G] of the players, most important first, at `steps` + 1 fractions."""
    counts = np.unique(np.rint(np.linspace(0, len(order), steps + 1)).astype(np.int64))
    kept = np.concatenate([_without_first(order, counts), _without_first(order[::-1], counts)])
    most, least = game.values(kept)[:, focus].reshape(2, -1)
    return Curves(counts / len(order), most, least)


def descending(values: Float64, seed: int = 0) -> Int64:
    """Tiles [N] by falling value; equal ones at random, or an empty map would rank by slots."""
    chance = np.random.default_rng(seed).permutation(len(values))
    return np.lexsort((chance, -values)).astype(np.int64)


def random_orders(regions: Int64, count: int, seed: int) -> list[Int64]:
    """Orders of tiles [N] that take whole `regions` in random turn.

    A map is as smooth as tissue is; tiles drawn one by one would be too easy to beat.
    """
    rng = np.random.default_rng(seed)
    worth = [rng.permutation(int(regions.max()) + 1).astype(np.float64) for _ in range(count)]
    return [descending(one[regions], seed + number) for number, one in enumerate(worth)]


def area(fractions: Float64, values: Float64) -> float:
    """Area under a curve over [0, 1] by the trapezoid rule."""
    return float(np.trapezoid(values, fractions))


def spearman(a: Float64, b: Float64) -> float:
    """Rank correlation with mean ranks for ties; NaN where either is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / norm if norm > 0 else float("nan")


def _ranks(values: Float64) -> Float64:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Float64 = (last - (counts - 1) / 2)[group]
    return ranks


def _without_first(order: Int64, counts: Int64) -> Mask:
    """All players but the first `counts[s]` of `order`, [S, G]."""
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    kept: Mask = rank[None, :] >= counts[:, None]
    return kept
