"""The default map: Owen values on trees by look and by place, of which the deletion curves choose one.

Tiles that look alike may share evidence wherever they lie, or a place whatever it looks like. Which of the
two a model uses is not known beforehand, and on a large slide a map on the wrong tree misses most evidence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np

from ..arrays import Float32, Int64
from .curves import HALVINGS, curves, descending
from .methods.game import CoalitionGame
from .methods.partition_shap import partition_shap
from .methods.result import Attribution, Grouping
from .methods.trees import Tree, by_look, by_place, player_means

CURVE_MASKS = 2 * HALVINGS
"""Masks that the SRG of one map costs."""
LEAST_TO_CHOOSE = 128
"""With fewer masks, the choice costs more than it gains."""
MASKS_PER_TREE = 240
"""What one tree by look is given: more masks are better spent on further trees."""


def owen_map(
    game: CoalitionGame,
    embeddings: Float32,
    coords: Int64,
    *,
    group: Grouping | None = None,
    max_evals: int = 512,
    target_index: int = 0,
) -> Attribution:
    """Owen values of the players, tiles grouped as `group` says or, without it, as gives the larger SRG.

    embeddings, coords: of the tiles, [N, D] and [N, 2].
    max_evals: largest number of masks scored. To choose, each grouping is tried with a sixth of them, less
        the 36 that the SRGs cost, and the rest refines the better map; the `game` should cache the scores,
        as these are asked for again. Under 128 masks the grouping is by look.

    The result's `alternative` is the trial map by the other grouping; `srg` of both is that of the trials.
    """
    if group is not None or max_evals < LEAST_TO_CHOOSE:
        return _map(group or "look", game, embeddings, coords, max_evals, target_index)
    each = (max_evals - 2 * CURVE_MASKS) // 6
    tried: list[Attribution] = []
    for name in get_args(Grouping):
        one = _map(name, game, embeddings, coords, each, target_index)
        tried.append(replace(one, srg=_srg(game, one, target_index)))
    first, other = sorted(tried, key=lambda one: one.srg or 0.0, reverse=True)
    assert first.grouping is not None
    spent = first.evaluations + other.evaluations - 2 + 2 * CURVE_MASKS
    left = max_evals - spent
    # One tree's masks contain those of its trial; further trees share none with it.
    again = first.evaluations if _trees_for(first.grouping, left + first.evaluations) == 1 else 2
    chosen = _map(first.grouping, game, embeddings, coords, left + again, target_index)
    return replace(chosen, srg=first.srg, alternative=other, evaluations=spent + chosen.evaluations - again)


def trees(
    grouping: Grouping, embeddings: Float32, coords: Int64, feature_mask: Int64, count: int = 1
) -> list[Tree]:
    """The tree over the players by place, or `count` trees by look.

    A single tree by look sees all channels of the embeddings, each of several a random half of them.
    """
    if grouping == "place":
        return [by_place(player_means(coords, feature_mask))]
    features = player_means(embeddings, feature_mask)
    if count == 1:
        return [by_look(features)]
    width = features.shape[1]
    halves = [np.random.default_rng(number).permutation(width)[: (width + 1) // 2] for number in range(count)]
    return [by_look(features[:, np.sort(half)]) for half in halves]


def _map(
    grouping: Grouping,
    game: CoalitionGame,
    embeddings: Float32,
    coords: Int64,
    max_evals: int,
    target_index: int,
) -> Attribution:
    """The mean of the maps on all trees of a grouping that `max_evals` pays for."""
    count = _trees_for(grouping, max_evals)
    each = 2 + (max_evals - 2) // count
    maps = [
        partition_shap(game, tree, max_evals=each, target_index=target_index)
        for tree in trees(grouping, embeddings, coords, game.feature_mask, count)
    ]
    return replace(
        maps[0],
        values=np.mean([one.values for one in maps], axis=0),
        evaluations=sum(one.evaluations - 2 for one in maps) + 2,
        leaf_size=np.mean([one.leaf_size for one in maps if one.leaf_size is not None], axis=0),
        unresolved=float(np.mean([one.unresolved for one in maps])),
        grouping=grouping,
    )


def _trees_for(grouping: Grouping, max_evals: int) -> int:
    return max(1, max_evals // MASKS_PER_TREE) if grouping == "look" else 1


def _srg(game: CoalitionGame, result: Attribution, target_index: int) -> float:
    _, first_tiles = np.unique(game.feature_mask, return_index=True)
    return curves(game, descending(result.values[first_tiles, target_index]), target_index).srg
