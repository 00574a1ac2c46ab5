"""Which tokens each branch of a dilated attention looks at: integer arithmetic on the number of tokens, done
once a forward.

Dilated attention (LongNet, arXiv 2307.02486; torchscale `DilatedAttention`) is a sum of branches. A branch
cuts the sequence into segments and lets head j see every r-th token of a segment, from an offset of its own.
All of that depends on the number of tokens only, so a `Branch` holds it as row numbers to gather from and
scatter to, and every layer shares it.

The number of tokens may be a symbolic integer (`torch.export`): nothing here branches on it, and sizes that
can be 1 at one length and more at another are never broadcast against each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """Row numbers for one branch over T tokens and H heads, with n segments of m kept slots each.

    Rows count (token, head) pairs: row = token * H + head. Two tokens are made up: T is a padding slot
    (published padding is zero keys and zero queries), T + 1 is the key that the attention adds to each
    segment.

    Attributes:
        queries: i64 [n, m, H], the row of each slot's query.
        keys: i64 [n, m + 1, H], the row of each slot's key and value, and then the added key's.
        log_padding: f32 [n, 1, H], ln of the number of padding slots of a segment (about -inf for none).
        outputs: i64 [T, H], for each token the row (slot * H + head) of the branch's output that lands on it.
        covered: bool [T, H], whether one does: a head skips the tokens between its dilated slots.
        padding: bool [T, H], whether that output is one of padding's (see below).
    """

    queries: Tensor
    keys: Tensor
    log_padding: Tensor
    outputs: Tensor
    covered: Tensor
    padding: Tensor

    def class_token_only(self) -> Branch:
        """The branch for the query of token 0 alone, which is slot 0 of segment 0 for the heads without an
        offset.
        """
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


def plan_branch(tokens: int, segment: int, dilation: int, heads: int, device: torch.device) -> Branch:
    """Lay out one branch of segment length `segment` and dilation `dilation` over `tokens` tokens."""
    length = cast(int, torch.sym_min(tokens, segment))
    # A segment is padded to a multiple of the dilation before it is thinned out.
    width = (length + dilation - 1) // dilation * dilation
    slots = width // dilation
    segments = (tokens + length - 1) // length
    # Groups of ceil(H / r) heads share an offset.
    offset = torch.arange(heads, device=device) // -(-heads // dilation)

    def rows(slots_and_more: int) -> Tensor:
        flat = torch.arange(segments * slots_and_more, device=device)[:, None]
        number, slot = flat // slots_and_more, flat % slots_and_more
        local = slot * dilation + offset
        token = number * length + local
        real = (local < length) & (token < tokens)
        token = torch.where(real, token, tokens) + (slot == slots)
        return (token * heads + torch.arange(heads, device=device)).reshape(segments, slots_and_more, heads)

    starts = torch.arange(segments, device=device)[:, None] * length
    kept = ((tokens - starts).clamp(max=length) - offset + dilation - 1) // dilation
    log_padding = (slots - kept).float().log().clamp(min=-1e30)[:, None, :]

    # Published quirk: outputs are laid end to end by the padded `width`, not by `length`. Where the dilation
    # doesn't divide the segment, later segments land too late, and the padding's own outputs land on tokens.
    token = torch.arange(tokens, device=device)[:, None]
    number, local = token // width, token % width
    outputs = (number * slots + local // dilation) * heads + torch.arange(heads, device=device)
    covered = local % dilation == offset
    padding = (local >= length).expand(-1, heads)
    return Branch(rows(slots), rows(slots + 1), log_padding, outputs, covered, padding)


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
