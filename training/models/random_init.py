"""Random initialisation from a seed, the same on every machine, for a model without trained weights."""

from __future__ import annotations

import math
import zlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

HeadInit = Literal["uniform", "normal"]


def random_state(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """A value f32 for every parameter of `module`, each drawn from `seed` and its own name.

    Matrices are normal with variance 1 / fan-in; norms are 1 and biases 0, each with a little noise so that
    no term vanishes from a comparison; tokens, positions and LayerScale are small.
    """
    return {name: _draw(name, tuple(p.shape), seed) for name, p in module.named_parameters()}


def uniform_state(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """A value f32 for every parameter of a stack of linear layers, distributed as `nn.Linear` draws its own.

    Weights and bias are uniform in +-1 / sqrt(fan-in); the values depend on `seed` and the parameter's name.
    """
    state = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            for kind, parameter in layer.named_parameters(prefix=name):
                values = _noise(kind, seed).uniform(-bound, bound, tuple(parameter.shape))
                state[kind] = torch.from_numpy(values.astype(np.float32))
    return state


def randomise(module: nn.Module, seed: int) -> None:
    """Set every parameter of `module` in place to its `random_state`."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(_draw(name, tuple(parameter.shape), seed))


def _noise(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    draw = torch.from_numpy(_noise(name, seed).standard_normal(shape, dtype=np.float32))
    kind = name.rpartition(".")[2]
    if kind in ("bias", "cls_token", "pos_embed"):
        return draw.mul_(0.02)
    if kind == "gamma":
        return draw.mul_(0.02).add_(0.1)
    if draw.ndim == 1:
        return draw.mul_(0.02).add_(1)
    return draw.div_(math.sqrt(draw[0].numel()))
