"""Shapley values from antithetic permutation pairs, with standard errors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...arrays import Float64, Int64, KeepMask
from ...errors import ClientError
from .game import CoalitionGame
from .result import Attribution


def shapley_sampling(game: CoalitionGame, *, n_samples: int = 16, seed: int = 0) -> Attribution:
    """phi_g = mean marginal of g over `n_samples` random orders and their reverses.

    The two estimates of a pair err in opposite directions where players substitute for or need one another,
    so the pair is the sampling unit: stderr = sd(pair means) / sqrt(n_samples).
    (Mitchell et al., JMLR 2022, section 4; paired orders are exact for interactions of two players.)

    Raises:
        ClientError: fewer than 2 pairs, or the scorer fails.
    """
    if n_samples < 2:
        raise ClientError("shapley_sampling needs n_samples of at least 2: one pair has no standard error")
    rng = np.random.default_rng(seed)
    base, full = game.base_and_full
    mean = np.zeros((game.players, len(full)))
    squares = np.zeros_like(mean)
    for drawn in range(1, n_samples + 1):
        order = rng.permutation(game.players)
        pair = (_marginals(game, order, base, full) + _marginals(game, order[::-1], base, full)) / 2
        step = pair - mean
        mean += step / drawn  # Welford's update
        squares += step * (pair - mean)
    stderr = np.sqrt(squares / (n_samples - 1) / n_samples)
    return Attribution(
        "shapley_sampling",
        game.outputs.names,
        game.to_tiles(mean, share=True),
        base,
        full,
        evaluations=2 + 2 * n_samples * (game.players - 1),
        additive=True,
        stderr=game.to_tiles(stderr, share=True),
    )


def _marginals(game: CoalitionGame, order: Int64, base: Float64, full: Float64) -> Float64:
    prefixes = game.values(_prefixes(order))
    steps = np.diff(np.concatenate([base[None], prefixes, full[None]]), axis=0)
    marginals = np.empty_like(steps)
    marginals[order] = steps
    return marginals


def _prefixes(order: Int64) -> Iterator[KeepMask]:
    """The first 1, 2, … G-1 players of `order`."""
    row = np.zeros(len(order), dtype=bool)
    for player in order[:-1]:
        row[player] = True
        yield row.copy()
