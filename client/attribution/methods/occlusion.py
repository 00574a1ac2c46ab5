"""Necessity (leave a region out) and sufficiency (keep only a region)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ...arrays import Int64, KeepMask
from .game import CoalitionGame
from .result import Attribution


def occlusion(game: CoalitionGame, windows: Sequence[Int64] | None = None) -> Attribution:
    """n_w = v(all) - v(all but w): what the score loses without the window w.

    windows: player indices of each window to occlude (`regions.sliding_windows`); overlaps are averaged.
        One player at a time if None.

    Does not see redundancy: where several regions each suffice, none is necessary and all get 0.
    """
    groups = windows if windows is not None else list(np.arange(game.players)[:, None])
    _, full = game.base_and_full
    lost = full - game.values(_without(groups, game.players))
    total = np.zeros((game.players, len(full)))
    covered = np.zeros(game.players)
    for group, value in zip(groups, lost, strict=True):
        total[group] += value
        covered[group] += 1
    mean = np.divide(total, covered[:, None], out=np.full_like(total, np.nan), where=covered[:, None] > 0)
    return game.attribution("occlusion", mean, evaluations=len(groups) + 2, additive=False)


def keep_one(game: CoalitionGame, alone: CoalitionGame | None = None) -> Attribution:
    """s_i = v(i alone) - v(none): what the score gains from one region alone.

    alone: the game that scores the single regions, `game` if None. With the `drop` scorer each is a sequence
        of two tokens, and all N of them cost about two forwards. base and full come from `game`.
    """
    base, _ = game.base_and_full
    values = (alone or game).values(~row for row in _without(range(game.players), game.players))
    return game.attribution("keep_one", values - base, evaluations=game.players + 2, additive=False)


def _without(groups: Iterable[Int64 | int], players: int) -> Iterator[KeepMask]:
    for group in groups:
        row = np.ones(players, dtype=bool)
        row[group] = False
        yield row
