"""Necessity (leave a region out) and sufficiency (keep only a region)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .game import CoalitionGame
from .result import Attribution
from .scorer import Int64, Mask


def occlusion(game: CoalitionGame, windows: Sequence[Int64] | None = None) -> Attribution:
    """n_w = v(everything) - v(everything but w): what the slide's score loses without w.

    windows: player indices of each region to leave out (`regions.sliding_windows`); overlaps are averaged.
        One player at a time if None.

    Blind to redundancy: where several regions each suffice, none of them is necessary and all get 0.
    """
    groups = windows if windows is not None else list(np.arange(game.players)[:, None])
    base, full = game.ends()
    lost = full - game.values(_without(groups, game.players))
    total = np.zeros((game.players, len(full)))
    covered = np.zeros(game.players)
    for group, value in zip(groups, lost, strict=True):
        total[group] += value
        covered[group] += 1
    mean = np.divide(total, covered[:, None], out=np.full_like(total, np.nan), where=covered[:, None] > 0)
    return Attribution(
        "occlusion",
        game.target.names,
        game.to_tiles(mean, share=False),
        base,
        full,
        evaluations=len(groups) + 2,
        additive=False,
    )


def keep_one(game: CoalitionGame, bags: CoalitionGame | None = None) -> Attribution:
    """s_i = v(only i) - v(nothing): what one region says by itself. Not additive.

    bags: the game that scores the kept regions, with the `drop` scorer for bags of one tile (a sequence
        of two tokens, so all N of them cost about as much as two forwards); base and full come from `game`.
    """
    base, full = game.ends()
    alone = (bags or game).values(_only(game.players))
    return Attribution(
        "keep_one",
        game.target.names,
        game.to_tiles(alone - base, share=False),
        base,
        full,
        evaluations=game.players + 2,
        additive=False,
    )


def _without(groups: Sequence[Int64], players: int) -> Iterator[Mask]:
    for group in groups:
        row = np.ones(players, dtype=bool)
        row[group] = False
        yield row


def _only(players: int) -> Iterator[Mask]:
    for player in range(players):
        row = np.zeros(players, dtype=bool)
        row[player] = True
        yield row
