"""The model presets: `gigapath` and `gigapath-flash` as published, `demo` the same for a laptop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from training.errors import TrainingError
from training.models.variant import KNOWN_VARIANTS, EmbeddingVariant, get_variant


@dataclass(frozen=True)
class TileEncoderConfig:
    """A ViT tile encoder with SwiGLU blocks and LayerScale, as timm's `VisionTransformer` takes it.

    `mlp_ratio` counts both halves of the SwiGLU: the published 5.33334 makes 8192 of 1536, gated to 4096.
    """

    name: str
    embed_dim: int
    depth: int
    heads: int
    mlp_ratio: float = 5.33334
    patch_size: int = 16
    image_size: int = 224
    layer_scale: float = 1e-5

    @property
    def tokens(self) -> int:
        """Tokens of a tile: the class token and one per patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


def segment_lengths(max_wsi_size: int, tile_size: int, branches: int = 5) -> tuple[int, ...]:
    """Segment lengths of the dilated attention, evenly in log2 from 1024 to the longest, as published.

    The published formula is `power(2, linspace(log2(1024), int(log2((max_wsi_size // tile_size) ** 2)), 5))`,
    cut to integers (Prov-GigaPath, `get_optimal_segment_length`). NumPy computes it here too, so that the
    cuts are the same.
    """
    longest = (max_wsi_size // tile_size) ** 2
    if longest < 1:
        raise TrainingError(f"max_wsi_size {max_wsi_size} is smaller than one tile of {tile_size} px")
    powers = np.linspace(np.log2(1024), int(np.log2(longest)), branches)
    return tuple(int(length) for length in np.power(2, powers))


@dataclass(frozen=True)
class SlideEncoderConfig:
    """A LongNet slide encoder (Prov-GigaPath, `LongNetViT`).

    Attributes:
        name: the published architecture's name, for the contract.
        in_chans: width D of a tile embedding.
        embed_dim: width E of a token.
        depth: number of blocks L.
        max_wsi_size: slide edge in px from which the segment lengths derive.
        tile_size: edge in px of one cell of the position grid.
        grid: cells of the position grid per axis.
        fixed_segment_lengths: segment lengths that replace the derived ones.
        dropout, drop_path_rate: the published defaults; they act in training mode only.
    """

    name: str
    in_chans: int
    embed_dim: int
    depth: int
    heads: int = 16
    ffn_ratio: int = 4
    dilations: tuple[int, ...] = (1, 2, 4, 8, 16)
    max_wsi_size: int = 262_144
    tile_size: int = 256
    grid: int = 1000
    fixed_segment_lengths: tuple[int, ...] | None = None
    dropout: float = 0.25
    drop_path_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.embed_dim % self.heads or self.embed_dim % 4:
            raise TrainingError(
                f"slide encoder {self.name}: embed_dim {self.embed_dim} must be a multiple "
                f"of its {self.heads} heads and of 4"
            )
        if (
            len(self.segment_lengths) != len(self.dilations)
            or min(*self.segment_lengths, *self.dilations) < 1
        ):
            raise TrainingError(
                f"slide encoder {self.name}: segment lengths {self.segment_lengths} and "
                f"dilations {self.dilations} must be positive and as many"
            )

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """One segment length per dilation."""
        if self.fixed_segment_lengths is not None:
            return self.fixed_segment_lengths
        return segment_lengths(self.max_wsi_size, self.tile_size, len(self.dilations))


@dataclass(frozen=True)
class Preset:
    """A tile encoder, a slide encoder that takes its embeddings, class names and the default variant.

    Without class names there is no head.
    """

    name: str
    tile: TileEncoderConfig
    slide: SlideEncoderConfig
    classes: tuple[str, ...] = ()
    variant: EmbeddingVariant = field(default_factory=EmbeddingVariant)

    def with_variant(self, name: str) -> Preset:
        """This preset with the variant and segment lengths of a public code path (`KNOWN_VARIANTS`).

        Raises TrainingError where there is none of that name, or the slide encoder has too few blocks for it.
        """
        published = get_variant(name)
        published.variant.check_depth(self.slide.depth)
        return replace(
            self, variant=published.variant, slide=replace(self.slide, max_wsi_size=published.max_wsi_size)
        )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "gigapath",
            TileEncoderConfig("gigapath_tile_enc_vitg", embed_dim=1536, depth=40, heads=24),
            SlideEncoderConfig("gigapath_slide_enc12l768d", in_chans=1536, embed_dim=768, depth=12),
            variant=KNOWN_VARIANTS["upstream-readme"].variant,
        ),
        Preset(
            "gigapath-flash",
            TileEncoderConfig("gigapath_tile_enc_dinov2s", embed_dim=384, depth=12, heads=6),
            SlideEncoderConfig("gigapath_slide_enc12l384d", in_chans=384, embed_dim=384, depth=12),
            variant=KNOWN_VARIANTS["upstream-readme"].variant,
        ),
        Preset(
            "demo",
            TileEncoderConfig("demo_tile_enc3l96d", embed_dim=96, depth=3, heads=3),
            SlideEncoderConfig("demo_slide_enc4l96d", in_chans=96, embed_dim=96, depth=4),
            classes=("benign", "lesion"),
            variant=EmbeddingVariant("cls", 4, "norm", "level0/256"),
        ),
    )
}


def get_preset(name: str) -> Preset:
    """The preset of that name; a `TrainingError` lists the names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise TrainingError(f"no preset {name!r}; choose one of {', '.join(PRESETS)}") from None
