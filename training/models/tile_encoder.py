"""The tile encoder: from uint8 RGB pixels to one embedding per tile."""

from __future__ import annotations

import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from training.errors import TrainingError
from training.models.presets import TileEncoderConfig

TILE_SIZE = 256
"""Edge of a tile in px, at 0.5 mpp."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def centre_crop(tiles: Tensor, size: int = 224) -> Tensor:
    """Cut [..., H, W, C] down to the central [..., size, size, C].

    The published transform resizes a tile to 256 px (which leaves a 256-px tile as it is) and then crops the
    centre 224 px, so the outer 16 px of a tile are never seen.
    """
    top, left = ((edge - size) // 2 for edge in tiles.shape[-3:-1])
    if top < 0 or left < 0:
        raise TrainingError(f"tiles of {tuple(tiles.shape[-3:-1])} px are smaller than the {size} px crop")
    return tiles[..., top : top + size, left : left + size, :]


class TileEncoder(nn.Module):
    """Pixel normalisation and a timm `VisionTransformer`, `vit`, with the published state-dict keys."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: TileEncoderConfig) -> None:
        super().__init__()
        self.config = config
        # timm's `vit_giant_patch14_dinov2` under the published model_args, and its ViT-S sibling.
        self.vit = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            init_values=config.layer_scale,
            mlp_layer=SwiGLUPacked,  # type: ignore[arg-type]  # a partial of GluMlp
            act_layer=nn.SiLU,
            num_classes=0,
            global_pool="token",
        )
        # On the CPU even where `training.models.build` makes the weights on the meta device.
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            constant = torch.tensor(values, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    def forward(self, tiles: Tensor) -> Tensor:
        """RGB pixels uint8 [B, 224, 224, 3] to embeddings [B, D]: the class token after the final norm."""
        embeddings: Tensor = self.vit(self._normalised(tiles))
        return embeddings

    def patch_tokens(self, tiles: Tensor) -> Tensor:
        """The same pixels to tokens [B, T, D] after the final norm: the class token, then patches by rows."""
        tokens: Tensor = self.vit.forward_features(self._normalised(tiles))
        return tokens

    def _normalised(self, tiles: Tensor) -> Tensor:
        size = self.config.image_size
        if not torch.compiler.is_exporting() and (
            tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[1:] != (size, size, 3)
        ):
            raise TrainingError(
                f"tiles are {tiles.dtype} {list(tiles.shape)}; "
                f"the tile encoder takes uint8 RGB pixels [B, {size}, {size}, 3]"
            )
        pixels = tiles.permute(0, 3, 1, 2).to(self.mean.dtype) / 255
        return (pixels - self.mean) / self.std
