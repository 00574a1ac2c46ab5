"""Dilated attention among the tiles that masks keep, in ONNX: for slides of any length, masks together.

What `training.models.branches.Branch.among` is in PyTorch: a kept tile stays in its segment and dilation
phase, and the slots of the others are left out. Segments of which a mask keeps nothing are left out too. All
masks get as many segments and slots as the fullest needs. Layout and attention are `export.longnet`'s (read
it there), with the rows of all masks in one table. Not for misaligned segments, in which masked tiles are
computed as queries (`longest_aligned`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch
from torch import Tensor

from export.longnet import (
    FLOAT,
    HALF_ULP,
    INT64,
    NO_PADDING,
    OperatorAttention,
    _constant,
    _fake_attention,
    _flat,
    _float,
    _ints,
    _range,
    attended,
    channel_width,
    tables_of,
)
from training.models.dilated_attention import Selection

op: Any = onnxscript.opset18

_library: Any = torch.library  # its functions carry no types
_LIBRARY = _library.Library("gigapath", "FRAGMENT")
_LIBRARY.define(
    "kept_plan(Tensor visible, Tensor rows, Tensor seen, SymInt tokens, int[] lengths, int[] dilations, "
    "int heads, int head_dim, bool first_only) -> Tensor[]"
)
_LIBRARY.define("kept_attention(Tensor q, Tensor k, Tensor v, Tensor[] plan, Tensor[] channels) -> Tensor")


def _fake_plan(
    visible: Tensor,
    rows: Tensor,
    seen: Tensor,
    tokens: int,
    lengths: list[int],
    dilations: list[int],
    heads: int,
    head_dim: int,
    first_only: bool,
) -> list[Tensor]:
    size = _library.get_ctx().new_dynamic_size
    branches = [torch.empty(n, dtype=torch.int64) for _ in lengths for n in (size(), 3, size(), 3, size())]
    outputs = size()
    stacks = [torch.empty(1, len(lengths), outputs, 1, dtype=t) for t in (torch.bool, torch.float)]
    return [*branches, *stacks]


for _name, _fake in (("kept_plan", _fake_plan), ("kept_attention", _fake_attention)):
    _library.register_fake(f"gigapath::{_name}", _fake, lib=_LIBRARY)


def longest_aligned(lengths: Sequence[int], dilations: Sequence[int]) -> int | None:
    """The largest number of tokens with which no branch is misaligned; None where any number is."""
    return min((s for s, r in zip(lengths, dilations, strict=True) if s % r), default=None)


class OperatorKeptBranches(OperatorAttention):
    """The `training.models.dilated_attention.AttentionBackend` to trace with, for masks."""

    def among(self, visible: Tensor) -> Selection:
        rows, seen = torch.ops.gigapath.kept(visible)
        self.made["kept"] = [visible, rows, seen]
        return Selection(rows, seen, self)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        head_dim, plan = q.shape[3], f"plan {self.first_only}"
        if plan not in self.made:
            layout = self.tokens, self.lengths, self.dilations, self.heads, head_dim, self.first_only
            self.made[plan] = torch.ops.gigapath.kept_plan(*self.made["kept"], *layout)
        channels = self._channels(visible, head_dim, q.dtype)
        merged: Tensor = torch.ops.gigapath.kept_attention(q, k, v, self.made[plan], channels)
        return merged


def _one(scalar: Any) -> Any:
    return op.Reshape(scalar, [1])


def _integer(x: Any) -> Any:
    return op.Cast(x, to=INT64)


def _plan(
    visible: Any,
    rows: Any,
    seen: Any,
    tokens: Any,
    lengths: Sequence[int],
    dilations: Sequence[int],
    heads: int,
    head_dim: int,
    first_only: bool,
) -> list[Any]:
    """ONNX of `gigapath::kept_plan`, for `visible` bool [M, T], and `rows` and `seen` [M, K] of `kept`.

    As `gigapath::plan`, without its sources and threshold. Row numbers run on from mask to mask: one has
    Q*H + 1 rows of queries and K*H + 2 of keys.
    """
    head, channels = _constant(torch.arange(heads)), heads * channel_width(head_dim)
    masks, count = op.Shape(rows, start=0, end=1), op.Shape(rows, start=1, end=2)
    number = op.Where(seen, _range(op.Squeeze(count), [1, -1]), count)
    mask = _range(op.Squeeze(masks), [-1, 1, 1])
    padding = op.Mul(count, heads)
    first_key = op.Mul(mask, op.Add(padding, 2))
    shown = op.Cast(visible, to=FLOAT)
    plan: list[Any] = []
    covered: list[Any] = []
    log_padding: list[Any] = []
    for longest, dilation in zip(lengths, dilations, strict=True):
        offset = _constant(torch.arange(heads) // -(-heads // dilation))
        length = op.Min(tokens, op.Constant(value_int=longest))
        slots = op.Div(op.Add(length, dilation - 1), dilation)
        width = op.Mul(slots, dilation)
        segments = op.Div(op.Sub(op.Add(tokens, length), 1), length)

        # Visible tokens by mask, segment, slot and phase [M, n, m, r]: how many of a segment and phase come
        # before each one, and how many segments with any before each segment.
        cells = op.Concat(_ints(0, 0, 0), _one(op.Sub(op.Mul(segments, width), tokens)), axis=0)
        cells = op.Reshape(
            op.Pad(shown, cells), op.Concat(masks, _one(segments), _one(slots), _ints(dilation), axis=0)
        )
        before, kept = op.CumSum(cells, 2, exclusive=1), op.ReduceSum(cells, [2], keepdims=0)
        some = op.Cast(op.Greater(op.ReduceMax(kept, [2], keepdims=0), 0.0), to=FLOAT)
        segments_before = _integer(op.CumSum(some, 1, exclusive=1))
        most_slots = _one(_integer(op.ReduceMax(kept, keepdims=0)))
        most_segments = _one(_integer(op.ReduceMax(op.ReduceSum(some, [1], keepdims=0), keepdims=0)))

        # Each token's slot, counted through the segments. Invisible tokens get some slot.
        segment, phase = op.Div(rows, width), op.Mod(rows, dilation)
        slot = op.GatherElements(op.Reshape(before, [0, -1]), rows, axis=1)
        slot = op.Min(_integer(slot), op.Sub(most_slots, 1))
        new_segment = op.Min(op.GatherElements(segments_before, segment, axis=1), op.Sub(most_segments, 1))
        slot = op.Add(op.Mul(new_segment, most_slots), slot)

        # The token in each slot of a head, [M, n, m, H]: K where there is none. Invisible ones are dropped.
        total_slots = op.Mul(most_segments, most_slots)
        cells = op.Mul(total_slots, dilation)
        place = op.Where(seen, op.Add(op.Mul(slot, dilation), phase), cells)
        token = op.Expand(count, op.Concat(masks, op.Add(cells, 1), axis=0))
        token = op.Slice(op.ScatterElements(token, place, number, axis=1), [0], cells, [1])
        token = op.Reshape(token, op.Concat(_ints(0), most_segments, most_slots, _ints(dilation), axis=0))
        token = op.Gather(token, offset, axis=3)
        if first_only:
            token = op.Slice(token, [0], [1], [1])
        local = op.Where(op.Less(token, count), op.Add(op.Mul(token, heads), head), padding)
        null_keys = op.Concat(masks, _ints(1) if first_only else most_segments, _ints(1, heads), axis=0)
        keys = op.Concat(local, op.Expand(op.Add(padding, 1), null_keys), axis=2)

        if first_only:
            query_slots = _ints(1)
            queries = op.Add(op.Mul(mask, heads + 1), head)
            outputs = op.Add(op.Mul(mask, heads), head)
            segment, phase = (op.Slice(x, [0], [1], [1]) for x in (segment, phase))
        else:
            query_slots = most_slots
            queries = op.Add(local, op.Mul(op.Unsqueeze(mask, [3]), op.Add(padding, 1)))
            slot = op.Add(op.Unsqueeze(slot, [2]), op.Mul(mask, total_slots))
            outputs = op.Add(op.Mul(slot, heads), head)

        start = op.Mul(_range(segments, [-1, 1]), width)
        real = op.Div(op.Add(op.Sub(op.Min(op.Sub(tokens, start), length), offset), dilation - 1), dilation)
        log_slots = op.Max(op.Log(op.Cast(op.Sub(slots, real), to=FLOAT)), _float(NO_PADDING))
        lands = op.Equal(op.Unsqueeze(phase, [2]), offset)
        for stack, values in ((covered, lands), (log_padding, op.Gather(log_slots, segment))):
            stack.append(op.Reshape(values, [1, 1, -1, 1]))
        plan += [
            _flat(queries),
            op.Concat(_ints(-1), query_slots, _ints(channels), axis=0),
            _flat(op.Add(keys, op.Unsqueeze(first_key, [3]))),
            op.Concat(_ints(-1), op.Add(most_slots, 1), _ints(channels), axis=0),
            _flat(outputs),
        ]
    return [*plan, *(op.Concat(*stack, axis=1) for stack in (covered, log_padding))]


def _attention(q: Any, k: Any, v: Any, plan: Sequence[Any], channels: Sequence[Any]) -> Any:
    """ONNX of `gigapath::kept_attention`: q [M, Q, H, d], k and v [M, K, H, d] to [M, Q, H, d]."""
    *branches, covered, log_padding = plan
    *tables, offset = tables_of(q, k, v, channels)
    width = channel_width(q.shape[3])
    merged = attended(
        [op.Reshape(table, [1, -1, width]) for table in tables],
        branches,
        _ints(1, 1, -1, width),
        op.Reshape(offset, [1, 1, -1, 1]),
        covered,
        log_padding,
        _float(HALF_ULP),
        q,
    )
    return op.Reshape(merged, op.Shape(q))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.gigapath.kept_plan.default: _plan,
    torch.ops.gigapath.kept_attention.default: _attention,
}
