"""Evidence as sets of tiles: few that alone keep the class, and few without which it is lost.

The sets are the shortest beginnings of a map's order, found by bisection: the smallest that the map knows of,
not of all that there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..arrays import Bool, Float64, Int64
from .curves import HALVINGS, halving_counts
from .methods.game import CoalitionGame


def planned_evidence(tiles: int) -> int:
    """The largest number of masks that `find_evidence` scores."""
    return 5 + 2 * (HALVINGS + 1 + int(np.ceil(np.log2(max(2, tiles)))))


@dataclass(frozen=True, eq=False)
class Evidence:
    """The evidence for the class that a slide is called, as tiles by decreasing value.

    Attributes:
        sufficient: tiles that alone are called the class; None where only the whole slide is.
        necessary: tiles without which the slide is no longer called the class; None where there are none.
        alone: the output of the sufficient tiles alone.
        without: the output of the slide without the necessary tiles.
        rest: the output of the slide without the sufficient tiles.
        recoverable: whether the rest is still called the class, so that other tiles are evidence as well.
        empty_called: whether the empty slide is called the class too: then sufficiency shows little.
    """

    sufficient: Int64 | None
    necessary: Int64 | None
    alone: float
    without: float
    rest: float
    recoverable: bool
    empty_called: bool


def find_evidence(game: CoalitionGame, order: Int64, target_index: int) -> Evidence | None:
    """The evidence for the output `target_index` along an `order` [G] of the players, most important first.

    Costs about 2 (9 + log2 G) masks at most, of which half are in the cache where the curves were measured.

    Returns None where the slide is not called the class.

    Raises as `CoalitionGame.values` does.
    """
    players = len(order)
    rank = np.empty_like(order)
    rank[order] = np.arange(players)

    def called(values: Float64) -> Bool:
        return game.outputs.calls(values)[:, target_index]

    def kept(counts: Int64) -> Float64:
        return game.values(rank[None] < counts[:, None])

    def removed(counts: Int64) -> Float64:
        return game.values(rank[None] >= counts[:, None])

    base, full = game.base_and_full
    empty_called, full_called = called(np.stack([base, full])).tolist()
    if not full_called:
        return None
    enough = shortest(lambda counts: called(kept(counts)), players)
    lost = shortest(lambda counts: ~called(removed(counts)), players)
    ends = np.array([players if enough is None else enough])
    alone, rest = kept(ends), removed(ends)
    without = base if lost is None else removed(np.array([lost]))[0]
    return Evidence(
        sufficient=None if enough in (None, players) else order[:enough],
        necessary=None if lost is None else order[:lost],
        alone=float(alone[0, target_index]),
        without=float(without[target_index]),
        rest=float(rest[0, target_index]),
        recoverable=bool(called(rest)[0]),
        empty_called=empty_called,
    )


def shortest(holds: Callable[[Int64], Bool], players: int) -> int | None:
    """The smallest count in 1..G for which `holds`, by bisection below the first halving for which it does.

    holds: for counts [M], which of them do. Where it comes and goes, one of those where it comes is found.

    Returns None if it holds at no halving and not at G.
    """
    counts = np.append(halving_counts(players), players)
    found = holds(counts)
    if not found.any():
        return None
    first = int(found.argmax())
    low, high = (int(counts[first - 1]) if first else 0), int(counts[first])
    while high - low > 1:
        middle = (low + high) // 2
        if holds(np.array([middle]))[0]:
            high = middle
        else:
            low = middle
    return high
