"""The tile encoder: the published transform, and a literal reading of its blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from training.errors import TrainingError
from training.models.presets import TileEncoderConfig
from training.models.random_init import randomise
from training.models.tile_encoder import IMAGENET_MEAN, IMAGENET_STD, TILE_SIZE, TileEncoder, centre_crop

CONFIG = TileEncoderConfig("tiny", embed_dim=48, depth=2, heads=3)


@pytest.fixture(scope="module")
def encoder() -> TileEncoder:
    model = TileEncoder(CONFIG)
    randomise(model, 0)
    return model.eval()


@pytest.fixture(scope="module")
def tiles() -> Tensor:
    """Whole tiles, uint8 [2, 256, 256, 3]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, TILE_SIZE, TILE_SIZE, 3), dtype=torch.uint8, generator=generator)


def literal(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """DINOv2's ViT with SwiGLU and LayerScale in float64: images [B, 3, 224, 224] to class tokens [B, D]."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = images.reshape(-1, 3, 14, 16, 14, 16).permute(0, 2, 4, 1, 3, 5).reshape(len(images), 196, 768)
    x = patches @ w["patch_embed.proj.weight"].reshape(48, 768).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(images), -1, -1), x], dim=1) + w["pos_embed"]
    for i in range(2):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(-1, 197, 3, 3, 16).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT) / 4).softmax(dim=-1) @ v
        y = linear(y.transpose(1, 2).reshape(-1, 197, 48), f"{block}.attn.proj")
        x = x + w[f"{block}.ls1.gamma"] * y
        first, second = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1").chunk(2, dim=-1)
        gated = first * torch.sigmoid(first) * second
        x = x + w[f"{block}.ls2.gamma"] * linear(gated, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_agrees_with_the_published_transform_and_a_literal_reading(
    encoder: TileEncoder, tiles: Tensor
) -> None:
    """Resize(256), CenterCrop(224), ToTensor, Normalize: a 256-px tile needs crop and norm only."""
    published = v2.Compose(
        [
            v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float64, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    with torch.inference_mode():
        got = encoder(centre_crop(tiles))
        want = literal(dict(encoder.vit.state_dict()), published(tiles.permute(0, 3, 1, 2)))
    assert got.shape == (2, 48)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-5


def test_the_outer_16_px_of_a_tile_are_never_seen(encoder: TileEncoder, tiles: Tensor) -> None:
    other = tiles.clone()
    other[:, :16] = other[:, -16:] = other[:, :, :16] = other[:, :, -16:] = 255
    assert torch.equal(centre_crop(other), centre_crop(tiles))
    other[:, 16, 16] = 255 - other[:, 16, 16]
    assert not torch.equal(centre_crop(other), centre_crop(tiles))


def test_refuses_what_are_no_tiles(encoder: TileEncoder, tiles: Tensor) -> None:
    with pytest.raises(
        TrainingError, match=r"float32 \[2, 224, 224, 3\]; the tile encoder takes uint8 RGB pixels"
    ):
        encoder(centre_crop(tiles).float())
    with pytest.raises(TrainingError, match=r"\[2, 256, 256, 3\]; the tile encoder takes uint8 RGB pixels"):
        encoder(tiles)
    with pytest.raises(TrainingError, match="smaller than the 224 px crop"):
        centre_crop(tiles[:, :200])
