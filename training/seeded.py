"""Weights from a seed: the same on every machine, for a model that has no trained ones (yet)."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor, nn


def seed_weights(module: nn.Module, seed: int) -> None:
    """Fill every parameter of `module` in place, each from `seed` and its own name.

    Matrices are normal with variance 1 / fan-in; norms are 1 and biases 0, each with a little noise so that
    no term vanishes from a comparison; tokens, positions and LayerScale are small.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = np.random.default_rng([seed, zlib.crc32(name.encode())])
            draw = noise.standard_normal(tuple(parameter.shape), dtype=np.float32)
            parameter.copy_(_scaled(name, torch.from_numpy(draw)))


def _scaled(name: str, draw: Tensor) -> Tensor:
    """Standard normal `draw` as the parameter called `name` wants it."""
    kind = name.rpartition(".")[2]
    if kind == "bias" or kind in ("cls_token", "pos_embed"):
        return draw * 0.02
    if kind == "gamma":
        return 0.1 + draw * 0.02
    if draw.ndim == 1:
        return 1 + draw * 0.02
    fan_in: int = draw[0].numel()
    return draw / math.sqrt(fan_in)
