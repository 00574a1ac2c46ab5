"""Presets: published sizes, key for key, and segment lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training.errors import TrainingError
from training.models.presets import Preset, SlideEncoderConfig, get_preset, segment_lengths
from training.models.random_init import random_state
from training.models.slide_encoder import LongNetSlideEncoder
from training.models.tile_encoder import TileEncoder
from training.models.variant import EmbeddingVariant
from training.models.weights import load_strict

GIGAPATH_TILE = {
    "cls_token": (1, 1, 1536),
    "pos_embed": (1, 197, 1536),
    "patch_embed.proj.weight": (1536, 3, 16, 16),
    "patch_embed.proj.bias": (1536,),
    "norm.weight": (1536,),
    "norm.bias": (1536,),
}
GIGAPATH_TILE_BLOCK = {
    "norm1.weight": (1536,),
    "norm1.bias": (1536,),
    "norm2.weight": (1536,),
    "norm2.bias": (1536,),
    "attn.qkv.weight": (4608, 1536),
    "attn.qkv.bias": (4608,),
    "attn.proj.weight": (1536, 1536),
    "attn.proj.bias": (1536,),
    "ls1.gamma": (1536,),
    "ls2.gamma": (1536,),
    "mlp.fc1.weight": (8192, 1536),
    "mlp.fc1.bias": (8192,),
    "mlp.fc2.weight": (1536, 4096),
    "mlp.fc2.bias": (1536,),
}
GIGAPATH_SLIDE = {
    "cls_token": (1, 1, 768),
    "patch_embed.proj.weight": (768, 1536),
    "patch_embed.proj.bias": (768,),
    "encoder.layer_norm.weight": (768,),
    "encoder.layer_norm.bias": (768,),
    "norm.weight": (768,),
    "norm.bias": (768,),
}
GIGAPATH_SLIDE_BLOCK = {
    **{f"self_attn.{p}_proj.weight": (768, 768) for p in ("k", "v", "q", "out")},
    **{f"self_attn.{p}_proj.bias": (768,) for p in ("k", "v", "q", "out")},
    **{f"self_attn.inner_attn_ln.{p}": (768,) for p in ("weight", "bias")},
    **{f"self_attn_layer_norm.{p}": (768,) for p in ("weight", "bias")},
    **{f"final_layer_norm.{p}": (768,) for p in ("weight", "bias")},
    **{f"ffn.ffn_layernorm.{p}": (3072,) for p in ("weight", "bias")},
    "ffn.fc1.weight": (3072, 768),
    "ffn.fc1.bias": (3072,),
    "ffn.fc2.weight": (768, 3072),
    "ffn.fc2.bias": (768,),
}


def on_meta(preset: Preset) -> tuple[TileEncoder, LongNetSlideEncoder]:
    """The preset's encoders, without their gigabytes."""
    with torch.device("meta"):
        return TileEncoder(preset.tile), LongNetSlideEncoder(preset.slide)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_gigapath_has_the_published_keys_shapes_and_sizes() -> None:
    tile, slide = on_meta(get_preset("gigapath"))
    tile_keys = {**GIGAPATH_TILE}
    slide_keys = {**GIGAPATH_SLIDE}
    for i in range(40):
        tile_keys |= {f"blocks.{i}.{name}": shape for name, shape in GIGAPATH_TILE_BLOCK.items()}
    for i in range(12):
        slide_keys |= {f"encoder.layers.{i}.{name}": shape for name, shape in GIGAPATH_SLIDE_BLOCK.items()}
    assert {name: tuple(t.shape) for name, t in tile.vit.state_dict().items()} == tile_keys
    assert {name: tuple(t.shape) for name, t in slide.state_dict().items()} == slide_keys
    assert len(slide_keys) == 247
    assert parameters(tile) == 1_134_953_984
    assert parameters(slide) == 86_330_880


def test_gigapath_slide_encoder_loads_a_state_dict_in_the_published_layout() -> None:
    _, slide = on_meta(get_preset("gigapath"))
    load_strict(slide, random_state(slide, 0), "seed")
    embeddings = torch.randn(5, 1536, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = slide.eval()(embeddings, torch.arange(10).reshape(5, 2) * 256)
    assert output.layers.shape == (13, 2, 768)
    assert output.layers.isfinite().all()


def test_flash_has_the_published_sizes() -> None:
    tile, slide = on_meta(get_preset("gigapath-flash"))
    assert parameters(slide) == 21_489_408
    shapes = {name: tuple(tensor.shape) for name, tensor in tile.vit.state_dict().items()}
    assert shapes["blocks.11.mlp.fc1.weight"] == (2048, 384)
    assert shapes["blocks.11.mlp.fc2.weight"] == (384, 1024)
    assert "blocks.12.mlp.fc1.weight" not in shapes


def test_demo_is_small_enough_to_commit_in_half_precision() -> None:
    tile, slide = on_meta(get_preset("demo"))
    head = 96 * 2 + 2
    assert parameters(tile) + parameters(slide) + head <= 950_000


@pytest.mark.parametrize(
    ("max_wsi_size", "want"),
    [
        (262_144, (1024, 5792, 32768, 185363, 1048576)),
        (250_000, (1024, 4870, 23170, 110217, 524288)),
        (4_096, (1024, 724, 512, 362, 256)),
    ],
)
def test_segment_lengths_are_the_published_integers(max_wsi_size: int, want: tuple[int, ...]) -> None:
    lengths = segment_lengths(max_wsi_size, 256)
    assert lengths == want
    assert all(type(length) is int for length in lengths)


def test_a_published_variant_sets_segment_lengths_too() -> None:
    preset = get_preset("gigapath").with_variant("panda-finetune")
    assert preset.variant == EmbeddingVariant("cls", 11, "norm", "level0/256")
    assert preset.slide.segment_lengths == (1024, 4870, 23170, 110217, 524288)
    with pytest.raises(TrainingError, match="layer 11 does not exist; choose 0 to 4"):
        get_preset("demo").with_variant("trident")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 100}, "multiple of its 16 heads"),
        ({"fixed_segment_lengths": (8, 16)}, "must be positive and as many"),
        ({"fixed_segment_lengths": (8, 16, 0, 4, 5)}, "must be positive"),
        ({"max_wsi_size": 100}, "smaller than one tile"),
    ],
)
def test_refuses_a_config_that_is_none(change: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        replace(SlideEncoderConfig("x", 4, 32, 2), **change)  # type: ignore[arg-type]


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(
        TrainingError, match="no preset 'gigapth'; choose one of gigapath, gigapath-flash, demo"
    ):
        get_preset("gigapth")
