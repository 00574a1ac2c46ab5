"""Merged attention in ONNX: all branches of a short slide as one softmax, among the tiles that a mask keeps.

The algebra and its tables are `training.models.merged_attention`'s (read it there). As `export.longnet` does,
this is an attention backend to trace with, whose operators `TRANSLATIONS` writes in ONNX. It is right for
slides that fit into the shortest segment only. Masks are computed together, so the kept tokens of each are
filled up to as many as the fullest one has, with tokens that are no keys. Where merged attention would
decline, the query's output is NaN, and so is what depends on it: `export.ways` then takes the branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir
import onnxscript
import torch
from torch import Tensor

from export.attention import multi_head_attention
from export.longnet import FLOAT, _constant, _float, _ints
from training.models.dilated_attention import Selection
from training.models.merged_attention import NO_KEY, NO_PADDING, ROUNDING, overlaps

op: Any = onnxscript.opset18

_library: Any = torch.library  # its functions carry no types
_LIBRARY = _library.Library("gigapath", "FRAGMENT")
_LIBRARY.define("kept(Tensor visible) -> Tensor[]")
_LIBRARY.define(
    "merged_layout(Tensor rows, Tensor visible, SymInt tokens, int[] dilations, int heads, int head_dim) "
    "-> Tensor[]"
)
_LIBRARY.define("merged_attention(Tensor q, Tensor k, Tensor v, Tensor[] layout) -> Tensor")


def _fake_kept(visible: Tensor) -> list[Tensor]:
    shape = visible.shape[0], _library.get_ctx().new_dynamic_size(min=2)
    return [torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.bool)]


def _fake_layout(
    rows: Tensor, visible: Tensor, tokens: int, dilations: list[int], heads: int, head_dim: int
) -> list[Tensor]:
    masks, kept = rows.shape
    channels = width(tuple(dilations), heads, head_dim) - head_dim
    keys = torch.empty(masks, kept + 1, heads, channels)
    return [keys[:, 1:].clone(), keys, keys.clone(), torch.empty(masks, kept, heads, len(dilations))]


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor]) -> Tensor:
    return torch.empty_like(q)


for _name, _fake in (
    ("kept", _fake_kept),
    ("merged_layout", _fake_layout),
    ("merged_attention", _fake_attention),
):
    _library.register_fake(f"gigapath::{_name}", _fake, lib=_LIBRARY)


@dataclass(frozen=True)
class OperatorMergedAttention:
    """The `training.models.dilated_attention.AttentionBackend` to trace with, for slides in one segment."""

    tokens: int
    lengths: tuple[int, ...]
    dilations: tuple[int, ...]
    heads: int
    device: torch.device
    rows: Tensor | None = None
    made: dict[int, list[Tensor]] = field(default_factory=dict)

    def class_token_only(self) -> OperatorMergedAttention:
        return self

    def among(self, visible: Tensor) -> Selection:
        rows, seen = torch.ops.gigapath.kept(visible)
        return Selection(rows, seen, replace(self, rows=rows))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        head_dim = q.shape[3]
        if head_dim not in self.made:
            self.made[head_dim] = torch.ops.gigapath.merged_layout(
                self.rows, visible, self.tokens, self.dilations, self.heads, head_dim
            )
        attended: Tensor = torch.ops.gigapath.merged_attention(q, k, v, self.made[head_dim])
        return attended


def width(dilations: tuple[int, ...], heads: int, head_dim: int) -> int:
    """Channels of a head with the added ones; GPU kernels want a multiple of 8."""
    of_keys = int(overlaps(dilations, heads).keys.shape[2]) + 2
    return -(-(head_dim + max(of_keys, 1 + len(dilations))) // 8) * 8


def _kept(visible: Any) -> list[Any]:
    """ONNX of `gigapath::kept`, for `visible` bool [M, T].

    The rows of the visible tokens in their order, then of any others, i64 [M, K], and which of them are
    visible bool [M, K]. K is the largest number of visible ones.
    """
    shown = op.Cast(visible, to=FLOAT)
    most = op.ReduceMax(op.ReduceSum(shown, [1], keepdims=0), keepdims=0)
    most = op.Reshape(op.Cast(most, to=onnx_ir.DataType.INT64), [1])
    # Of equal values TopK takes those of lower index first.
    kept, rows = op.TopK(shown, most, axis=1)
    return [rows, op.Greater(kept, 0.5)]


def _layout(
    rows: Any, visible: Any, tokens: Any, dilations: Sequence[int], heads: int, head_dim: int
) -> list[Any]:
    """ONNX of `gigapath::merged_layout`: further channels of queries [M, K, H, w], of keys and values
    [M, K + 1, H, w], and a branch's least share per the padding's f32 [M, K, H, B].
    """
    table = overlaps(tuple(dilations), heads)
    covers, of_queries, of_keys = map(torch.from_numpy, (table.covers, table.queries, table.keys))
    more = width(tuple(dilations), heads, head_dim) - head_dim
    unscaled = math.sqrt(head_dim)
    count = of_keys.shape[2]
    branches = len(dilations)

    # By position modulo the period, [P, H, ...]; only the padding keys [H, B] depend on the number of tokens.
    r = _constant(torch.tensor(dilations))
    offset = _constant(torch.stack([torch.arange(heads) // -(-heads // r) for r in dilations], dim=1))
    slots = op.Div(op.Sub(op.Add(tokens, r), 1), r)
    kept = op.Div(op.Sub(op.Add(op.Sub(tokens, offset), r), 1), r)
    padding = op.Mul(op.Cast(op.Sub(slots, kept), to=FLOAT), _constant(covers.float()))
    shared = op.ReduceSum(padding, [2], keepdims=1)
    log_padding = op.Mul(op.Max(op.Log(shared), _float(NO_PADDING)), unscaled)
    log_counts = torch.nn.functional.pad(of_queries * unscaled, (1, 0), value=1.0)
    queries = op.Concat(_constant(log_counts), log_padding, axis=2)
    too_little = op.Div(float(branches * ROUNDING), op.Max(shared, 1.0))
    least = op.Where(op.Greater(padding, 0.5), too_little, -1.0)

    residue = op.Mod(rows, table.period)
    hidden = op.Unsqueeze(op.Mul(op.Sub(1.0, op.Cast(visible, to=FLOAT)), NO_KEY), [2, 3])
    hidden = op.Expand(hidden, [1, 1, heads, 1])
    keys = op.Concat(hidden, op.Gather(_constant(of_keys), residue), axis=3)
    keys = op.Pad(keys, [0, 0, 0, 0, 0, 0, 0, more - 1 - count])
    values = op.Gather(_constant(torch.nn.functional.pad(covers.float(), (1, more - 1 - branches))), residue)
    masks = op.Shape(rows, start=0, end=1)
    added = [torch.eye(more)[channel].expand(1, 1, heads, more).contiguous() for channel in (count + 1, 0)]
    keys, values = (
        op.Concat(x, op.Expand(_constant(key), op.Concat(masks, _ints(1, 1, 1), axis=0)), axis=1)
        for x, key in zip((keys, values), added, strict=True)
    )
    queries = op.Pad(op.Gather(queries, residue), [0, 0, 0, 0, 0, 0, 0, more - 2 - count])
    least = op.Where(op.Unsqueeze(visible, [2, 3]), op.Gather(least, residue), -1.0)
    return [queries, keys, values, least]


def _attention(q: Any, k: Any, v: Any, layout: Sequence[Any]) -> Any:
    """ONNX of `gigapath::merged_attention`: q [M, Q, H, d], k and v [M, K, H, d] to [M, Q, H, d]."""
    queries, keys, values, least = layout
    heads, d = q.shape[2], q.shape[3]
    branches = least.shape[3]
    half = q.dtype == onnx_ir.DataType.FLOAT16
    if half:
        q, k, v = (op.Cast(x, to=FLOAT) for x in (q, k, v))
    # Of the layout's queries as many as there are.
    queries, least = (op.Slice(x, [0], op.Shape(q, start=1, end=2), [1]) for x in (queries, least))

    def rows(x: Any, channels: Any, more: int) -> Any:
        x = op.Pad(x, [0, 0, 0, 0, 0, more, 0, 0]) if more else x
        return op.Reshape(op.Concat(x, channels, axis=3), [0, 0, -1])

    out = multi_head_attention(
        rows(q, queries, 0), rows(k, keys, 1), rows(v, values, 1), num_heads=heads, scale=d**-0.5
    )
    out = op.Reshape(out, [0, 0, heads, -1])
    share = op.Slice(out, [d + 1], [d + 1 + branches], [3])
    padding = op.Slice(out, [d], [d + 1], [3])
    declined = op.Where(op.Less(share, op.Mul(least, padding)), _float(math.nan), 0.0)
    out = op.Add(op.Slice(out, [0], [d], [3]), op.ReduceSum(declined, [3], keepdims=1))
    return op.Cast(out, to=onnx_ir.DataType.FLOAT16) if half else out


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.gigapath.kept.default: _kept,
    torch.ops.gigapath.merged_layout.default: _layout,
    torch.ops.gigapath.merged_attention.default: _attention,
}
