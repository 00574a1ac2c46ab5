"""Fine-tune the slide encoder and a head on slides' tile embeddings, as a LightningModule.

Lightning drives epochs, devices, precision, checkpoints and logging. Optimisation is manual, because the
published loop steps and schedules by micro-batch and lets an epoch's leftover gradients count in the next
epoch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from gigapath_contract.probabilities import HeadKind, probabilities
from training.config import OptimSection
from training.data.dataset import SlideSample
from training.loops.metrics import evaluate
from training.loops.optim import learning_rate, parameter_groups, set_learning_rate
from training.loops.trainer import seed_epoch
from training.models.slide_model import SlideModel


class SlideFineTuner(lightning.LightningModule):
    """A `SlideModel` under the published optimisation, one slide per micro-batch."""

    class_weights: Tensor | None

    def __init__(
        self, model: SlideModel, optim: OptimSection, class_weights: Tensor | None, seed: int
    ) -> None:
        super().__init__()
        assert model.head is not None
        self.automatic_optimization = False
        self.model = model
        self.optim = optim
        self.seed = seed
        self.kind: HeadKind = model.head.config.kind
        self.classes = model.head.config.classes
        self.register_buffer("class_weights", class_weights, persistent=False)
        self._leftover: dict[str, Tensor] = {}
        self._validated: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the published parameter groups."""
        groups = parameter_groups(
            self.model,
            weight_decay=self.optim.weight_decay,
            layer_decay=self.optim.layer_decay,
            layer_ids=self.optim.layer_ids,
        )
        return torch.optim.AdamW(groups, lr=self.peak_rate)

    @property
    def peak_rate(self) -> float:
        """`base_lr` scaled to the number of slides per step, over all processes."""
        return self.optim.base_lr * self.optim.accumulate * self.trainer.world_size / 256

    def on_train_batch_start(self, batch: SlideSample, batch_idx: int) -> None:
        """Seed dropout for the epoch."""
        if batch_idx == 0:
            seed_epoch(self.seed, self.current_epoch, self.global_rank)

    def training_step(self, batch: SlideSample, batch_idx: int) -> None:
        """Accumulate one slide's gradient, and take a step after every `accumulate` slides."""
        optimizer = self.optimizers(use_pl_optimizer=True)
        assert not isinstance(optimizer, list)
        accumulate = self.optim.accumulate
        if batch_idx % accumulate == 0:
            rate = learning_rate(
                self.current_epoch + batch_idx / self.trainer.num_training_batches,
                peak=self.peak_rate,
                floor=self.optim.min_lr,
                warmup=self.optim.warmup_epochs,
                epochs=self.optim.epochs,
            )
            set_learning_rate(optimizer.optimizer, rate)
            self.log("train/learning_rate", rate)
        steps = (batch_idx + 1) % accumulate == 0
        with self._synchronised(steps or self.trainer.is_last_batch):
            logits = self.model.score(batch.features, batch.coords, batch.keep).logits
            assert logits is not None
            loss = self._loss(logits, batch.target)
            self.manual_backward(loss / accumulate)
        if steps:
            optimizer.step()
            optimizer.zero_grad()
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True, batch_size=1)

    def _synchronised(self, now: bool) -> AbstractContextManager[None]:
        """Exchange gradients between processes only before a step and at the end of an epoch."""
        strategy = self.trainer.strategy
        if now or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        blocked: AbstractContextManager[None] = strategy.block_backward_sync()
        return blocked

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss of one slide's masks, logits [M, C]."""
        if self.kind == "multiclass":
            # `reduction="mean"` would divide by the weights of the slide itself, which cancels them.
            losses = F.cross_entropy(logits.float(), target.expand(len(logits)), reduction="none")
            return losses.mean() if self.class_weights is None else losses.mean() * self.class_weights[target]
        wanted = target.reshape(-1).to(torch.float32).expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits.float(), wanted, pos_weight=self.class_weights)

    def validation_step(self, batch: SlideSample, batch_idx: int) -> None:
        """Keep one slide's logits."""
        logits = self.model.score(batch.features, batch.coords).logits
        assert logits is not None
        self._validated.append((logits.float().cpu().numpy(), batch.target.cpu().numpy()))

    def on_validation_model_zero_grad(self) -> None:
        """Keep an epoch's leftover gradients, which Lightning would reset."""

    def on_validation_epoch_end(self) -> None:
        """Metrics over the slides of all processes."""
        gathered = self._validated
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self._validated)
            gathered = [each for part in parts for each in part]
        self._validated = []
        logits, targets = (np.stack(column) for column in zip(*gathered, strict=True))
        found = evaluate(targets, probabilities(logits, self.kind), self.classes, self.kind)
        self.log_dict({f"val/{name}": value for name, value in found.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the epoch's leftover gradients."""
        checkpoint["leftover_gradients"] = {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read what `on_save_checkpoint` saved."""
        self._leftover = checkpoint["leftover_gradients"]

    def on_train_start(self) -> None:
        """Restore the leftover gradients of a resumed run."""
        for name, parameter in self.model.named_parameters():
            if name in self._leftover:
                parameter.grad = self._leftover[name].to(parameter.device)
        self._leftover = {}


@torch.inference_mode()
def predict(model: SlideModel, batches: Any) -> npt.NDArray[np.float32]:
    """Logits [n, C] of whole slides, one after the other, on the model's device in float32."""
    device = next(model.parameters()).device
    rows = []
    for batch in batches:
        logits = model.score(batch.features.to(device), batch.coords.to(device)).logits
        assert logits is not None
        rows.append(logits.float().cpu().numpy())
    return np.stack(rows)
