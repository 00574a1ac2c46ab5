"""Captum's sampling estimators of Shapley values on a game of tiles, each tile a feature."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from captum.attr import KernelShap, ShapleyValueSampling
from torch import Tensor

from client.attribution.methods.game import CoalitionGame
from client.attribution.methods.result import Attribution


def permutation(game: CoalitionGame, target_index: int, max_evals: int) -> Attribution:
    """The mean over random orders of the players, as many as `max_evals` pays for, and at least one."""
    return _attribute(ShapleyValueSampling, game, target_index, max(1, (max_evals - 2) // game.players))


def kernel(game: CoalitionGame, target_index: int, max_evals: int) -> Attribution:
    """Least squares on coalitions whose sizes are drawn by the Shapley kernel (KernelSHAP)."""
    return _attribute(KernelShap, game, target_index, max_evals - 2)


def _attribute(estimator: Any, game: CoalitionGame, target_index: int, samples: int) -> Attribution:
    """The players' values for the output `target_index`, and 0 for the others."""

    def forward(keep: Tensor) -> Tensor:
        return torch.from_numpy(game.values(keep.numpy() > 0.5)[:, target_index])

    torch.manual_seed(0)
    found = estimator(forward).attribute(
        torch.ones(1, game.players), n_samples=samples, perturbations_per_eval=game.perturbations_per_eval
    )
    values = np.zeros((game.players, len(game.outputs.names)))
    values[:, target_index] = found[0].numpy()
    return game.attribution(estimator.__name__, values, evaluations=samples, additive=True)
