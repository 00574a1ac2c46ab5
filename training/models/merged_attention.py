"""Dilated attention of a slide that fits into one segment, as one softmax instead of one per branch.

Merging branches by their softmax mass is one softmax (Ding et al. 2023, arXiv 2307.02486, eq. 9-11):

    out_i = sum_j c_ij e^(q_i k_j) v_j / (sum_j c_ij e^(q_i k_j) + z_i)

with c_ij the number of branches in which i and j share segment and dilation phase, and z_i the padding keys
of the branches that cover i, each of which counts e^0. Where all tokens lie in one segment, c_ij depends on
the two positions modulo the dilations only: a head knows few classes of positions (with the published
dilations no more than branches). So ln c_ij is an inner product of further channels: a query holds a row of
ln c, a key a 1 for its class. The padding is one more key with the logit ln z_i. What is left is plain
attention, which any fused kernel computes.

The exception is a published quirk: a branch whose log-sum-exp is exactly 0 counts for nothing. It is 0 where
a padding key outweighs all other keys of its branch beyond rounding. So further channels of the values
measure each branch's share of the softmax, and where one is that small next to the padding's,
`merged_attention` declines. (Without padding only a coincidence of logits makes a log-sum-exp exactly 0; that
is not reproduced.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

NO_KEY = -1e20
"""ln of a count of 0, near enough: a key that a query does not see."""
NO_PADDING = -1e10
"""The same for padding; above `NO_KEY`, so that a query without any key gets the padding's value, 0."""
ROUNDING = 2.0**-23
"""Next to a padding key (e^0), a branch's mass below 2^-24 is lost in float32. Twice that, to be safe."""


@dataclass(frozen=True)
class Overlaps:
    """How branches overlap in one segment, for positions modulo `period` P, H heads and B branches.

    Attributes:
        covers: bool [P, H, B], whether a branch covers a position.
        queries, keys: f32 [P, H, C]; the inner product over C is ln of the number of branches that cover both
            of two positions.
    """

    period: int
    covers: NDArray[np.bool_]
    queries: NDArray[np.float32]
    keys: NDArray[np.float32]


@cache
def overlaps(dilations: tuple[int, ...], heads: int) -> Overlaps:
    """The overlaps of branches of these dilations."""
    period = math.lcm(*dilations)
    position, head = np.arange(period)[:, None], np.arange(heads)
    covers = np.stack([position % r == head // -(-heads // r) for r in dilations], axis=2)
    queries, keys = [], []
    for number in range(heads):
        classes, of_position = np.unique(covers[:, number], axis=0, return_inverse=True)
        counts = classes.astype(np.float64) @ classes.T
        log_counts = np.log(counts, out=np.full_like(counts, NO_KEY), where=counts > 0)
        told_apart = log_counts.any(axis=0)  # keys of the other class count once for every query
        queries.append(log_counts[of_position.ravel()][:, told_apart])
        keys.append(np.eye(len(classes))[of_position.ravel()][:, told_apart])
    width = max(table.shape[1] for table in keys)

    def stacked(tables: list[NDArray[np.float64]]) -> NDArray[np.float32]:
        padded = [np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in tables]
        return np.stack(padded, axis=1).astype(np.float32)

    return Overlaps(period, covers, stacked(queries), stacked(keys))


@dataclass(frozen=True)
class MergedLayout:
    """The further channels of Q queries and K keys, of which the last key is the padding.

    Attributes:
        queries: f32 [Q, H, C + 1].
        keys: f32 [K, H, C + 1].
        values: f32 [K, H, B + 1], the padding's share and each branch's.
        least: f32 [Q, H, B], a branch's share per the padding's that is too little; -1 where all are enough.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    least: Tensor

    def among(self, rows: Tensor) -> MergedLayout:
        """The layout for the tokens `rows` i64 [K] alone."""
        keys = F.pad(rows, (0, 1), value=-1)
        return MergedLayout(self.queries[rows], self.keys[keys], self.values[keys], self.least[rows])

    def class_token_only(self) -> MergedLayout:
        """The layout for token 0's query alone."""
        return replace(self, queries=self.queries[:1], least=self.least[:1])


def plan_merged(tokens: int, dilations: tuple[int, ...], heads: int, device: torch.device) -> MergedLayout:
    """Lay out `tokens` tokens that lie in one segment of every branch."""
    table = overlaps(dilations, heads)
    rows = torch.arange(tokens) % table.period
    covers, of_queries, of_keys = (
        torch.from_numpy(x)[rows] for x in (table.covers, table.queries, table.keys)
    )
    padding = torch.stack([padding_keys(tokens, r, heads) for r in dilations], dim=1)
    shared = (covers * padding).sum(dim=2, keepdim=True)
    queries = torch.cat([of_queries, shared.log().clamp(min=NO_PADDING)], dim=2)
    keys = F.pad(F.pad(of_keys, (0, 1)), (0, 0, 0, 0, 0, 1))
    keys[-1, :, -1] = 1
    values = F.pad(F.pad(covers.float(), (1, 0)), (0, 0, 0, 0, 0, 1))
    values[-1, :, 0] = 1
    # A key counts at most once per branch.
    least = torch.where(covers & (padding == 1), len(dilations) * ROUNDING / shared, -1)
    return MergedLayout(*(x.to(device) for x in (queries, keys, values, least)))


def padding_keys(tokens: int, dilation: int, heads: int) -> Tensor:
    """f32 [H], how many padding keys each head's dilated segment of all `tokens` tokens has: 0 or 1."""
    offset = torch.arange(heads) // -(-heads // dilation)
    return (
        -(-tokens // dilation) - (tokens - offset + dilation - 1).div(dilation, rounding_mode="floor")
    ).float()


def merged_attention(q: Tensor, k: Tensor, v: Tensor, layout: MergedLayout) -> Tensor | None:
    """`q` [M, Q, H, d] attended over `k` and `v` [M, K, H, d], all of them visible, into [M, Q, H, d].

    None where a branch's log-sum-exp could be exactly 0. In float32 or float64. The gradient would be the
    true one, while the published one takes the branches' weights as constants.
    """
    d = q.shape[3]
    width = -(-(d + max(layout.queries.shape[2], layout.values.shape[2])) // 8) * 8

    def widened(x: Tensor, channels: Tensor) -> Tensor:
        """[M, H, tokens, width]: `x`, a zero row where there is a channel for padding, and the channels."""
        x = F.pad(x, (0, 0, 0, 0, 0, channels.shape[0] - x.shape[1]))
        channels = channels.to(x.dtype).expand(x.shape[0], -1, -1, -1)
        x = torch.cat([x, channels], dim=3)
        return F.pad(x, (0, width - x.shape[3])).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        widened(q * d**-0.5, layout.queries), widened(k, layout.keys), widened(v, layout.values), scale=1.0
    ).transpose(1, 2)
    padding, branches = out[..., d, None], out[..., d + 1 : d + 1 + layout.least.shape[2]]
    if bool((branches < layout.least * padding).any()):
        return None
    return out[..., :d]
