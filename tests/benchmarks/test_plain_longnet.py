"""The plain attention that fused attention is timed against computes the same numbers."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plain_longnet import PlainAttention
from training.models.presets import SlideEncoderConfig
from training.models.random_init import randomise
from training.models.slide_encoder import LongNetSlideEncoder
from training.models.variant import EmbeddingVariant


@pytest.mark.parametrize("tiles", [1, 9, 150])
def test_plain_attention_agrees_with_fused(tiles: int) -> None:
    config = SlideEncoderConfig(
        "small",
        in_chans=8,
        embed_dim=32,
        depth=2,
        heads=4,
        fixed_segment_lengths=(8, 32, 64),
        dilations=(1, 2, 4),
    )
    fused = LongNetSlideEncoder(config).eval()
    randomise(fused, 0)
    plain = fused.with_attention(PlainAttention)
    generator = torch.Generator().manual_seed(tiles)
    embeddings = torch.randn(tiles, 8, generator=generator)
    coords = 256 * torch.stack([torch.arange(tiles) % 12, torch.arange(tiles) // 12], dim=1)
    keep = torch.rand(3, tiles, generator=generator) < 0.7
    keep[:, 0] = True
    with torch.inference_mode():
        for expected, got in zip(
            fused(embeddings, coords, keep), plain(embeddings, coords, keep), strict=True
        ):
            assert (expected - got).abs().max() < 1e-5
        variant = EmbeddingVariant("cls", 2, "norm")  # its last block has the class token's query alone
        expected, got = (model.embed(embeddings, coords, variant, keep) for model in (fused, plain))
        assert (expected - got).abs().max() < 1e-5
