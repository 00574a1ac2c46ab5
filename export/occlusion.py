"""How large an occlusion request may be: its memory grows with mask-tokens, M * (N + 1)."""

from __future__ import annotations

from export.longnet import channel_width
from training.models.presets import SlideEncoderConfig


def bytes_per_mask_token(config: SlideEncoderConfig) -> int:
    """Peak bytes of activations that one token of one mask needs in ONNX Runtime on a CPU.

    Fitted to measurements: 1 to 16 masks of 1,000 to 8,000 tiles took 23 to 26 kB per token with `demo`
    (the formula gives 27 kB) and 73 to 88 kB with `gigapath-flash` (88 kB). Most of it is taken by the
    gathered rows of all branches and their merge.
    """
    branches = len(config.dilations)
    rows = config.heads * channel_width(config.embed_dim // config.heads)
    return 4 * (40 * rows + 20 * config.heads * branches)


def max_mask_tokens(config: SlideEncoderConfig, budget: int) -> int:
    """The largest number of mask-tokens of one request within `budget` bytes, in addition to the weights."""
    return budget // bytes_per_mask_token(config)
