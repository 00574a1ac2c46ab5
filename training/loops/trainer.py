"""Set up Lightning: devices, a checkpoint after each epoch, curves, and exact resuming."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from training.config import ResourceSection, SelectSection
from training.errors import TrainingError
from training.models.weights import UNREADABLE

CHECKPOINTS, LAST, BEST = "checkpoints", "last", "best"


def build_trainer(
    folder: Path,
    resources: ResourceSection,
    select: SelectSection,
    *,
    epochs: int,
    log_every: int,
    bar: bool,
    validate_every: int = 1,
) -> lightning.Trainer:
    """A trainer that keeps its checkpoints and curves in `folder`."""
    if resources.threads:
        torch.set_num_threads(resources.threads)
    monitor = f"val/{select.monitor}"
    precision = resources.precision
    if precision == "auto":
        on_gpu = resources.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        precision = "16-mixed" if on_gpu else "32-true"
    callbacks: list[Callback] = [_Bar()] if bar else []
    if select.patience:
        callbacks.append(_Patience(monitor, mode="max", patience=select.patience, check_finite=False))
    if select.epoch == "best":
        callbacks.append(_checkpoint(folder, BEST, monitor))
    callbacks.append(_checkpoint(folder, LAST))  # after the others: it holds their state
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    return lightning.Trainer(
        accelerator=resources.accelerator,
        devices=resources.devices,
        num_nodes=resources.nodes,
        strategy=resources.strategy,
        precision=precision,
        max_epochs=epochs,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder, name=None, version="tensorboard"),
        deterministic=True,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=validate_every,
        log_every_n_steps=log_every,
        enable_progress_bar=bar,
        enable_model_summary=False,
    )


def fit(
    trainer: lightning.Trainer,
    module: lightning.LightningModule,
    folder: Path,
    train: DataLoader[Any],
    val: DataLoader[Any],
    select: SelectSection,
) -> None:
    """Train, resuming after the last whole epoch of an interrupted run; then load the epoch to keep.

    The sampler of `train` needs `set_epoch`. Raises TrainingError if the user interrupts, or a
    checkpoint can't be loaded.
    """
    last = folder / CHECKPOINTS / f"{LAST}.ckpt"
    if last.exists():
        # Lightning asks for the resumed epoch's order before it says which epoch that is.
        train.sampler.set_epoch(_load(last)["epoch"] + 1)  # type: ignore[attr-defined]
    trainer.fit(module, train, val, ckpt_path=last if last.exists() else None, weights_only=True)
    if trainer.interrupted:
        raise TrainingError("interrupted: run the same command to resume after the last whole epoch")
    if select.epoch == "best":
        module.load_state_dict(_load(folder / CHECKPOINTS / f"{BEST}.ckpt")["state_dict"])


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed PyTorch from these alone, so that a resumed run draws the same random numbers.

    Call it at the epoch's first batch, not at the epoch's start: the loader draws a random number before the
    start in a run's first and in a resumed epoch, and after it in all others.
    """
    entropy = np.random.SeedSequence([seed, epoch, rank])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


def _load(path: Path) -> dict[str, Any]:
    """One of our own checkpoints, with optimiser and loop state in addition to the weights.

    Raises:
        TrainingError: it holds anything else than tensors and plain values, or is damaged.
    """
    try:
        # Only tensors and plain values: a checkpoint that someone else made must not run code.
        found: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(found["epoch"], int) or not isinstance(found["state_dict"], dict):
            raise ValueError("no epoch and weights in it")
    except (*UNREADABLE, TypeError) as error:
        raise TrainingError(
            f"{path} is no checkpoint of this program, or damaged: delete {path.parent} to start over"
        ) from error
    return dict(found)


def _checkpoint(folder: Path, name: str, monitor: str | None = None) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder / CHECKPOINTS,
        filename=name,
        monitor=monitor,
        mode="max",
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


class _Bar(RichProgressBar):
    """The bar without the logger's version, which is the same in every run."""

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}


class _Patience(EarlyStopping):
    """Early stopping that also stops a run which is resumed after it had stopped."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True
