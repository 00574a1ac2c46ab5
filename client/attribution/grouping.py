"""The default map: Owen values on trees by look and by place, of which the deletion curves choose one.

Tiles that look alike may share evidence wherever they lie, or a place whatever it looks like. Which of the
two a model uses is not known beforehand, and on a large slide a map on the wrong tree misses most evidence.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..arrays import Float32, Int64
from .curves import HALVINGS, curves, descending
from .methods.game import CoalitionGame
from .methods.partition_shap import partition_shap
from .methods.result import Attribution, Grouping
from .methods.trees import Tree, by_look, by_place, player_means

CURVE_MASKS = 2 * HALVINGS
"""Masks that the SRG of one map costs."""
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
    max_evals: largest number of masks scored: half of them for each grouping, the masks of its SRG included.
        Under 72 masks both maps would be coarser than the choice is worth: the grouping is by look.

    The map that was not chosen is the result's `alternative`.
    """
    each = 2 + (max_evals - 2) // 2 - CURVE_MASKS
    if group is not None or max_evals < 4 * CURVE_MASKS:
        return _map(group or "look", game, embeddings, coords, max_evals, target_index)
    look, place = (_map(name, game, embeddings, coords, each, target_index) for name in ("look", "place"))
    gains = [_srg(game, one, target_index) for one in (look, place)]
    look, place = (replace(one, srg=gain) for one, gain in zip((look, place), gains, strict=True))
    chosen, other = (look, place) if gains[0] >= gains[1] else (place, look)
    spent = look.evaluations + place.evaluations - 2 + 2 * CURVE_MASKS
    return replace(chosen, alternative=other, evaluations=spent)


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
    count = max(1, max_evals // MASKS_PER_TREE) if grouping == "look" else 1
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


def _srg(game: CoalitionGame, result: Attribution, target_index: int) -> float:
    _, first_tiles = np.unique(game.feature_mask, return_index=True)
    return curves(game, descending(result.values[first_tiles, target_index]), target_index).srg
