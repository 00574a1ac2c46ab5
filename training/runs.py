"""From a recipe to run folders: check the data, train each fold, evaluate, write down what was done."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from training.bag_data import Batch, EpochOrder, Share, SlideBags
from training.bags import check_bags
from training.build import build_models
from training.errors import TrainingError
from training.finetune import SlideFineTuner, predict
from training.folds import SPLITS, Fold, check_fold, make_folds, read_presplit, read_split_column
from training.head import HeadConfig
from training.metrics import evaluate, indicator, intervals, probabilities
from training.optim import freeze, freeze_unreached
from training.recipe import Recipe
from training.run_folder import save_run
from training.run_record import (
    METRICS,
    open_record,
    read_metrics,
    summarise,
    write_metrics,
    write_predictions,
)
from training.slide_model import SlideModel
from training.tables import Slide, Table, Task, read_slides

LAST, BEST = "last", "best"  # checkpoints


@dataclass(frozen=True)
class Plan:
    """A recipe whose data has been checked: its folds, and the digests of every file they read."""

    recipe: Recipe
    task: Task
    folds: tuple[Fold, ...]
    digests: dict[str, str]

    def folders(self, out: Path) -> list[Path]:
        """Each fold's run folder: `out` itself where there is one fold."""
        return [out] if len(self.folds) == 1 else [out / f"fold_{k}" for k in range(len(self.folds))]


def plan_runs(recipe: Recipe, progress: Callable[[int, int], None] = lambda done, total: None) -> Plan:
    """Read labels, splits and every bag once. Raises TrainingError for the first thing that is wrong."""
    data, task = recipe.data, recipe.task.task()
    table = Table(data.labels)
    slides = read_slides(table, task)
    if data.splits is not None:
        folds = [read_presplit(data.splits, number, slides) for number in range(data.folds)]
    elif data.folds > 1:
        folds = make_folds(slides, data.folds, data.val_share, recipe.seed)
    else:
        folds = [read_split_column(table, slides)]
    for fold in folds:
        check_fold(fold, task)
        if recipe.optim.accumulate > len(fold.train):
            raise TrainingError(
                f"optim.accumulate is {recipe.optim.accumulate} and there are {len(fold.train)} training "
                "slides, so no step would ever be taken: lower it"
            )
    preset = recipe.build_preset()
    needed = sorted({slide.slide_id for fold in folds for slide in fold.slides})
    digests = check_bags(
        [data.features / f"{name}.h5" for name in needed],
        preset.slide.in_chans,
        preset.variant.coordinates,
        lambda done: progress(done, len(needed)),
    )
    return Plan(recipe, task, tuple(folds), digests)


def run(plan: Plan, out: Path, *, bar: bool = False) -> dict[str, Any]:
    """Train and evaluate every fold in its folder; returns the metrics (several folds: a summary).

    What is finished is kept, and what was cut off goes on after its last whole epoch. Raises TrainingError
    where a folder holds a run of another recipe or of other data.
    """
    main = getattr(rank_zero_only, "rank", 0) == 0
    for number, (fold, folder) in enumerate(zip(plan.folds, plan.folders(out), strict=True)):
        if main:
            open_record(folder, plan.recipe, number, fold, plan.digests)
        if not (folder / METRICS).exists():
            _run_fold(plan, fold, folder, bar)
    if not main:
        return {}
    results = [read_metrics(folder) for folder in plan.folders(out)]
    return results[0] if len(results) == 1 else summarise(out, results)


