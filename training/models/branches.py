"""Which tokens each branch of a dilated attention attends to: integer arithmetic, once per forward.

Dilated attention (LongNet, arXiv 2307.02486; torchscale `DilatedAttention`) is a sum of branches. A branch
cuts the sequence into segments and lets head j see every r-th token of a segment, from the head's offset.
All of that depends on the number of tokens only, so a `Branch` holds it as row numbers to gather from and to
scatter to, and every layer shares it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """Row numbers for one branch over T tokens and H heads, with n segments of m kept slots each.

    Rows count (token, head) pairs: row = token * H + head. Two tokens are made up: T is a padding slot
    (published padding is zero keys and zero queries), T + 1 a key that an attention may add to each segment.

    Attributes:
        queries: i64 [n, m, H], the row of each slot's query.
        keys: i64 [n, m + 1, H], the row of each slot's key and value, and then the added key's.
        log_padding: f32 [n, 1, H], ln of the number of padding slots of a segment (about -inf for none).
        outputs: i64 [T, H], for each token the row (slot * H + head) of the branch's output that lands on it.
        covered: bool [T, H], whether one does: a head skips the tokens between its dilated slots.
        padding: bool [T, H], whether that output is one of padding's own (see `plan_branch`).
    """

    queries: Tensor
    keys: Tensor
    log_padding: Tensor
    outputs: Tensor
    covered: Tensor
    padding: Tensor

    def class_token_only(self) -> Branch:
        """The branch for token 0's query alone: slot 0 of segment 0, for the heads without an offset."""
        heads = self.queries.shape[2]
        first = torch.arange(heads, device=self.queries.device)
        return replace(
            self,
            queries=first.view(1, 1, heads),
            keys=self.keys[:1],
            log_padding=self.log_padding[:1],
            outputs=first.view(1, heads),
            covered=self.covered[:1],
            padding=self.padding[:1],
        )

    def among(self, visible: Tensor) -> Branch:
        """The branch for the tokens that are `visible` bool [T] alone, renumbered, and one more that is not.

        Slots of the others are left out. Segments and heads keep a different number, so the last ones of a
        segment may have to be filled: with the one token more, which nobody must see. For a branch without
        `padding` outputs.
        """
        kept, (_, _, heads) = int(visible.sum()), self.queries.shape
        number = F.pad(visible.cumsum(0) - 1, (0, 2))
        number[:-2][~visible] = kept
        number[-2:] = torch.arange(kept + 1, kept + 3, device=number.device)

        rows = number[self.keys // heads] * heads + self.keys % heads
        left_out = rows[:, :-1] // heads == kept
        order = left_out.int().argsort(dim=1, stable=True)
        slots = int((~left_out).sum(dim=1).max())
        queries = rows.gather(1, order[:, :slots])

        slot, head = self.outputs[visible] // heads, self.outputs[visible] % heads
        number_of_segment, local = slot // order.shape[1], slot % order.shape[1]
        local = order.argsort(dim=1)[number_of_segment, local, head].clamp(max=slots - 1)
        outputs = (number_of_segment * slots + local) * heads + head

        def with_last(of_token: Tensor) -> Tensor:
            return F.pad(of_token, (0, 0, 0, 1))

        return Branch(
            queries,
            torch.cat([queries, rows[:, -1:]], dim=1),
            self.log_padding,
            with_last(outputs),
            with_last(self.covered[visible]),
            with_last(self.padding[visible]),
        )


def plan_branch(tokens: int, segment: int, dilation: int, heads: int, device: torch.device) -> Branch:
    """Lay out one branch of segment length `segment` and dilation `dilation` over `tokens` tokens.

    As published, outputs are laid end to end by the segment's length padded to a multiple of the dilation.
    Where the dilation doesn't divide the segment length, the outputs of later segments therefore land too
    late, and padding's own outputs land on tokens. (Of the default lengths that is 185,363 with dilation 8,
    for more tokens than that.)
    """
    length = min(tokens, segment)
    slots = -(-length // dilation)
    width = slots * dilation
    segments = -(-tokens // length)
    head = torch.arange(heads, device=device)
    offset = head // -(-heads // dilation)  # groups of ceil(H / r) heads share one

    start = torch.arange(segments, device=device)[:, None, None] * length
    slot = torch.arange(slots + 1, device=device)[:, None]
    local = slot * dilation + offset
    real = (local < length) & (start + local < tokens)
    token = torch.where(real, start + local, tokens)
    token[:, slots] = tokens + 1
    rows = token * heads + head

    kept = ((tokens - start).clamp(max=length) - offset + dilation - 1) // dilation
    log_padding = (slots - kept).float().log().clamp(min=-1e30)

    token = torch.arange(tokens, device=device)[:, None]
    number, local = token // width, token % width
    outputs = (number * slots + local // dilation) * heads + head
    covered = local % dilation == offset
    padding = (local >= length).expand(-1, heads)
    return Branch(rows[:, :slots], rows, log_padding, outputs, covered, padding)


def plan_branches(
    tokens: int,
    segment_lengths: tuple[int, ...],
    dilations: tuple[int, ...],
    heads: int,
    device: torch.device,
) -> list[Branch]:
    """Lay out every branch over `tokens` tokens (the class token and the tiles)."""
    return [
        plan_branch(tokens, segment, dilation, heads, device)
        for segment, dilation in zip(segment_lengths, dilations, strict=True)
    ]
