"""Slide encoder, embedding variant and head as one model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.models.head import ClassificationHead
from training.models.slide_encoder import LongNetSlideEncoder, one_by_one
from training.models.variant import EmbeddingVariant


class SlidePrediction(NamedTuple):
    """The output for one slide: all pooled states, the variant's vector and, with a head, its logits."""

    layers: Tensor
    slide: Tensor
    logits: Tensor | None


class SlideScore(NamedTuple):
    """Logits (with a head) and the variant's vector."""

    logits: Tensor | None
    slide: Tensor


class SlideModel(nn.Module):
    """`encoder`, the `variant` of its embedding, and a `head` on that vector (or None)."""

    def __init__(
        self, encoder: LongNetSlideEncoder, head: ClassificationHead | None, variant: EmbeddingVariant
    ) -> None:
        super().__init__()
        variant.check_depth(encoder.config.depth)
        self.encoder = encoder
        self.head = head
        self.variant = variant

    def forward(self, embeddings: Tensor, coords: Tensor, keep: Tensor | None = None) -> SlidePrediction:
        """Layers [L + 1, 2, E], slide [E] and logits [C]; each with M in front under masks `keep` [M, N].

        Arguments and errors as for `LongNetSlideEncoder.forward`.
        """
        output = self.encoder(embeddings, coords, keep)
        states = output.layers[..., self.variant.layer, :, :]
        if self.variant.norm == "encoder_norm+norm":
            states = output.encoder_norm
        slide = states[..., 0 if self.variant.pooling == "cls" else 1, :]
        return SlidePrediction(output.layers, slide, self._logits(slide))

    def score(self, embeddings: Tensor, coords: Tensor, keep: Tensor | None = None) -> SlideScore:
        """Logits [C] and slide [E] of `forward` ([M, C] and [M, E] under masks), without the other states."""
        slide = self.encoder.embed(embeddings, coords, self.variant, keep)
        return SlideScore(self._logits(slide), slide)

    def _logits(self, slide: Tensor) -> Tensor | None:
        """Logits [C] or [M, C] of `slide` [E] or [M, E]; None without a head."""
        if self.head is None:
            return None
        logits = torch.cat([self.head(row) for row in one_by_one(slide.reshape(-1, slide.shape[-1]))])
        return logits.reshape(*slide.shape[:-1], -1)