def _run_fold(plan: Plan, fold: Fold, folder: Path, bar: bool) -> None:
    recipe = plan.recipe
    if recipe.resources.threads:
        torch.set_num_threads(recipe.resources.threads)
    preset = recipe.build_preset()
    models = build_models(
        preset,
        slide_weights=recipe.slide_weights,
        head=HeadConfig(plan.task.classes, plan.task.kind),
        seed=recipe.seed,
    )
    model = models.slide_model
    if recipe.optim.train == "head":
        freeze(model.encoder)
    freeze_unreached(model)
    tuner = SlideFineTuner(model, recipe.optim, class_weights(recipe, fold.train, plan.task), recipe.seed)
    trainer = _trainer(recipe, folder, bar)
    rank, world = trainer.global_rank, trainer.world_size
    train, val, test = (
        SlideBags(
            getattr(fold, split),
            recipe.data,
            preset.variant.coordinates,
            seed=recipe.seed,
            masks=recipe.masks,
            training=split == "train",
        )
        for split in SPLITS
    )
    order = EpochOrder(len(fold.train), seed=recipe.seed, rank=rank, world=world)
    resume = folder / "checkpoints" / f"{LAST}.ckpt"
    if resume.exists():
        # Lightning asks for the resumed epoch's order before it says which epoch that is.
        order.set_epoch(torch.load(resume, mmap=True, weights_only=False)["epoch"] + 1)
    trainer.fit(
        tuner,
        _loader(train, order, recipe),
        _loader(val, Share(len(fold.val), rank=rank, world=world), recipe),
        ckpt_path=resume if resume.exists() else None,
        weights_only=False,  # our own file: optimiser and loop state, beside weights
    )
    if trainer.interrupted:
        raise TrainingError("interrupted: the same command goes on after the last whole epoch")
    if not trainer.is_global_zero:
        return
    if recipe.select.epoch == "best":
        best = torch.load(folder / "checkpoints" / f"{BEST}.ckpt", map_location="cpu", weights_only=False)
        tuner.load_state_dict(best["state_dict"], strict=False)
    model.to(trainer.strategy.root_device).eval()
    results = {
        split: _evaluate(model, bags, plan, folder, split) for split, bags in (("val", val), ("test", test))
    }
    save_run(folder, preset, model)
    write_metrics(folder, plan.recipe, plan.task, fold, results, epochs=trainer.current_epoch)


def _evaluate(model: SlideModel, bags: SlideBags, plan: Plan, folder: Path, split: str) -> dict[str, Any]:
    """Metrics and their intervals of one split; its predictions go into a CSV file."""
    recipe, task = plan.recipe, plan.task
    logits = predict(model, (bags[0, index] for index in range(len(bags.slides))))
    scores = probabilities(logits, task.kind)
    truth = np.array([slide.target for slide in bags.slides])
    truth = truth if task.kind == "multiclass" else indicator(truth, len(task.classes), task.kind)
    write_predictions(folder / f"predictions_{split}.csv", bags.slides, task, scores)
    groups = [slide.patient_id for slide in bags.slides]
    found = evaluate(truth, scores, task.classes, task.kind)
    between = intervals(
        truth, scores, task.classes, task.kind, groups=groups, samples=recipe.bootstrap, seed=recipe.seed
    )
    return {"slides": len(truth), "metrics": found, "intervals_95": between}


def class_weights(recipe: Recipe, slides: Sequence[Slide], task: Task) -> Tensor | None:
    """Each class's weight in the loss, f32 [C]; for multilabel and binary that of its positive slides."""
    chosen = recipe.optim.class_weights
    if chosen == "none":
        return None
    if isinstance(chosen, list):
        if len(chosen) != len(task.classes):
            raise TrainingError(f"optim.class_weights are {len(chosen)} for {len(task.classes)} classes")
        return torch.tensor(chosen)
    flags = indicator(np.array([slide.target for slide in slides]), len(task.classes), task.kind)
    count = torch.from_numpy(flags.sum(axis=0)).float()
    if task.kind == "multiclass":
        return len(slides) / (len(task.classes) * count)
    return (len(slides) - count) / count


def _trainer(recipe: Recipe, folder: Path, bar: bool) -> lightning.Trainer:
    resources, select = recipe.resources, recipe.select
    monitor = f"val/{select.monitor}"
    precision = resources.precision
    if precision == "auto":
        on_gpu = resources.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        precision = "16-mixed" if on_gpu else "32-true"
    callbacks: list[Callback] = [RichProgressBar()] if bar else []
    if select.patience:
        callbacks.append(_Patience(monitor, mode="max", patience=select.patience, check_finite=False))
    checkpoints = folder / "checkpoints"
    if select.epoch == "best":
        callbacks.append(_checkpoint(checkpoints, BEST, monitor))
    callbacks.append(_checkpoint(checkpoints, LAST))  # after the others: it holds their state
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    return lightning.Trainer(
        accelerator=resources.accelerator,
        devices=resources.devices,
        num_nodes=resources.nodes,
        strategy=resources.strategy,
        precision=precision,
        max_epochs=recipe.optim.epochs,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder, name=None, version="tensorboard"),
        deterministic=True,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=recipe.optim.accumulate,
        enable_progress_bar=bar,
        enable_model_summary=False,
    )


def _checkpoint(folder: Path, name: str, monitor: str | None = None) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder,
        filename=name,
        monitor=monitor,
        mode="max",
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


class _Patience(EarlyStopping):
    """Early stopping that also holds for a run which is resumed after it had stopped."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


def _loader(bags: SlideBags, order: EpochOrder | Share, recipe: Recipe) -> DataLoader[Batch]:
    return DataLoader(bags, sampler=order, batch_size=None, num_workers=recipe.resources.workers)
