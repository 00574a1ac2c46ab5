"""The precisions of an export, and the slide encoder in half precision.

`fp16` is half precision throughout the tile encoder. `fp16-mixed` keeps its residual stream and norms in
float32, as PyTorch's autocast and so the published pipeline do. Both keep the slide encoder's tokens, their
norms and means in float32, and compute in half what is added to them: linear layers and attention, except
its log-sum-exp and the branches' weights (`export.longnet`).
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


WIDENED = ("proj", "out_proj", "fc2")
"""Linear layers whose output is added to the tokens."""
INNER_NORMS = ("inner_attn_ln", "ffn_layernorm")


class _HalfLinear(nn.Module):
    """A linear layer with float16 weights; its output is float32 if `widen`, else float16."""

    def __init__(self, linear: nn.Linear, widen: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().half(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().half(), requires_grad=False)
        self.widen = widen

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x.half(), self.weight, self.bias)
        return out.float() if self.widen else out


def halve(encoder: nn.Module) -> None:
    """Compute what a slide encoder adds to its tokens in float16; in place, a layer at a time."""
    for name, child in list(encoder.named_children()):
        if isinstance(child, nn.Linear):
            setattr(encoder, name, _HalfLinear(child, widen=name in WIDENED))
        elif name in INNER_NORMS:
            child.half()
        else:
            halve(child)
