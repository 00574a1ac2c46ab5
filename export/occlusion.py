"""How large an occlusion request may be: its memory grows with mask-tokens, M * (N + 1)."""

from __future__ import annotations

from export.longnet import channel_width
from training.presets import SlideEncoderConfig

BUDGET_BYTES = 8 << 30
"""Memory that one `slide_occlusion` request may take beside the weights."""


def bytes_per_mask_token(config: SlideEncoderConfig) -> int:
    """Peak bytes of activations that one token of one mask needs in ONNX Runtime."""
    branches = len(config.dilations)
    rows = config.heads * channel_width(config.embed_dim // config.heads)
    return 4 * (2 * branches * rows + 3 * rows + 3 * config.embed_dim)


def max_mask_tokens(config: SlideEncoderConfig) -> int:
    """The most mask-tokens of one request within the budget."""
    return BUDGET_BYTES // bytes_per_mask_token(config)
