"""Run a graph on the CPU in true half precision: every result has the type that the graph gives it.

ONNX Runtime's CPU kernels compute float16 operators in float32 and hand those results on, so what overflows
on a GPU passes there unseen. Here every operator rounds its result. Products and sums within an operator are
float32, as on tensor cores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from export.parity import HalfTensor
from export.plain import one_way
from gigapath_contract.reference import Arrays


class TrueHalf:
    """Runs the graphs of a folder as `export.build_graphs.Sessions` does, and notes their float16 tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = ""
        self._graph: onnx.GraphProto | None = None
        self._weights: dict[str, Tensor] = {}
        self._largest: dict[tuple[str, str], float] = {}
        self._layers: dict[tuple[str, str], str] = {}

    @torch.no_grad()
    def __call__(self, model: str, inputs: Arrays) -> Arrays:
        """All outputs of `model` by name."""
        if self._graph is None or self._name != model:
            self._load(model)
        assert self._graph is not None
        values = self._weights | {name: torch.from_numpy(array) for name, array in inputs.items()}
        uses = Counter(name for node in self._graph.node for name in node.input)
        wanted = {output.name for output in self._graph.output}
        for node in self._graph.node:
            given = [values[name] if name else None for name in node.input]
            for name, result in zip(node.output, _run(node, given), strict=False):
                if name:
                    values[name] = result
                    if result.dtype == torch.float16:
                        self._note(node, name, result, given)
            for name in node.input:
                uses[name] -= 1
                if not uses[name] and name not in wanted and name not in self._weights:
                    values.pop(name, None)
        return {name: values[name].numpy() for name in wanted}

    def tensors(self) -> Iterator[HalfTensor]:
        """Every float16 tensor so far, in the graphs' order; weights first."""
        for (model, name), largest in self._largest.items():
            yield HalfTensor(model, name, self._layers.get((model, name), ""), largest)

    def _load(self, model: str) -> None:
        self._graph, self._weights = None, {}
        self._graph = onnx.load(self._folder / model / "model.onnx").graph
        nodes = one_way(self._graph)  # merged attention computes in float32 what the branches do in half
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        self._name = model
        for weight in self._graph.initializer:
            values = torch.from_numpy(numpy_helper.to_array(weight).copy())
            self._weights[weight.name] = values
            if values.dtype == torch.float16:
                self._keep(weight.name, values.abs().max().item())
        del self._graph.initializer[:]
        for node in self._graph.node:
            layers = [name.rpartition(".")[0] for name in node.input if name in self._weights and "." in name]
            layers += [self._layers[model, name] for name in node.input if (model, name) in self._layers]
            for name in node.output:
                self._layers[model, name] = layers[0] if layers else ""

    def _note(self, node: NodeProto, name: str, result: Tensor, given: list[Tensor | None]) -> None:
        largest = result.abs().max().item() if result.numel() else 0.0
        if not math.isfinite(largest):
            largest = math.nan
            if all(x is None or not x.is_floating_point() or bool(x.isfinite().all()) for x in given):
                largest = _in_float32(node, given, list(node.output).index(name))
        self._keep(name, largest)

    def _keep(self, name: str, largest: float) -> None:
        before = self._largest.get((self._name, name), 0.0)
        self._largest[self._name, name] = before if before > largest or math.isnan(before) else largest


def _in_float32(node: NodeProto, given: list[Tensor | None], output: int) -> float:
    """The largest magnitude of an output that overflowed, had it not been rounded."""
    if node.op_type == "Cast":
        return float(given[0].abs().max())  # type: ignore[union-attr]
    wide = [x.float() if x is not None and x.dtype == torch.float16 else x for x in given]
    return float(list(_run(node, wide))[output].abs().max())


def _run(node: NodeProto, given: list[Tensor | None]) -> tuple[Tensor, ...]:
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    operator = _OPERATORS.get(node.op_type)
    if operator is not None:
        made = operator(*given, **attributes)
        return made if isinstance(made, tuple) else (made,)
    with np.errstate(all="ignore"):
        return _in_reference(node, given)


def _in_reference(node: NodeProto, given: list[Tensor | None]) -> tuple[Tensor, ...]:
    feeds = {name: x.numpy() for name, x in zip(node.input, given, strict=True) if x is not None}
    found = ReferenceEvaluator(node).run(None, feeds)
    return tuple(torch.from_numpy(np.array(array)) for array in found)


def _rounded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` in float32, its result in the type of its first argument."""

    def run(x: Tensor, *others: Tensor | None, **attributes: Any) -> Tensor:
        wide = (y.float() if y is not None and y.dtype == torch.float16 else y for y in (x, *others))
        return function(*wide, **attributes).to(x.dtype)

    return run


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # the operator's own names
    transB: int = 0,
) -> Tensor:
    product = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return product if c is None else product + beta * c


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, axis: int = -1, epsilon: float = 1e-5, **_: Any
) -> Tensor:
    return F.layer_norm(x, x.shape[axis:], weight, bias, epsilon)


def _skip_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.float() + residual.float() + (0.0 if added is None else added.float())
    summed = total.to(x.dtype)
    nothing = summed.new_zeros(0)
    return _rounded(_norm)(summed, weight, bias, epsilon=epsilon), nothing, nothing, summed


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 0.0,
    **_: Any,
) -> Tensor:
    if bias is not None:
        q, k, v = (x + b for x, b in zip((q, k, v), bias.chunk(3), strict=True))
    q_heads, k_heads, v_heads = (
        x.float().reshape(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (q, k, v)
    )
    attended = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, scale=scale or None)
    return attended.transpose(1, 2).flatten(2).to(q.dtype)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "MatMul": _rounded(torch.matmul),
    "Gemm": _rounded(_gemm),
    "MultiHeadAttention": _attention,
    "LayerNormalization": _rounded(_norm),
    "SkipLayerNormalization": _skip_norm,
    "QuickGelu": _rounded(lambda x, alpha: x * torch.sigmoid(alpha * x)),
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Erf": _rounded(torch.erf),
    "Softmax": _rounded(lambda x, axis=-1: torch.softmax(x, axis)),
    "Cast": lambda x, to, **_: x.to(getattr(torch, helper.tensor_dtype_to_np_dtype(to).name)),
}
"""The operators that onnx's own reference lacks or computes too slowly."""
