"""Slide-level runs: check the data, train each fold, evaluate it and write its run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from gigapath_contract.probabilities import probabilities
from training.config import RANDOM_INIT, TrainingConfig
from training.data.dataset import EpochOrder, SlideBags, SlideSample
from training.data.folds import Fold, check_fold, make_folds, read_presplit, read_split_column
from training.data.h5_features import check_bags
from training.data.tables import SPLITS, LabelledSlide, Table, read_slides
from training.errors import TrainingError
from training.loops.metrics import indicator, metric_names
from training.loops.optim import freeze, freeze_unreached
from training.loops.slide_level import SlideFineTuner, predict
from training.loops.trainer import build_trainer, fit
from training.models.build import build_slide_model
from training.models.head import HeadConfig
from training.models.slide_model import SlideModel
from training.runs.checkpoint import save_run
from training.runs.layout import METRICS, PREDICTIONS
from training.runs.placement import rule_version, warn_misplaced
from training.runs.record import open_record, read_metrics, record_predictions, summarise, write_metrics
from training.runs.report import write_report
from training.task import Task


@dataclass(frozen=True)
class Plan:
    """A configuration whose data has been checked: its folds, and what is known of every file they read.

    `digests` are SHA-256; `assumed` says what was assumed of files that do not say what their coordinates
    are; `encoder` is the digest of the tile encoder that they name, if they do.
    """

    config: TrainingConfig
    task: Task
    folds: tuple[Fold, ...]
    digests: dict[str, str]
    assumed: dict[str, str]
    encoder: str | None

    def folders(self, out: Path) -> list[Path]:
        """Each fold's run folder: `out` itself where there is one fold."""
        return [out] if len(self.folds) == 1 else [out / f"fold_{k}" for k in range(len(self.folds))]


def plan_runs(
    config: TrainingConfig, progress: Callable[[int, int], None] = lambda done, total: None
) -> Plan:
    """Read labels, splits and every bag once. Raises TrainingError for the first fault."""
    data, task = config.data, config.task.task()
    if config.select.monitor not in (names := metric_names(task.classes, task.kind)):
        raise TrainingError(f"select.monitor {config.select.monitor!r} is none of {', '.join(names)}")
    table = Table(data.labels)
    slides = read_slides(table, task, data.patient_column)
    if data.splits is not None:
        folds = [read_presplit(data.splits, number, slides) for number in range(data.folds)]
    elif data.folds > 1:
        folds = make_folds(slides, data.folds, data.val_share, config.seed)
    else:
        folds = [read_split_column(table, slides)]
    for fold in folds:
        check_fold(fold, task)
        if config.optim.accumulate > len(fold.train):
            raise TrainingError(
                f"optim.accumulate is {config.optim.accumulate} and there are {len(fold.train)} training "
                "slides, so no step would ever be taken: lower it"
            )
    if not data.features.is_dir():
        raise TrainingError(
            f"data.features: {data.features}: no such folder: name the one of the slides' h5 files"
        )
    preset = config.build_preset()
    needed = sorted({slide.slide_id for fold in folds for slide in fold.slides})
    checked = check_bags(
        [data.features / f"{name}.h5" for name in needed],
        preset.slide.in_chans,
        preset.variant.coordinates,
        lambda done: progress(done, len(needed)),
    )
    return Plan(config, task, tuple(folds), *checked)


def run(
    plan: Plan, out: Path, *, bar: bool = False, begin: Callable[[int, int], None] = lambda fold, folds: None
) -> dict[str, Any]:
    """Train and evaluate every fold in its folder; returns the metrics (several folds: a summary).

    `begin` is called before each of several folds, with its number from 0 and how many there are.
    `report/` has the held-out predictions of all folds as curves.

    A finished fold is kept, an interrupted one resumes after its last whole epoch. Raises TrainingError where
    a folder holds a run of another configuration or of other data.
    """
    main = getattr(rank_zero_only, "rank", 0) == 0
    rule = plan.config.build_preset().variant.coordinates
    for number, (fold, folder) in enumerate(zip(plan.folds, plan.folders(out), strict=True)):
        if main:
            open_record(folder, plan.config, _data(plan, number, fold))
            warn_misplaced(folder, rule)
            if len(plan.folds) > 1:
                begin(number, len(plan.folds))
        if not (folder / METRICS).exists():
            _run_fold(plan, fold, folder, bar)
    if not main:
        return {}
    results = [read_metrics(folder) for folder in plan.folders(out)]
    config, task = plan.config, plan.task
    write_report(
        out, plan.folders(out), task.classes, task.kind, bootstrap=config.bootstrap, seed=config.seed
    )
    return results[0] if len(results) == 1 else summarise(out, results)


