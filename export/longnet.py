"""Dilated attention in ONNX: laid out once per forward, few nodes per layer, no score matrix.

Tracing `training.models.dilated_attention` itself gives the same numbers, but several times the nodes, and
its symbolic shape arithmetic takes minutes. So the encoder is traced with another backend,
`OperatorAttention`, whose operators `TRANSLATIONS` writes in ONNX. The method is the null key of
`training.models.fused_attention` (read it there); the layout is this module's:

* Row numbers count (token, head) pairs, so that one Gather brings a branch's slots into the
  [segments, slots, heads * channels] that `com.microsoft.MultiHeadAttention` takes, with no transpose. Row
  T * H is the padding slot, row T * H + 1 the null key.
* The further channels of keys and values are the same in all layers, and made once.
* The branches' weights are computed in one go, stacked on an axis of their own; their outputs are never
  stacked, which would be most of the memory.
* Where queries are half precision, so is everything up to the attentions' outputs, and their merge; the
  log-sum-exp and the weights in between are float32.

The parity report holds the result to PyTorch at every export.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import onnx
import onnx_ir
import onnxscript
import torch
from torch import Tensor

from export.attention import multi_head_attention
from training.models.dilated_attention import Selection
from training.models.fused_attention import NULL_VALUE, UNCOVERED, null_key

op: Any = onnxscript.opset18
FLOAT, FLOAT16, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
TINY = float(torch.finfo(torch.float32).tiny)
HALF_SMALLEST, HALF_LARGEST = 2.0**-24, float(torch.finfo(torch.float16).max)
HALF_SHARE = 256
"""Factor of the weights in a mean: a token's among 200,000 is no normal number of float16."""
HALF_ULP = torch.finfo(torch.float32).eps / 2
INVISIBLE, HALF_INVISIBLE = -1e20, -3e4
NO_PADDING = -1e30
"""ln of no padding slots, near enough."""
PER_BRANCH = 5
"""A plan lists for each branch: queries i64 [n*m*H], their shape i64 [3], keys i64 [n*(m+1)*H], their shape
i64 [3], outputs i64 [Q*H]; and then for all branches: sources i64 [B*Q*H] (the query behind each output),
covered bool, log padding f32, zero threshold f32, each [1, B, Q*H, 1].
"""

_library: Any = torch.library  # its functions carry no types
_LIBRARY = _library.Library("gigapath", "DEF")
_LIBRARY.define(
    "plan(SymInt tokens, int[] lengths, int[] dilations, int heads, int head_dim, bool first_only) "
    "-> Tensor[]"
)
_LIBRARY.define("channels(Tensor visible, int heads, int head_dim, bool half) -> Tensor[]")
_LIBRARY.define("dilated_attention(Tensor q, Tensor k, Tensor v, Tensor[] plan, Tensor[] channels) -> Tensor")


# What is made only has to have the right ranks; its lengths are known to the translations.
def _fake_plan(
    tokens: int, lengths: list[int], dilations: list[int], heads: int, head_dim: int, first_only: bool
) -> list[Tensor]:
    size = _library.get_ctx().new_dynamic_size

    def integers(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.int64)

    plan = [integers(n) for _ in lengths for n in (size(), 3, size(), 3, size())]
    outputs = size()
    stacks = [
        torch.empty(1, len(lengths), outputs, 1, dtype=t) for t in (torch.bool, torch.float, torch.float)
    ]
    return [*plan, integers(size()), *stacks]


def _fake_channels(visible: Tensor, heads: int, head_dim: int, half: bool) -> list[Tensor]:
    n, (masks, tokens) = _library.get_ctx().new_dynamic_size(), visible.shape
    kind = torch.half if half else torch.float
    more = torch.empty(masks, n, channel_width(head_dim) - head_dim, dtype=kind)
    share = torch.empty(masks, 1, tokens, dtype=kind)
    return [more, more.clone(), share, torch.empty(4, dtype=torch.int64)]


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, plan: list[Tensor], channels: list[Tensor]) -> Tensor:
    return torch.empty_like(q)


for _name, _fake in (
    ("plan", _fake_plan),
    ("channels", _fake_channels),
    ("dilated_attention", _fake_attention),
):
    _library.register_fake(f"gigapath::{_name}", _fake, lib=_LIBRARY)


