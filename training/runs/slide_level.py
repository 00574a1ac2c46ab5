"""From a recipe to run folders: check the data, train each fold, evaluate, write down what was done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from gigapath_contract.probabilities import probabilities
from training.data.bag_data import Batch, EpochOrder, Share, SlideBags
from training.data.bags import check_bags
from training.data.folds import SPLITS, Fold, check_fold, make_folds, read_presplit, read_split_column
from training.data.tables import Slide, Table, read_slides
from training.errors import TrainingError
from training.loops.metrics import indicator
from training.loops.optim import freeze, freeze_unreached
from training.loops.slide_level import SlideFineTuner, predict
from training.loops.trainer import build_trainer, fit
from training.models.build import build_slide_model
from training.models.head import HeadConfig
from training.models.slide_model import SlideModel
from training.recipe import RANDOM_INIT, Recipe
from training.runs.checkpoint import save_run
from training.runs.placement import rule_version, warn_misplaced
from training.runs.record import (
    METRICS,
    open_record,
    read_metrics,
    record_predictions,
    summarise,
    write_metrics,
)
from training.task import Task


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
    rule = plan.recipe.build_preset().variant.coordinates
    for number, (fold, folder) in enumerate(zip(plan.folds, plan.folders(out), strict=True)):
        if main:
            open_record(folder, plan.recipe, _data(number, fold, plan.digests))
            warn_misplaced(folder, rule)
        if not (folder / METRICS).exists():
            _run_fold(plan, fold, folder, bar)
    if not main:
        return {}
    results = [read_metrics(folder) for folder in plan.folders(out)]
    return results[0] if len(results) == 1 else summarise(out, results)


def _run_fold(plan: Plan, fold: Fold, folder: Path, bar: bool) -> None:
    recipe = plan.recipe
    preset = recipe.build_preset()
    trainer = build_trainer(
        folder,
        recipe.resources,
        recipe.select,
        epochs=recipe.optim.epochs,
        log_every=recipe.optim.accumulate,
        bar=bar,
    )
    model = build_slide_model(
        preset,
        None if recipe.slide_weights == RANDOM_INIT else recipe.slide_weights,
        HeadConfig(plan.task.classes, plan.task.kind),
        seed=None if recipe.slide_weights is None else recipe.seed,
        head_init=recipe.head_init,
    )
    if recipe.optim.train == "head":
        freeze(model.encoder)
    freeze_unreached(model)
    tuner = SlideFineTuner(model, recipe.optim, class_weights(recipe, fold.train, plan.task), recipe.seed)
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
    share = Share(len(fold.val), rank=rank, world=world)
    fit(trainer, tuner, folder, _loader(train, order, recipe), _loader(val, share, recipe), recipe.select)
    if not trainer.is_global_zero:
        return
    model.to(trainer.strategy.root_device).eval()
    results = {
        split: _evaluate(model, bags, plan, folder, split) for split, bags in (("val", val), ("test", test))
    }
    save_run(folder, preset, model, rule_version(folder))
    facts = _facts(recipe, fold, trainer.current_epoch)
    title = f"{recipe.preset}, fine-tuned: {', '.join(plan.task.classes)}"
    write_metrics(folder, title, facts, {"epochs": trainer.current_epoch, **results})


def _data(number: int, fold: Fold, digests: dict[str, str]) -> dict[str, Any]:
    names = {split: [slide.slide_id for slide in getattr(fold, split)] for split in SPLITS}
    files = sorted(f"{name}.h5" for split in SPLITS for name in names[split])
    return {"fold": number, "splits": names, "sha256": {file: digests[file] for file in files}}


def _evaluate(model: SlideModel, bags: SlideBags, plan: Plan, folder: Path, split: str) -> dict[str, Any]:
    recipe, slides = plan.recipe, bags.slides
    logits = predict(model, (bags[0, index] for index in range(len(slides))))
    return record_predictions(
        folder / f"predictions_{split}.csv",
        [slide.slide_id for slide in slides],
        [slide.patient_id for slide in slides],
        np.array([slide.target for slide in slides]),
        probabilities(logits, plan.task.kind),
        classes=plan.task.classes,
        kind=plan.task.kind,
        bootstrap=recipe.bootstrap,
        seed=recipe.seed,
    )


def _facts(recipe: Recipe, fold: Fold, epochs: int) -> list[str]:
    """The model card's lines."""
    variant = recipe.build_preset().variant
    splits = [
        f"{len(getattr(fold, split))} {split} slides of "
        f"{len({slide.patient_id for slide in getattr(fold, split)})} patients"
        for split in SPLITS
    ]
    return [
        f"Slide embedding: {variant.pooling} of layer {variant.layer} ({variant.norm}), coordinates "
        f"{variant.coordinates}; a linear {recipe.task.kind} head on it.",
        f"Started from {recipe.slide_weights or 'the weights of the preset'}; trained "
        f"{recipe.optim.train} weights for {epochs} epochs, seed {recipe.seed}; kept: {recipe.select.epoch}.",
        f"Data: {', '.join(splits)}. Intervals draw patients anew.",
    ]


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


def _loader(bags: SlideBags, order: EpochOrder | Share, recipe: Recipe) -> DataLoader[Batch]:
    return DataLoader(bags, sampler=order, batch_size=None, num_workers=recipe.resources.workers)
