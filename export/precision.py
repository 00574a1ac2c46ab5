"""The precisions of an export, and the slide encoder's linear layers in half precision.

`fp16` is half precision throughout the tile encoder. `fp16-mixed` keeps its residual stream, with the norms,
in float32, as PyTorch's autocast and so the published pipeline do. Both leave in the slide encoder everything
but the linear layers in float32: attention with its softmax, log-sum-exp and merge, and GELU, because the
weight of one key among 100,000 (1e-5) is below the smallest normal number of float16 (6e-5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """Types in the tile encoder: of its products and attention, and of its residual stream and norms."""

    products: torch.dtype
    residual: torch.dtype


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "fp16": Precision(torch.float16, torch.float16),
    "fp16-mixed": Precision(torch.float16, torch.float32),
}


class _HalfLinear(nn.Module):
    """A linear layer with float16 weights and a float32 output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().half(), requires_grad=False)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().half(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.half(), self.weight, self.bias).float()


def halve(module: nn.Module) -> None:
    """Convert every linear layer in `module` to float16, in place, one at a time."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, _HalfLinear(child))
        else:
            halve(child)
