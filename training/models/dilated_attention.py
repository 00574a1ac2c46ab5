"""Dilated attention, exact, on any device, in memory linear in the tokens.

LongNet (Ding et al. 2023, arXiv 2307.02486) as torchscale computes it: every branch is softmax attention
within dilated segments, and branches are merged, per token and head, by their share of the softmax mass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from training.models.branches import Branch, plan_branches
from training.models.fused_attention import UNCOVERED, kernel_attention, lse_kernel, null_key_attention


class DilatedAttention(Protocol):
    """Dilated attention laid out for one number of tokens; all layers of a forward share it."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """`q` [M, Q, H, d] attended over `k` and `v` [M, T, H, d] under `visible` bool [M, T]."""
        ...

    def class_token_only(self) -> DilatedAttention:
        """The same for token 0's query alone, Q = 1."""
        ...


AttentionBackend = Callable[[int, tuple[int, ...], tuple[int, ...], int, torch.device], DilatedAttention]
"""Lays dilated attention out: tokens, segment lengths, dilations (one per branch), heads and device."""


@dataclass(frozen=True)
class FusedAttention:
    """`dilated_attention` over branches that are laid out."""

    branches: list[Branch]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return dilated_attention(q, k, v, self.branches, visible)

    def class_token_only(self) -> FusedAttention:
        return FusedAttention([branch.class_token_only() for branch in self.branches])


def plan_fused_attention(
    tokens: int,
    segment_lengths: tuple[int, ...],
    dilations: tuple[int, ...],
    heads: int,
    device: torch.device,
) -> FusedAttention:
    """The default `AttentionBackend`: PyTorch's fused kernels."""
    return FusedAttention(plan_branches(tokens, segment_lengths, dilations, heads, device))


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
        share = torch.where(branch.covered.flatten(), weight * part.factor.index_select(1, rows), 0).to(
            q.dtype
        )
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