def _run_fold(plan: Plan, fold: Fold, folder: Path, bar: bool) -> None:
    config = plan.config
    preset = config.build_preset()
    trainer = build_trainer(
        folder,
        config.resources,
        config.select,
        epochs=config.optim.epochs,
        log_every=config.optim.accumulate,
        bar=bar,
    )
    model = build_slide_model(
        preset,
        None if config.slide_weights == RANDOM_INIT else config.slide_weights,
        HeadConfig(plan.task.classes, plan.task.kind),
        seed=None if config.slide_weights is None else config.seed,
        head_init=config.head_init,
    )
    if config.optim.train == "head":
        freeze(model.encoder)
    freeze_unreached(model)
    tuner = SlideFineTuner(model, config.optim, class_weights(config, fold.train, plan.task), config.seed)
    rank, world = trainer.global_rank, trainer.world_size
    train, val, test = (
        SlideBags(
            getattr(fold, split),
            config.data,
            preset.variant.coordinates,
            seed=config.seed,
            masks=config.masks,
            training=split == "train",
        )
        for split in SPLITS
    )
    order = EpochOrder(len(fold.train), seed=config.seed, rank=rank, world=world)
    shard = [(0, index) for index in range(rank, len(fold.val), world)]  # every slide in one process
    fit(trainer, tuner, folder, _loader(train, order, config), _loader(val, shard, config), config.select)
    if not trainer.is_global_zero:
        return
    model.to(trainer.strategy.root_device).eval()
    results = {
        split: _evaluate(model, bags, plan, folder, split) for split, bags in (("val", val), ("test", test))
    }
    save_run(folder, preset, model, rule_version(folder), plan.encoder)
    facts = _facts(config, fold, trainer.current_epoch)
    title = f"{config.preset}, fine-tuned: {', '.join(plan.task.classes)}"
    write_metrics(folder, title, facts, {"epochs": trainer.current_epoch, **results})


def _data(plan: Plan, number: int, fold: Fold) -> dict[str, Any]:
    names = {split: [slide.slide_id for slide in getattr(fold, split)] for split in SPLITS}
    files = sorted(f"{name}.h5" for split in SPLITS for name in names[split])
    data = {"fold": number, "splits": names, "sha256": {file: plan.digests[file] for file in files}}
    assumed = {file: plan.assumed[file] for file in files if file in plan.assumed}
    return {**data, "assumed": assumed} if assumed else data


def _evaluate(model: SlideModel, bags: SlideBags, plan: Plan, folder: Path, split: str) -> dict[str, Any]:
    config, slides = plan.config, bags.slides
    logits = predict(model, (bags[0, index] for index in range(len(slides))))
    return record_predictions(
        folder / PREDICTIONS.format(split=split),
        [slide.slide_id for slide in slides],
        [slide.patient_id for slide in slides],
        np.array([slide.target for slide in slides]),
        probabilities(logits, plan.task.kind),
        classes=plan.task.classes,
        kind=plan.task.kind,
        bootstrap=config.bootstrap,
        seed=config.seed,
    )


def _facts(config: TrainingConfig, fold: Fold, epochs: int) -> list[str]:
    """Lines of the model card."""
    variant = config.build_preset().variant
    splits = [
        f"{len(getattr(fold, split))} {split} slides of "
        f"{len({slide.patient_id for slide in getattr(fold, split)})} patients"
        for split in SPLITS
    ]
    return [
        f"Slide embedding: {variant.pooling} of layer {variant.layer} ({variant.norm}), coordinates "
        f"{variant.coordinates}; a linear {config.task.kind} head on it.",
        f"Started from {config.slide_weights or 'the weights of the preset'}; trained "
        f"{config.optim.train} weights for {epochs} epochs, seed {config.seed}; kept: {config.select.epoch}.",
        f"Data: {', '.join(splits)}. Intervals: bootstrap over patients.",
    ]


def class_weights(config: TrainingConfig, slides: Sequence[LabelledSlide], task: Task) -> Tensor | None:
    """Class weights in the loss, f32 [C]; for multilabel and binary those of positive slides."""
    chosen = config.optim.class_weights
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


def _loader(
    bags: SlideBags, order: Iterable[tuple[int, int]], config: TrainingConfig
) -> DataLoader[SlideSample]:
    return DataLoader(bags, sampler=order, batch_size=None, num_workers=config.resources.workers)
