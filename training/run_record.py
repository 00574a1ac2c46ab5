"""What a run folder says about the run: recipe, data, versions, metrics, predictions, model card."""

from __future__ import annotations

import csv
import json
import math
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml

from training.errors import TrainingError
from training.folds import SPLITS, Fold
from training.recipe import Recipe
from training.tables import Slide, Task

RECIPE, DATA, ENVIRONMENT, METRICS, CARD = (
    "recipe.yaml",
    "data.json",
    "environment.json",
    "metrics.json",
    "MODEL_CARD.md",
)
LIBRARIES = ("torch", "timm", "lightning", "numpy", "scikit-learn", "h5py", "safetensors")


def open_record(folder: Path, recipe: Recipe, number: int, fold: Fold, digests: dict[str, str]) -> None:
    """Begin a run in `folder`, or make sure that the run in it is this one.

    Raises TrainingError where it is one of another recipe, or the data has changed since.
    """
    content = recipe.model_dump(mode="json")
    data = {
        "fold": number,
        "splits": {split: [slide.slide_id for slide in getattr(fold, split)] for split in SPLITS},
        "sha256": {f"{slide.slide_id}.h5": digests[f"{slide.slide_id}.h5"] for slide in fold.slides},
    }
    if (folder / RECIPE).exists():
        before = Recipe.model_validate(yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")))
        if before.model_copy(update={"resources": recipe.resources}) != recipe:
            raise TrainingError(f"{folder} holds a run of another recipe: choose another --out")
        if json.loads((folder / DATA).read_text(encoding="utf-8")) != data:
            raise TrainingError(f"the data has changed since the run in {folder} began: choose another --out")
        return
    if folder.exists() and any(folder.iterdir()):
        raise TrainingError(f"{folder} is not empty and not a run: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: metadata.version(name) for name in LIBRARIES}
    environment = {"python": platform.python_version(), "machine": platform.machine(), **versions}
    write_json(folder / ENVIRONMENT, environment | {"threads": torch.get_num_threads()})
    write_json(folder / DATA, data)
    (folder / RECIPE).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` at once: no reader ever finds half of it. What isn't a number becomes null."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_predictions(
    path: Path, slides: Sequence[Slide], task: Task, scores: npt.NDArray[np.float64]
) -> None:
    """A row for each slide: its target and its probability of each class."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["slide_id", "pat_id", "target", *(f"prob_{name}" for name in task.classes)])
        for slide, row in zip(slides, scores, strict=True):
            target = " ".join(map(str, slide.target)) if isinstance(slide.target, tuple) else slide.target
            table.writerow([slide.slide_id, slide.patient_id, target, *(f"{score:.9g}" for score in row)])


def write_metrics(
    folder: Path, recipe: Recipe, task: Task, fold: Fold, results: dict[str, Any], *, epochs: int
) -> None:
    """The model card and, last, `metrics.json`: a run with it is finished."""
    (folder / CARD).write_text(_card(recipe, task, fold, results, epochs), encoding="utf-8")
    write_json(folder / METRICS, {"epochs": epochs, "weights": recipe.select.epoch, **results})


def read_metrics(folder: Path) -> dict[str, Any]:
    """A finished run's metrics."""
    found: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return found


def summarise(out: Path, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the folds' metrics, by split; written to `out`."""
    summary: dict[str, Any] = {"folds": len(results)}
    for split in ("val", "test"):
        found = [result[split]["metrics"] for result in results]
        summary[split] = {}
        for name in found[0]:
            values = [each[name] for each in found if each[name] is not None]
            if values:
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
                summary[split][name] = {"mean": float(np.mean(values)), "sd": spread, "folds": len(values)}
    write_json(out / METRICS, summary)
    return summary


def _card(recipe: Recipe, task: Task, fold: Fold, results: dict[str, Any], epochs: int) -> str:
    variant = recipe.build_preset().variant
    lines = [
        f"# {recipe.preset}, fine-tuned: {', '.join(task.classes)}",
        "",
        "For research only: not a medical device, not validated for diagnosis.",
        "",
        f"- Model: preset `{recipe.preset}`, slide embedding {variant.pooling} of layer {variant.layer} "
        f"({variant.norm}), coordinates {variant.coordinates}; a linear {task.kind} head.",
        f"- Started from: {recipe.slide_weights or 'the weights of the preset'}.",
        f"- Trained: {recipe.optim.train} weights, {epochs} epochs, the {recipe.select.epoch} one kept, "
        f"seed {recipe.seed}; everything in `{RECIPE}`, versions in `{ENVIRONMENT}`.",
        "- Data: "
        + ", ".join(
            f"{len(getattr(fold, split))} {split} slides of "
            f"{len({slide.patient_id for slide in getattr(fold, split)})} patients"
            for split in SPLITS
        )
        + f"; digests in `{DATA}`.",
        "",
        "| metric | val | test | 95 % interval (test, patients drawn anew) |",
        "|---|---|---|---|",
    ]
    for name, value in results["test"]["metrics"].items():
        low, high = results["test"]["intervals_95"][name]
        row = (f"{number:.3f}" for number in (results["val"]["metrics"][name], value, low, high))
        lines.append("| {} | {} | {} | {} to {} |".format(name, *row))
    lines += [
        "",
        "Limits: it knows the scanners, stains and tissues of its training slides, and no others.",
        "",
    ]
    return "\n".join(lines)