@dataclass(frozen=True)
class OperatorAttention:
    """The `training.models.dilated_attention.AttentionBackend` to trace with, as calls of our operators.

    What the operators made of a forward is shared by all layers.
    """

    tokens: int
    lengths: tuple[int, ...]
    dilations: tuple[int, ...]
    heads: int
    device: torch.device
    first_only: bool = False
    made: dict[str, list[Tensor]] = field(default_factory=dict)

    def class_token_only(self) -> Self:
        return replace(self, first_only=True)

    def among(self, visible: Tensor) -> Selection:
        return Selection(None, visible, self)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        head_dim = q.shape[3]
        attended: Tensor = torch.ops.gigapath.dilated_attention(
            q, k, v, self._plan(head_dim), self._channels(visible, head_dim, q.dtype)
        )
        return attended

    def _plan(self, head_dim: int) -> list[Tensor]:
        key = f"plan {self.first_only}"
        if key not in self.made:
            self.made[key] = torch.ops.gigapath.plan(
                self.tokens, self.lengths, self.dilations, self.heads, head_dim, self.first_only
            )
        return self.made[key]

    def _channels(self, visible: Tensor, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
        if "channels" not in self.made:
            half = dtype == torch.half
            self.made["channels"] = torch.ops.gigapath.channels(visible, self.heads, head_dim, half)
        return self.made["channels"]


def channel_width(head_dim: int) -> int:
    """Channels of a head with the two added ones; GPU kernels want a multiple of 8."""
    return -(-(head_dim + 2) // 8) * 8


def _flat(x: Any) -> Any:
    return op.Reshape(x, [-1])


def _range(end: Any, shape: list[int]) -> Any:
    return op.Reshape(op.Range(0, end, 1), shape)


def _constant(values: Tensor) -> Any:
    return op.Constant(value=onnx.numpy_helper.from_array(values.numpy()))


def _ints(*values: int) -> Any:
    return _constant(torch.tensor(values))


def _float(value: float) -> Any:
    return op.Constant(value_float=value)


def _plan(
    tokens: Any,
    lengths: Sequence[int],
    dilations: Sequence[int],
    heads: int,
    head_dim: int,
    first_only: bool,
) -> list[Any]:
    """ONNX of `gigapath::plan`: `training.models.branches.plan_branch` for every branch, in int64.

    `first_only` is its `class_token_only`: the one query is token 0, the one output its own.
    """
    head = _constant(torch.arange(heads))
    channels = heads * channel_width(head_dim)
    plan: list[Any] = []
    sources: list[Any] = []
    covered: list[Any] = []
    log_padding: list[Any] = []
    threshold: list[Any] = []
    for longest, dilation in zip(lengths, dilations, strict=True):
        offset = _constant(torch.arange(heads) // -(-heads // dilation))
        length = op.Min(tokens, op.Constant(value_int=longest))
        slots = op.Div(op.Add(length, dilation - 1), dilation)
        segments = op.Div(op.Sub(op.Add(tokens, length), 1), length)
        start = op.Mul(_range(1 if first_only else segments, [-1, 1, 1]), length)

        # Rows [n, m + 1, H]: the slots of each segment, and then its null key.
        slot = _range(op.Add(slots, 1), [-1, 1])
        local = op.Add(op.Mul(slot, dilation), offset)
        token = op.Add(start, local)
        real = op.And(op.Less(local, length), op.Less(token, tokens))
        padding_row = op.Mul(tokens, heads)
        rows = op.Where(real, op.Add(op.Mul(token, heads), head), padding_row)
        keys = op.Where(op.Equal(slot, slots), op.Add(padding_row, 1), rows)

        position = _constant(torch.zeros(1, 1, dtype=torch.int64)) if first_only else _range(tokens, [-1, 1])
        number = op.Div(position, op.Mul(slots, dilation))
        local = op.Mod(position, op.Mul(slots, dilation))
        slot_number = op.Add(op.Mul(number, slots), op.Div(local, dilation))
        outputs = _flat(op.Add(op.Mul(slot_number, heads), head))
        if first_only:
            # TensorRT-RTX 1.7 crashes where attentions share a query, so each branch repeats its own
            # another number of times.
            copies = len(sources) + 1
            queries, query_slots = _constant(torch.arange(heads).repeat(copies)), _ints(copies)
        else:
            query_slots = op.Reshape(slots, [1])
            queries = _flat(op.Slice(rows, [0], query_slots, [1]))
        sources.append(op.Gather(queries, outputs))

        lands = op.Equal(op.Mod(local, dilation), offset)
        # A log-sum-exp below this counts as 0, and that as uncovered (`training.models.dilated_attention`).
        zero = op.Where(op.GreaterOrEqual(local, length), _float(0.5), _float(HALF_ULP))
        zero = op.Expand(zero, [1, heads])
        kept = op.Div(op.Add(op.Sub(op.Min(op.Sub(tokens, start), length), offset), dilation - 1), dilation)
        log_slots = op.Max(op.Log(op.Cast(op.Sub(slots, kept), to=FLOAT)), _float(NO_PADDING))
        of_output = op.Gather(_flat(log_slots), _flat(op.Add(op.Mul(number, heads), head)))
        for stack, values in ((covered, lands), (log_padding, of_output), (threshold, zero)):
            stack.append(op.Reshape(values, [1, 1, -1, 1]))

        plan += [
            queries,
            op.Concat(_ints(-1), query_slots, _ints(channels), axis=0),
            _flat(keys),
            op.Concat(_ints(-1), op.Reshape(op.Add(slots, 1), [1]), _ints(channels), axis=0),
            outputs,
        ]
    return [
        *plan,
        op.Concat(*sources, axis=0),
        *(op.Concat(*stack, axis=1) for stack in (covered, log_padding, threshold)),
    ]


def _channels(visible: Any, heads: int, head_dim: int, half: bool) -> list[Any]:
    """ONNX of `gigapath::channels`, for `visible` bool [M, T].

    The further channels of keys and of values [M, T*H + 2, width - d], each token's weight in the mean over
    the visible ones [M, 1, T] (times `HALF_SHARE`), and the shape i64 [4] of a branch's outputs as rows.
    """
    more = channel_width(head_dim) - head_dim
    invisible = HALF_INVISIBLE if half else INVISIBLE
    shown = op.Cast(visible, to=FLOAT)
    share = op.Unsqueeze(op.Div(shown, op.ReduceSum(shown, [1], keepdims=1)), [1])

    hidden = op.Unsqueeze(op.Mul(op.Sub(1.0, shown), invisible), [2])
    hidden = op.Reshape(op.Expand(hidden, [1, 1, heads]), [0, -1])
    null_channel = float(null_key(head_dim, torch.half if half else torch.float))
    bias = op.Pad(op.Pad(hidden, [0, 0, 0, 1], invisible), [0, 0, 0, 1], null_channel)
    keys = op.Pad(op.Unsqueeze(bias, [2]), [0, 0, 0, 0, 0, more - 1])

    nothing = op.Mul(hidden, 0.0)
    real = op.Pad(op.Add(nothing, 1.0), [0, 0, 0, 2])
    null = op.Pad(op.Pad(nothing, [0, 0, 0, 1]), [0, 0, 0, 1], NULL_VALUE)
    values = op.Concat(op.Unsqueeze(real, [2]), op.Unsqueeze(null, [2]), axis=2)
    values = op.Pad(values, [0, 0, 0, 0, 0, more - 2])
    if half:
        share = op.Mul(share, float(HALF_SHARE))
        keys, values, share = (op.Cast(x, to=FLOAT16) for x in (keys, values, share))
    out_shape = op.Concat(op.Shape(visible, start=0, end=1), _ints(1, -1, channel_width(head_dim)), axis=0)
    return [keys, values, share, out_shape]


def _attention(q: Any, k: Any, v: Any, plan: Sequence[Any], channels: Sequence[Any]) -> Any:
    """ONNX of `gigapath::dilated_attention`: q [M, Q, H, d], k and v [M, T, H, d] to [M, Q, H, d]."""
    *branches, sources, covered, log_padding, threshold = plan
    *tables, offset = tables_of(q, k, v, channels)
    offset = op.Gather(op.Pad(offset, [0, 0, 0, 0, 1, 0]), sources, axis=1)
    offset = op.Reshape(offset, [0, len(branches) // PER_BRANCH, -1, 1])
    return op.Reshape(
        attended(tables, branches, channels[3], offset, covered, log_padding, threshold, q),
        [0, -1, q.shape[2], q.shape[3]],
    )


def tables_of(q: Any, k: Any, v: Any, channels: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Rows with further `channels` to gather from, [M, Q*H + 1, w] of queries, [M, T*H + 2, w] of keys and of
    values; and what each query's logits lost, f32 [M, Q*H, 1].
    """
    heads, d = q.shape[2], q.shape[3]
    width, scale = channel_width(d), d**-0.5
    key_channels, value_channels, share, _ = channels
    half = q.dtype == onnx_ir.DataType.FLOAT16
    kind = torch.half if half else torch.float

    # Keys lose their mean, which a softmax doesn't notice; `offset` is what that took from each query's
    # logits.
    k, q_flat = op.Reshape(k, [0, 0, heads * d]), op.Reshape(q, [0, 0, heads * d])
    centre = op.MatMul(share, k)
    if half:
        centre = op.Mul(centre, _constant(torch.tensor(1 / HALF_SHARE, dtype=kind)))
    of_head = _constant(torch.eye(heads, dtype=kind).repeat_interleave(d, dim=0) * scale)
    offset = op.MatMul(q_flat, op.Mul(op.Transpose(centre, perm=[0, 2, 1]), of_head))
    offset = op.Reshape(op.Cast(offset, to=FLOAT) if half else offset, [0, -1, 1])

    # The first further channel of every query is 1, and so are the others, which keys have nothing in.
    one = _constant(torch.tensor(1, dtype=kind))
    queries = op.Pad(op.Pad(op.Reshape(q, [0, -1, d]), [0, 0, 0, 0, 1, 0]), [0, 0, 0, 0, 0, width - d], one)
    keys, values = (
        op.Concat(op.Pad(op.Reshape(x, [0, -1, d]), [0, 0, 0, 0, 2, 0]), further, axis=2)
        for x, further in ((op.Sub(k, centre), key_channels), (v, value_channels))
    )
    return queries, keys, values, offset


def attended(
    tables: Sequence[Any],
    branches: Sequence[Any],
    out_shape: Any,
    offset: Any,
    covered: Any,
    log_padding: Any,
    threshold: Any,
    q: Any,
) -> Any:
    """The branches' attention over `tables_of`, merged, [M, 1, Q*H, d]; `q` gives heads, width and type.

    `branches` are `PER_BRANCH` values each. `offset` f32 is broadcast to [M, B, Q*H, 1], as the last three
    are, and `out_shape` i64 [4] is [M, 1, -1, w].
    """
    queries, keys, values = tables
    heads, d = q.shape[2], q.shape[3]
    scale = d**-0.5
    half = q.dtype == onnx_ir.DataType.FLOAT16
    parts = []
    for i in range(0, len(branches), PER_BRANCH):
        query_rows, query_shape, key_rows, key_shape, outputs = branches[i : i + PER_BRANCH]
        part = multi_head_attention(
            op.Reshape(op.Gather(queries, query_rows, axis=1), query_shape),
            op.Reshape(op.Gather(keys, key_rows, axis=1), key_shape),
            op.Reshape(op.Gather(values, key_rows, axis=1), key_shape),
            num_heads=heads,
            scale=scale,
        )
        parts.append(op.Gather(op.Reshape(part, out_shape), outputs, axis=2))

    # [M, B, Q*H, 1] from here: log-sum-exp without padding, with it, and the weights of the merge.
    shares = op.Concat(*(op.Slice(part, [d], [d + 2], [3]) for part in parts), axis=1)
    if half:
        shares = op.Cast(shares, to=FLOAT)
    real, null = op.Split(shares, axis=3, num_outputs=2)
    smallest = _float(HALF_SMALLEST if half else TINY)
    some, null = op.Max(real, smallest), op.Max(null, smallest)
    null_logit = null_key(d, torch.half if half else torch.float) * scale + math.log(NULL_VALUE)
    before = op.Add(op.Add(op.Log(op.Div(some, null)), null_logit), offset)
    before = op.Where(op.Greater(real, 0.0), before, UNCOVERED)
    largest = op.Max(before, log_padding)
    total = op.Add(op.Exp(op.Sub(before, largest)), op.Exp(op.Sub(log_padding, largest)))
    lse = op.Add(op.Log(total), largest)
    factor = op.Div(op.Exp(op.Sub(before, lse)), some)
    counts = op.And(covered, op.GreaterOrEqual(op.Abs(lse), threshold))
    weight = op.Softmax(op.Where(counts, lse, UNCOVERED), axis=1)
    weight = op.Where(covered, op.Mul(weight, factor), 0.0)
    if half:
        weight = op.Cast(op.Min(weight, _float(HALF_LARGEST)), to=FLOAT16)
        # The added channels would overflow in the product. In float32 they don't, and one slice is cheaper.
        parts = [op.Slice(part, [0], [d], [3]) for part in parts]
    weights = op.Split(weight, axis=1, num_outputs=len(parts))
    merged, *others = (op.Mul(part, weight) for part, weight in zip(parts, weights, strict=True))
    for other in others:
        merged = op.Add(merged, other)
    if not half:
        merged = op.Slice(merged, [0], [d], [3])
    return op.Reshape(merged, [0, -1, heads, d])


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.gigapath.plan.default: _plan,
    torch.ops.gigapath.channels.default: _channels,
    torch.ops.gigapath.dilated_attention.default: _attention,
}
