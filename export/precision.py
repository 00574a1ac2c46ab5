"""Mixed half precision: float16 linear layers, convolutions and tile-encoder attention, the rest float32.

PyTorch's autocast, and so the published pipeline, does the same on a GPU: the residual stream, LayerNorm,
LayerScale, pooling and the head stay in float32. In the slide encoder only the linear layers are float16:
attention with its softmax, log-sum-exp and merge, and GELU, stay in float32, because the weight of one key
among 100,000 (1e-5) is below the smallest normal number of float16 (6e-5).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _HalfLinear(nn.Module):
    """A linear layer with float16 weights; its output is float32 if `widen`, else float16."""

    def __init__(self, linear: nn.Linear, widen: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().half(), requires_grad=False)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().half(), requires_grad=False)
        self.widen = widen

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x.half(), self.weight, self.bias)
        return out.float() if self.widen else out


class _HalfConv(nn.Module):
    """A convolution with float16 weights."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.half().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.half())
        return out


def halve(module: nn.Module, *, widen: bool) -> None:
    """Convert every linear layer and convolution in `module` to float16, in place, one at a time.

    `widen`: linear layers return float32, so that everything between them is computed in float32.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, _HalfLinear(child, widen))
        elif isinstance(child, nn.Conv2d):
            setattr(module, name, _HalfConv(child))
        else:
            halve(child, widen=widen)
