"""Evidence as sets of tiles: few that alone keep the class, and few without which it is lost.

Each set is first the shortest beginning of a map's order, found by bisection, and then loses what it can
spare: small sets, not proven to be the smallest that there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..arrays import Bool, Float64, Int64
from .curves import HALVINGS, halving_counts
from .methods.game import CoalitionGame

PARTS, ROUNDS = 64, 3
"""In how many parts a set is tried without one of them, and how often."""

Holds = Callable[[Bool], tuple[Bool, Float64]]
"""Which sets of players [M, G] do what they should, [M], and by how much, [M]."""


def planned_evidence(tiles: int) -> int:
    """The largest number of masks that `find_evidence` scores."""
    bisections = HALVINGS + 1 + int(np.ceil(np.log2(max(2, tiles))))
    return 5 + 2 * (bisections + ROUNDS * (PARTS + int(np.log2(PARTS))))


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

    Costs at most `planned_evidence` masks, of which some are in the cache where the curves were measured.

    Returns None where the slide is not called the class.

    Raises as `CoalitionGame.values` does.
    """

    def called(values: Float64) -> Bool:
        return game.outputs.calls(values)[:, target_index]

    def suffices(sets: Bool) -> tuple[Bool, Float64]:
        values = game.values(sets)
        return called(values), values[:, target_index]

    def is_needed(sets: Bool) -> tuple[Bool, Float64]:
        values = game.values(~sets)
        return ~called(values), -values[:, target_index]

    base, full = game.base_and_full
    empty_called, full_called = called(np.stack([base, full])).tolist()
    if not full_called:
        return None
    sufficient, necessary = smallest(suffices, order), smallest(is_needed, order)
    assert sufficient is not None  # the whole slide is called the class
    inside = np.isin(np.arange(len(order)), sufficient)
    alone, rest = game.values(np.stack([inside, ~inside]))
    without = base
    if necessary is not None:
        without = game.values(~np.isin(np.arange(len(order)), necessary)[None])[0]
    return Evidence(
        sufficient=sufficient if len(sufficient) < len(order) else None,
        necessary=necessary,
        alone=float(alone[target_index]),
        without=float(without[target_index]),
        rest=float(rest[target_index]),
        recoverable=bool(called(rest[None])[0]),
        empty_called=empty_called,
    )


def smallest(holds: Holds, order: Int64) -> Int64 | None:
    """Few players that hold, by their `order` [G]: its shortest beginning that does, less what it can spare.

    Returns None if no beginning holds.
    """
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    count = shortest(lambda counts: holds(rank < counts[:, None])[0], len(order))
    if count is None:
        return None
    inside = rank < count
    for _ in range(ROUNDS):
        before, inside = inside, _without_spare(holds, inside, order)
        if (before == inside).all():
            break
    return order[inside[order]]


def _without_spare(holds: Holds, inside: Bool, order: Int64) -> Bool:
    """A set `inside` [G] less as many of its parts along the `order` as can be spared, least loss first."""
    players = order[inside[order]]
    parts = [
        np.isin(np.arange(len(order)), part) for part in np.array_split(players, min(PARTS, len(players)))
    ]
    spared, surplus = holds(np.stack([inside & ~part for part in parts]))
    spare = [parts[number] for number in np.argsort(-surplus, kind="stable") if spared[number]]
    sets = [inside & ~np.any(spare[: last + 1], axis=0) for last in range(min(len(spare), len(parts) - 1))]
    # The first of these sets is known to hold.
    fails = _bisect(lambda counts: ~holds(sets[counts[0]][None])[0], 0, len(sets))
    return sets[fails - 1] if sets else inside


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
    return _bisect(holds, int(counts[first - 1]) if first else 0, int(counts[first]))


def _bisect(holds: Callable[[Int64], Bool], low: int, high: int) -> int:
    """A count in low + 1..high for which `holds` and not for the one below, if it does for `high` alone."""
    while high - low > 1:
        middle = (low + high) // 2
        if holds(np.array([middle]))[0]:
            high = middle
        else:
            low = middle
    return high
