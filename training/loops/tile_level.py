"""Tile level: fine-tune the tile encoder's last blocks and a linear head, as a LightningModule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import lightning
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn
from torch.utils.data import Sampler

from gigapath_contract.probabilities import probabilities
from training.config import Count, RunConfig, SelectSection
from training.loops.metrics import evaluate
from training.loops.optim import freeze, learning_rate
from training.loops.trainer import seed_epoch
from training.models.tile_encoder import TileEncoder


class TileConfig(RunConfig):
    """Everything that decides a run at the tile level.

    Attributes:
        tile_weights: as `slide_weights` of `TrainingConfig`.
        blocks: number of last blocks that are trained; 0 is a linear probe (logistic regression).
        penalty: L2 penalty of the probe, the inverse of scikit-learn's C.
        epochs, warmup_epochs: warm-up is linear, then a half cosine down to 0, both by step.
        balanced: draw `tiles_per_epoch` tiles, equally of each class; else every tile once per epoch.
        patch_drop: fraction of a tile's patches that a training step leaves out.
        stain_jitter: log standard deviation of a random factor on each colour's optical density.
        in_memory: read all tiles once, before training.
        validate_every: epochs between validations; 1 where they select the epoch.
    """

    tile_weights: str | None = None
    blocks: int = Field(default=0, ge=0)
    penalty: float = Field(default=1.0, gt=0)
    epochs: Count = 10
    warmup_epochs: float = Field(default=1, ge=0)
    batch: Count = 64
    rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    balanced: bool = False
    tiles_per_epoch: Count = 1024
    patch_drop: float = Field(default=0.0, ge=0, lt=1)
    stain_jitter: float = Field(default=0.2, ge=0)
    in_memory: bool = False
    validate_every: Count = 1
    select: SelectSection = SelectSection()

    @model_validator(mode="after")
    def _validates_where_it_selects(self) -> Self:
        if self.validate_every > 1 and (self.select.epoch == "best" or self.select.patience):
            raise ValueError("select needs every epoch's validation: set validate_every to 1")
        return self


class TileTuner(lightning.LightningModule):
    """The tile encoder's last blocks and a linear head."""

    def __init__(self, encoder: TileEncoder, classes: Sequence[str], config: TileConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.embed_dim, len(classes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.classes = classes
        self.config = config
        self._validated: list[tuple[Tensor, Tensor]] = []
        freeze_blocks(encoder, config.blocks)

    def configure_optimizers(self) -> Any:
        """AdamW without weight decay for vectors; the learning rate is set per step."""
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for parameter in self.parameters():
            if parameter.requires_grad:
                groups[parameter.ndim > 1].append(parameter)
        optimizer = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": self.config.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=self.config.rate,
        )
        steps = self.trainer.estimated_stepping_batches / self.config.epochs

        def factor(step: int) -> float:
            warmup, epochs = self.config.warmup_epochs, self.config.epochs
            return learning_rate((step + 1) / steps, peak=1, floor=0, warmup=warmup, epochs=epochs)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Leave out patches during training."""
        if self.config.patch_drop:
            self.encoder.vit.patch_drop = PatchDropout(self.config.patch_drop, num_prefix_tokens=1)

    def on_fit_end(self) -> None:
        """Use whole tiles after training."""
        self.encoder.vit.patch_drop = nn.Identity()  # type: ignore[assignment]

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Seed augmentation and dropout for the epoch."""
        if batch_idx == 0:
            seed_epoch(self.config.seed, self.current_epoch, self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch of rotated, mirrored and stain-jittered tiles."""
        pixels, target = batch
        loss = F.cross_entropy(self.head(self.encoder(augment(pixels, self.config.stain_jitter))), target)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(target))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Keep a batch's logits."""
        self._validated.append((self.head(self.encoder(batch[0])).float().cpu(), batch[1].cpu()))

    def on_validation_epoch_end(self) -> None:
        """Metrics over the validation tiles (of this process)."""
        logits, target = (torch.cat(column).numpy() for column in zip(*self._validated, strict=True))
        self._validated = []
        found = evaluate(target, probabilities(logits, "multiclass"), self.classes, "multiclass")
        self.log_dict({f"val/{name}": value for name, value in found.items()}, sync_dist=True)


def freeze_blocks(encoder: TileEncoder, train: int) -> None:
    """Train the last `train` blocks and the final norm; all blocks include the patch embedding."""
    blocks = list(encoder.vit.blocks)
    if train < len(blocks):
        freeze(encoder)
        for module in [*blocks[len(blocks) - train :], encoder.vit.norm]:
            for parameter in module.parameters():
                parameter.requires_grad_(True)


def augment(pixels: Tensor, stain_jitter: float) -> Tensor:
    """Tiles uint8 [B, H, W, 3], rotated and mirrored together, each colour's density scaled per tile."""
    turns, mirror = torch.randint(4, ()), torch.randint(2, ())
    pixels = torch.rot90(pixels, int(turns), dims=(1, 2))
    pixels = pixels.flip(2) if mirror else pixels
    factor = (torch.randn(len(pixels), 1, 1, 3, device=pixels.device) * stain_jitter).exp()
    return (255 * (pixels.float() / 255) ** factor).round().to(torch.uint8)


class TileOrder(Sampler[int]):
    """Tiles in a random order by seed and epoch: each once, or equally many of each class."""

    def __init__(self, targets: Sequence[int], config: TileConfig) -> None:
        self.targets, self.config, self.epoch = np.asarray(targets), config, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch, and on resuming."""
        self.epoch = epoch

    def _order(self) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self.config.seed, self.epoch])
        if not self.config.balanced:
            return rng.permutation(len(self.targets))
        labels = np.unique(self.targets)
        wanted = np.resize(labels, self.config.tiles_per_epoch)
        order = np.empty(len(wanted), np.int64)
        for label in labels:
            members = rng.permutation(np.flatnonzero(self.targets == label))
            order[wanted == label] = np.resize(members, (wanted == label).sum())
        return order

    def __len__(self) -> int:
        return self.config.tiles_per_epoch if self.config.balanced else len(self.targets)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order().tolist())
