"""LongNet's dilated attention as matmul and softmax: how it runs where there is no flash kernel.

The baseline of the attribution and slide encoder benchmarks. Written from the published definition
(see `training.models.branches`): score matrices in memory, every token computed, left-out keys at minus
infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.models.dilated_attention import Selection

UNCOVERED = -1e8


@dataclass(frozen=True)
class PlainAttention:
    """An attention backend of `training.models.slide_encoder.LongNetSlideEncoder`."""

    tokens: int
    segment_lengths: tuple[int, ...]
    dilations: tuple[int, ...]
    heads: int
    device: torch.device

    def class_token_only(self) -> PlainAttention:
        return self

    def among(self, visible: Tensor) -> Selection:
        return Selection(None, visible, self)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Merged branches [M, Q, H, d] of q [M, Q, H, d], k and v [M, T, H, d] under `visible` [M, T]."""
        queries = q.shape[1]
        if queries < self.tokens:  # the class token alone
            q = F.pad(q, (0, 0, 0, 0, 0, self.tokens - queries))
        parts = [
            _branch(q, k, v, visible, min(length, self.tokens), dilation)
            for length, dilation in zip(self.segment_lengths, self.dilations, strict=True)
        ]
        weights = torch.stack([lse for _, lse in parts]).softmax(dim=0)
        merged = torch.stack([out for out, _ in parts]).mul(weights.unsqueeze(-1)).sum(dim=0)
        return merged[:, :queries]


def _branch(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, segment: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Output [M, T, H, d] and log-sum-exp [M, T, H] of one branch."""
    tokens, heads, width = q.shape[1:]
    group = -(-heads // dilation)
    offsets = torch.arange(heads) // group
    hidden = ~visible[:, :, None, None].expand(-1, -1, heads, 1)

    def cut(x: Tensor) -> Tensor:
        """[M, T, H, c] -> [M, H, segments, slots, c], every head at its own offset; padding is zeros."""
        count = -(-tokens // segment)
        channels = x.shape[-1]
        x = F.pad(x, (0, 0, 0, 0, 0, count * segment - tokens)).reshape(-1, count, segment, heads, channels)
        x = F.pad(x, (0, 0, 0, 0, 0, -segment % dilation))
        x = x.reshape(-1, count, x.shape[2] // dilation, dilation, heads, channels)
        return torch.stack([x[:, :, :, offset, head] for head, offset in enumerate(offsets.tolist())], dim=1)

    # In place where it can be: a score matrix is 64 MB for 16 heads of 1,000 tokens, and new memory is slow.
    scores = cut(q * width**-0.5) @ cut(k).transpose(-1, -2)
    scores.masked_fill_(cut(hidden.to(q.dtype)).transpose(-1, -2) > 0, -torch.inf)
    highest = scores.amax(dim=-1, keepdim=True).clamp(min=UNCOVERED)
    total = scores.sub_(highest).exp_().sum(dim=-1, keepdim=True)
    attended = scores @ cut(v) / total.clamp(min=torch.finfo(q.dtype).tiny)
    mass = (highest + total.log()).squeeze(-1).clamp(min=UNCOVERED)

    def lay(x: Tensor, empty: float) -> Tensor:
        """[M, H, segments, slots, c] -> [M, T, H, c], `empty` where a head skips a token."""
        full = x.new_full((*x.shape[:4], dilation, x.shape[4]), empty)
        for head, offset in enumerate(offsets.tolist()):
            full[:, head, :, :, offset] = x[:, head]
        return full.flatten(2, 4)[:, :, :tokens].transpose(1, 2)

    return lay(attended, 0.0), lay(mass.unsqueeze(-1), UNCOVERED).squeeze(-1)
