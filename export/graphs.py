"""The slide encoder's graphs: PyTorch modules with the served names, shapes and types, traced to ONNX."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxscript
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from export import kept_branches, longnet, merged_attention
from export.attention import scaled_dot_product_attention
from export.lengths import require_one_length
from export.schedule import pool_before_next_layer
from export.ways import by_length
from training.models.dilated_attention import AttentionBackend
from training.models.slide_model import SlideModel

op: Any = onnxscript.opset18
OPSET = 18
"""LayerNormalization is one operator from opset 17 on; the exporter's own translations are in opset 18."""
EXTERNAL_ABOVE = 1 << 30
"""Weights of more bytes go into `model.onnx.data`, because a protobuf holds at most 2 GiB."""


class SlideGraph(nn.Module):
    """EMBEDDINGS [N, D], COORDS i64 [N, 2] to LAYERS [L+1, 2, E], SLIDE [E] and, with a head, LOGITS [C]."""

    def __init__(self, model: SlideModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeddings: Tensor, coords: Tensor) -> tuple[Tensor, ...]:
        layers, slide, logits = self.model(embeddings, coords)
        return (layers, slide) if logits is None else (layers, slide, logits)


class OcclusionGraph(nn.Module):
    """EMBEDDINGS, COORDS and KEEP bool [M, N] to SLIDE [M, E] and, with a head, LOGITS [M, C]."""

    def __init__(self, model: SlideModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeddings: Tensor, coords: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        logits, slide = self.model.score(embeddings, coords, keep)
        return (slide,) if logits is None else (slide, logits)


@dataclass(frozen=True)
class Graph:
    """A module to trace, with the names of its tensors and of their dynamic dimensions."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: tuple[dict[int, str], ...]


def slide_graph(model: SlideModel) -> onnx_ir.Model:
    """The graph of `slide_encoder`, traced."""
    branches, merged = (
        _trace(_slide_graph(model, attention))
        for attention in (longnet.OperatorAttention, merged_attention.OperatorMergedAttention)
    )
    return by_length(branches, merged, min(model.encoder.config.segment_lengths))


def _slide_graph(model: SlideModel, attention: AttentionBackend) -> Graph:
    outputs = ("LAYERS", "SLIDE") if model.head is None else ("LAYERS", "SLIDE", "LOGITS")
    return Graph(SlideGraph(_traceable(model, attention)), _slide(model), outputs, ({0: "N"}, {0: "N"}))


def occlusion_graph(model: SlideModel) -> onnx_ir.Model:
    """The graph of `slide_occlusion`, traced."""
    config = model.encoder.config
    branches, merged, kept = (
        _trace(_occlusion_graph(model, attention))
        for attention in (
            longnet.OperatorAttention,
            merged_attention.OperatorMergedAttention,
            kept_branches.OperatorKeptBranches,
        )
    )
    longest_aligned = kept_branches.longest_aligned(config.segment_lengths, config.dilations)
    return by_length(branches, merged, min(config.segment_lengths), kept, longest_aligned)


def _occlusion_graph(model: SlideModel, attention: AttentionBackend) -> Graph:
    inputs = _slide(model)
    inputs["KEEP"] = torch.ones(3, len(inputs["COORDS"]), dtype=torch.bool)
    outputs = ("SLIDE",) if model.head is None else ("SLIDE", "LOGITS")
    module = OcclusionGraph(_traceable(model, attention))
    return Graph(module, inputs, outputs, ({0: "N"}, {0: "N"}, {0: "M", 1: "N"}))


def _traceable(model: SlideModel, attention: AttentionBackend = longnet.OperatorAttention) -> SlideModel:
    """The same weights with an attention backend that is exported as ONNX operators."""
    return SlideModel(model.encoder.with_attention(attention), model.head, model.variant)


def _slide(model: SlideModel, tiles: int = 40) -> dict[str, Tensor]:
    return {
        "EMBEDDINGS": torch.zeros(tiles, model.encoder.config.in_chans),
        "COORDS": torch.zeros(tiles, 2, dtype=torch.int64),
    }


def _remainder(x: Any, divisor: Any) -> Any:
    return op.Mod(x, op.CastLike(divisor, x))


def _floor_divide(x: Any, divisor: Any, rounding_mode: str | None = None) -> Any:
    """Floor division of integers in integers; the exporter's own translation goes through floating point."""
    if rounding_mode != "floor":
        raise NotImplementedError(f"integer division with rounding_mode={rounding_mode}")
    divisor = op.CastLike(divisor, x)
    return op.Div(op.Sub(x, op.Mod(x, divisor)), divisor)


def _gelu(x: Any, approximate: str = "none") -> Any:
    """GELU in the form that ONNX Runtime fuses into one operator; it does not recognise the exporter's."""
    if approximate != "none":
        raise NotImplementedError(f"gelu with approximate={approximate}")
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0)), 0.5)


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.aten.remainder.Scalar: _remainder,
    torch.ops.aten.div.Tensor_mode: _floor_divide,
    torch.ops.aten.div.Scalar_mode: _floor_divide,
    **longnet.TRANSLATIONS,
    **kept_branches.TRANSLATIONS,
    **merged_attention.TRANSLATIONS,
}


def write_graph(graph: Graph | onnx_ir.Model, path: Path) -> int:
    """Write `graph`, traced first unless it is ONNX already, to `path`; return its number of nodes.

    Weights of more than `EXTERNAL_ABOVE` bytes go into `<path>.data`. Equal inputs give equal bytes.
    """
    model = _trace(graph) if isinstance(graph, Graph) else graph
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if size > EXTERNAL_ABOVE:
        onnx_ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    else:
        onnx_ir.save(model, path)
    onnx.checker.check_model(path)
    return len(list(model.graph))


def _trace(graph: Graph) -> onnx_ir.Model:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=tuple(
                {axis: torch.export.Dim(name, min=1) for axis, name in axes.items()} for axes in graph.dynamic
            ),
            opset_version=OPSET,
            custom_translation_table=_TRANSLATIONS,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = program.model
    _simplify(model)
    pool_before_next_layer(model)
    require_one_length(model)
    return model


def _simplify(model: onnx_ir.Model) -> None:
    """Fold constants and merge what is computed twice.

    The exporter's own `optimize=True` also applies rewrite rules, which takes most of its time and gains
    nothing: ONNX Runtime applies the same rules.
    """
    onnxscript.optimizer.fold_constants(model)
    for simplify in (
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        # The tracer records the paths of its source files on this machine.
        passes.ClearMetadataAndDocStringPass(),
        passes.NameFixPass(),
    ):
        simplify(model)
