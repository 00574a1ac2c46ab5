"""Dilated attention, exact, on any device, in memory linear in the tokens.

LongNet (Ding et al. 2023, arXiv 2307.02486) as torchscale computes it: every branch is softmax attention
within dilated segments, and branches are merged, per token and head, by their share of the softmax mass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from training.models.branches import Branch, plan_branches
from training.models.fused_attention import UNCOVERED, kernel_attention, lse_kernel, null_key_attention
from training.models.merged_attention import MergedLayout, merged_attention, plan_merged


class DilatedAttention(Protocol):
    """Dilated attention laid out for one number of tokens; all layers of a forward share it."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """`q` [M, Q, H, d] attended over `k` and `v` [M, T, H, d] under `visible` bool [M, T]."""
        ...

    def class_token_only(self) -> DilatedAttention:
        """The same for token 0's query alone, Q = 1."""
        ...

    def among(self, visible: Tensor) -> Selection:
        """What to compute where only the tokens `visible` bool [M, T] count, the first one included."""
        ...


class Selection(NamedTuple):
    """The tokens to compute, K of T.

    Attributes:
        rows: i64 [M, K]; None for all of them.
        visible: bool [M, K], which of them count.
        attention: dilated attention over them.
    """

    rows: Tensor | None
    visible: Tensor
    attention: DilatedAttention


AttentionBackend = Callable[[int, tuple[int, ...], tuple[int, ...], int, torch.device], DilatedAttention]
"""Lays dilated attention out: tokens, segment lengths, dilations (one per branch), heads and device."""


@dataclass(frozen=True)
class FusedAttention:
    """`dilated_attention` over branches, which are laid out when they are first needed."""

    branches: Callable[[], list[Branch]]
    merged: Callable[[], MergedLayout] | None
    """The layout for `merged_attention`, where all tokens lie in one segment."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return dilated_attention(q, k, v, self.branches(), visible)

    def class_token_only(self) -> FusedAttention:
        return replace(self, branches=cache(lambda: _first_only(self.branches())))

    def among(self, visible: Tensor) -> Selection:
        """For one mask at a time. Under gradients all tokens: those of merged attention are not published."""
        (seen,) = visible
        if torch.is_grad_enabled():
            return Selection(None, visible, self)
        if self.merged is None and (seen.all() or any(branch.padding.any() for branch in self.branches())):
            return Selection(None, visible, self)
        rows = seen.nonzero()[:, 0]
        attention = VisibleAttention(
            branches=cache(lambda: [branch.among(seen) for branch in self.branches()]),
            merged=None if self.merged is None else self.merged().among(rows),
        )
        return Selection(rows[None], visible[:, rows], attention)


@dataclass(frozen=True)
class VisibleAttention:
    """Dilated attention among tokens that are all visible: `merged_attention`, else `dilated_attention`."""

    branches: Callable[[], list[Branch]]
    """For the tokens and one more that is not visible."""
    merged: MergedLayout | None
    first_only: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        if self.merged is not None and q.dtype in (torch.float32, torch.float64):
            merged = merged_attention(q, k, v, self.merged)
            if merged is not None:
                return merged
        queries = q.shape[1]
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, one)) for x, one in ((q, not self.first_only), (k, 1), (v, 1)))
        return dilated_attention(q, k, v, self.branches(), F.pad(visible, (0, 1)))[:, :queries]

    def class_token_only(self) -> VisibleAttention:
        merged = None if self.merged is None else self.merged.class_token_only()
        return VisibleAttention(cache(lambda: _first_only(self.branches())), merged, first_only=True)

    def among(self, visible: Tensor) -> Selection:
        return Selection(None, visible, self)


def _first_only(branches: list[Branch]) -> list[Branch]:
    return [branch.class_token_only() for branch in branches]


def plan_fused_attention(
    tokens: int,
    segment_lengths: tuple[int, ...],
    dilations: tuple[int, ...],
    heads: int,
    device: torch.device,
) -> FusedAttention:
    """The default `AttentionBackend`: PyTorch's fused kernels."""
    return FusedAttention(
        cache(lambda: plan_branches(tokens, segment_lengths, dilations, heads, device)),
        cache(lambda: plan_merged(tokens, dilations, heads, device))
        if tokens <= min(segment_lengths)
        else None,
    )


def dilated_attention(q: Tensor, k: Tensor, v: Tensor, branches: list[Branch], visible: Tensor) -> Tensor:
    """Merge the branches' attention of `q` [M, Q, H, d] over `k`, `v` [M, T, H, d] into [M, Q, H, d].

    Q is T, or 1 with branches made by `Branch.class_token_only`. `visible` bool [M, T]: a token that isn't
    is no key in any branch; every other token keeps its slot. The weights of the merge carry no gradient,
    as published.
    """
    kernel = lse_kernel(q)
    if kernel is not None:
        attend = kernel_attention(kernel, q, k, v, visible)
    elif q.dtype in (torch.float32, torch.float64):
        attend = null_key_attention(q, k, v, visible)
    else:
        return dilated_attention(q.float(), k.float(), v.float(), branches, visible).to(q.dtype)

    parts = [attend(branch) for branch in branches]
    weights = torch.stack(
        [_log_weight(b, part.lse) for b, part in zip(branches, parts, strict=True)]
    ).softmax(dim=0)
    merged = torch.zeros_like(q).flatten(1, 2)
    for branch, part, weight in zip(branches, parts, weights.unbind(), strict=True):
        rows = branch.outputs.flatten()
        # Where no branch covers a token the weights still sum to 1, and the output is 0.
        share = torch.where(branch.covered.flatten(), weight * part.factor.index_select(1, rows), 0)
        share = share.clamp(max=torch.finfo(q.dtype).max).to(q.dtype)
        merged = merged + part.out.index_select(1, rows)[..., : q.shape[-1]] * share.unsqueeze(-1)
    return merged.reshape(q.shape)


def _log_weight(branch: Branch, lse: Tensor) -> Tensor:
    """The branch's log-sum-exp where it lands, [M, Q * H], without gradient, and `UNCOVERED` elsewhere."""
    lse = lse.detach().index_select(1, branch.outputs.flatten())
    # Published quirk: a log-sum-exp of exactly 0 counts as uncovered. It is 0 where the one padding key
    # outweighs all real ones beyond rounding, and for a padding query that sees a single key.
    rounding = torch.finfo(lse.dtype).eps / 2
    zero = lse.abs() < torch.where(branch.padding, 0.5, rounding).flatten()
    return torch.where(branch.covered.flatten() & ~zero, lse, UNCOVERED)
