"""A tile encoder's graph, operator by operator, with every tensor rounded to its type.

ONNX Runtime on a CPU computes half-precision operators in float32 and rounds where it likes, so it
shows neither what half precision costs on a GPU nor an overflow. Here a product is rounded as on a GPU:
it is summed up in float32, and the result is half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

TYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


@torch.no_grad()
def run_rounded(model: ir.Model, tiles: Tensor) -> tuple[Tensor, dict[str, float]]:
    """EMBEDDINGS of uint8 `tiles`, and the largest magnitude of every half-precision tensor by name.

    An overflow is inf there. The graph is one of `export.tile_graph`.
    """
    values: dict[ir.Value, Tensor] = {model.graph.inputs[0]: tiles}
    largest: dict[str, float] = {}
    for node in model.graph:
        inputs = [values[x] if x in values else _weight(x) for x in node.inputs if x is not None]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        outputs = _OPERATORS[node.op_type](*inputs, **attributes)
        used = (value for value in node.outputs if value.name)
        for value, output in zip(used, outputs if isinstance(outputs, tuple) else (outputs,), strict=True):
            values[value] = output
            if output.dtype == torch.float16:
                largest[str(value.name)] = output.float().abs().max().item()
    return values[model.graph.outputs[0]], largest


def _weight(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy().copy())


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = x.float() @ weight.float()
    return (product if bias is None else product + bias.float()).to(x.dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float, **_: Any) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), epsilon).to(x.dtype)


def _skip_norm(
    x: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, bias: Tensor, *, epsilon: float
) -> tuple[Tensor, Tensor]:
    total = x.float() + bias.float() + residual.float()
    normed = F.layer_norm(total, total.shape[-1:], weight.float(), norm_bias.float(), epsilon)
    return normed.to(x.dtype), total.to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, num_heads: int, scale: float) -> Tensor:
    q, k, v = (
        (x + own).reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)
        for x, own in zip((q, k, v), bias.chunk(3), strict=True)
    )
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def _pad(x: Tensor, pads: Tensor) -> Tensor:
    first, last = pads.tolist()[: x.ndim], pads.tolist()[x.ndim :]
    return F.pad(x, [each for pair in zip(reversed(first), reversed(last), strict=True) for each in pair])


_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Mul": torch.mul,
    "Cast": lambda x, *, to: x.to(TYPES[ir.DataType(to)]),
    "Gather": lambda x, index, *, axis: x.select(axis, int(index)),
    "Gemm": _matmul,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "MultiHeadAttention": _attention,
    "Pad": _pad,
    "QuickGelu": lambda x, *, alpha: (x.float() * torch.sigmoid(alpha * x.float())).to(x.dtype),
    "Reshape": lambda x, shape: x.reshape(shape.tolist()),
    "SkipLayerNormalization": _skip_norm,
    "Transpose": lambda x, *, perm: x.permute(*perm),
}
