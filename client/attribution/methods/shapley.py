"""Shapley values of up to some hundred players by regression, with standard errors.

Shapley values are the weighted least squares fit of an additive model to the coalitions' values (Charnes et
al. 1988; KernelSHAP). Here the fit has a Gaussian prior under which players that look alike have similar
values, so that far fewer coalitions suffice, and its posterior gives the errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...arrays import Bool, Float64
from ...errors import ClientError
from .game import CoalitionGame
from .result import Attribution

MOST_PLAYERS = 300
ALIKE = 0.9
"""The part of the prior variance that players share with those that look like them."""


@dataclass(frozen=True)
class _Fit:
    """A prior after the data: its log evidence, and the players' deviations from their mean value."""

    evidence: float
    mean: Float64  # [G]
    stderr: Float64  # [G]


def shapley_regression(
    game: CoalitionGame, features: Float64, *, max_evals: int = 512, seed: int = 0
) -> Attribution:
    """Shapley values of the players from random coalitions and their complements.

    features: [G, D], by which players look alike.
    max_evals: number of masks scored; at least 6.

    The values sum to v(all) - v(none). `stderr` is the posterior's standard deviation; two of them cover most
    values, but too few of those that stand out (docs/attribution.md).

    Raises:
        ClientError: more than 300 players, fewer than 6 masks, or the scorer fails.
    """
    players = game.players
    if players > MOST_PLAYERS:
        raise ClientError(f"shapley_regression takes at most {MOST_PLAYERS} players, not {players}")
    if max_evals < 6:
        raise ClientError("shapley_regression needs at least 6 masks: raise max_evals")
    base, full = game.base_and_full
    span = full - base
    mean, stderr = np.repeat(span[None] / players, players, axis=0), np.zeros((players, len(span)))
    chosen = np.zeros((0, players), dtype=bool)
    if players > 1:
        chosen = _coalitions(players, (max_evals - 2) // 2, np.random.default_rng(seed))
        values = game.values(np.concatenate([chosen, ~chosen])).reshape(2, len(chosen), -1)
        sizes = chosen.sum(axis=1)
        # A coalition and its complement measure the same sum of values; their mean has no even interactions.
        worth = (values[0] - base + full - values[1]) / 2 - sizes[:, None] * span / players
        weight = 1 / np.sqrt(sizes * (players - sizes))
        weight /= np.sqrt(np.square(weight).mean())
        design = weight[:, None] * (chosen - sizes[:, None] / players)
        priors = [ALIKE * kernel + (1 - ALIKE) * np.eye(players) for kernel in _kernels(features)]
        for output in range(len(span)):
            fits = [_fit(design, weight * worth[:, output], prior) for prior in priors]
            best = max(fits, key=lambda fit: fit.evidence)
            mean[:, output] += best.mean
            stderr[:, output] = best.stderr
    return game.attribution(
        "shapley_regression",
        mean,
        evaluations=2 + 2 * len(chosen),
        additive=True,
        stderr=game.to_tiles(stderr, share=True),
    )


def _coalitions(players: int, count: int, rng: np.random.Generator) -> Bool:
    """`count` random coalitions [count, G], with sizes evenly spread over 1..G-1.

    Under uniform sizes, the least squares weight of a coalition of size s is 1 / (s (G - s)).
    """
    sizes = 1 + (np.arange(count) + rng.random()) * (players - 1) // count
    ranks = rng.random((count, players)).argsort(axis=1).argsort(axis=1)
    return np.asarray(ranks < sizes[:, None])


def _kernels(features: Float64) -> list[Float64]:
    """Ways [G, G] in which players may be alike: not at all, linearly, in small and in large clusters."""
    players = len(features)
    centred = features - features.mean(axis=0)
    products = centred @ centred.T
    squares = np.diag(products)
    distances = np.maximum(squares[:, None] + squares - 2 * products, 0)
    typical = float(np.median(distances[np.triu_indices(players, 1)])) or 1.0
    linear = products / (float(squares.mean()) or 1.0)
    return [np.eye(players), linear, *(np.exp(-distances / (2 * scale * typical)) for scale in (0.25, 1))]


def _fit(design: Float64, observed: Float64, covariance: Float64) -> _Fit:
    """The posterior of values with prior covariance t² P C P, where P takes off the mean.

    t² and the noise's variance maximise the marginal likelihood: t² in closed form, their ratio on a grid.
    """
    root = np.linalg.cholesky(covariance)
    prior = np.asarray(root - root.mean(axis=0))
    left, scales, right = np.linalg.svd(design @ prior, full_matrices=False)
    variances = np.square(scales)
    along = left.T @ observed
    across = max(0.0, float(observed @ observed - along @ along))
    count = len(observed)
    best = (-np.inf, 1.0, 0.0)
    for ratio in float(variances.mean() or 1) * np.logspace(-10, 4, 71):
        total = float((np.square(along) / (variances + ratio)).sum()) + across / ratio
        amplitude = max(total / count, np.finfo(np.float64).tiny)
        log_determinant = float(np.log(variances + ratio).sum()) + (count - len(variances)) * np.log(ratio)
        best = max(best, (-(count * np.log(amplitude) + log_determinant) / 2, ratio, amplitude))
    evidence, ratio, amplitude = best
    directions = prior @ right.T
    mean = directions @ (scales / (variances + ratio) * along)
    explained = np.square(directions) @ (variances / (variances + ratio))
    left_over = np.maximum(np.square(prior).sum(axis=1) - explained, 0)
    return _Fit(float(evidence), mean - mean.mean(), np.sqrt(amplitude * left_over))
