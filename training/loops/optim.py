"""The published optimiser: parameter groups with layer decay, learning rates by step."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from training.models.slide_model import SlideModel

LayerIds = Literal["published", "corrected"]


def layer_id(name: str, depth: int, layer_ids: LayerIds) -> int:
    """Depth of a parameter in the slide model: 0 the class token, i + 1 block i, depth + 1 the rest.

    The released fine-tuning code (Prov-GigaPath, `finetune/utils.py`) means to give the tile projection id 0
    like the class token, but looks for its name without the prefix it has there; it gets the head's id.
    """
    if name == "encoder.cls_token" or (layer_ids == "corrected" and name.startswith("encoder.patch_embed.")):
        return 0
    if name.startswith("encoder.encoder.layers."):
        return int(name.split(".")[3]) + 1
    return depth + 1


def parameter_groups(
    model: SlideModel, *, weight_decay: float, layer_decay: float, layer_ids: LayerIds
) -> list[dict[str, Any]]:
    """AdamW's groups of all trained parameters; `lr_scale` is a group's factor of the learning rate.

    The factor is layer_decay^(depth + 1 - id) (BEiT, MAE); vectors have no weight decay.
    """
    depth = model.encoder.config.depth
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decays = layer_id(name, depth, layer_ids), parameter.ndim > 1
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(epoch: float, *, peak: float, floor: float, warmup: float, epochs: float) -> float:
    """The rate at a fractional `epoch`: linear warm-up to `peak`, then a half cosine down to `floor`."""
    if epoch < warmup:
        return peak * epoch / warmup
    progress = min(1.0, (epoch - warmup) / max(epochs - warmup, 1e-9))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set each group's learning rate to `rate` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def freeze_unreached(model: SlideModel) -> list[str]:
    """Freeze what the logits don't depend on (blocks above the variant's layer); returns the names.

    Weights without a gradient would not change either, but data-parallel training waits for all gradients.
    """
    config = model.encoder.config
    device = next(model.parameters()).device
    tiles = torch.zeros(2, config.in_chans, device=device)
    coords = torch.tensor([[0, 0], [config.tile_size, 0]], device=device)
    logits = model.score(tiles, coords).logits
    assert logits is not None
    torch.autograd.backward(logits.sum())
    frozen = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
        parameter.grad = None
    return frozen


def freeze(module: nn.Module) -> None:
    """Freeze every parameter of `module`."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
