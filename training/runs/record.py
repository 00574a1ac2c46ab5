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
from pydantic import ValidationError

from gigapath_contract.coordinates import RULE_VERSION
from gigapath_contract.probabilities import HeadKind
from training.errors import TrainingError
from training.loops.metrics import evaluate, indicator, intervals
from training.recipe import RunRecipe

RECIPE, DATA, ENVIRONMENT = "recipe.yaml", "data.json", "environment.json"
METRICS, CARD = "metrics.json", "MODEL_CARD.md"
LIBRARIES = ("torch", "timm", "lightning", "numpy", "scikit-learn", "h5py", "safetensors")


def open_record(folder: Path, recipe: RunRecipe, data: dict[str, Any]) -> None:
    """Begin a run of `recipe` on `data` (splits, digests), or make sure that the run there is this one.

    Raises TrainingError where it is one of another recipe, or the data has changed since.
    """
    if (folder / RECIPE).exists():
        if not _same_but_for_resources(folder / RECIPE, recipe):
            raise TrainingError(f"{folder} holds a run of another recipe: choose another --out")
        if json.loads((folder / DATA).read_text(encoding="utf-8")) != data:
            raise TrainingError(f"the data has changed since the run in {folder} began: choose another --out")
        return
    if folder.exists() and any(folder.iterdir()):
        raise TrainingError(f"{folder} is not empty and not a run: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: metadata.version(name) for name in LIBRARIES}
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **versions,
        "threads": torch.get_num_threads(),
        "coordinate_rule_version": RULE_VERSION,
    }
    write_json(folder / ENVIRONMENT, environment)
    write_json(folder / DATA, data)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    (folder / RECIPE).write_text(text, encoding="utf-8")


def _same_but_for_resources(path: Path, recipe: RunRecipe) -> bool:
    """Whether the recipe in `path` decides the same as `recipe`; a setting that it lacks has its default."""
    try:
        before = type(recipe).model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError:
        return False
    return before.model_copy(update={"resources": recipe.resources}) == recipe


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


def record_predictions(
    path: Path,
    names: Sequence[str],
    groups: Sequence[str],
    truth: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float64],
    *,
    classes: Sequence[str],
    kind: HeadKind,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Write a row for each of `names` with its probabilities `scores` [n, C]; returns metrics and intervals.

    `truth` is the class index [n], or 0 and 1 [n, C]; `groups` are what the bootstrap draws (patients).
    """
    truth = truth if kind == "multiclass" else indicator(truth, len(classes), kind)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["slide_id", "pat_id", "target", *(f"prob_{name}" for name in classes)])
        for name, group, target, row in zip(names, groups, truth, scores, strict=True):
            told = " ".join(str(value) for value in np.atleast_1d(target))
            table.writerow([name, group, told, *(f"{score:.9g}" for score in row)])
    found = evaluate(truth, scores, classes, kind)
    between = intervals(truth, scores, classes, kind, groups=groups, samples=bootstrap, seed=seed)
    return {"count": len(truth), "metrics": found, "intervals_95": between}


def write_metrics(folder: Path, title: str, facts: Sequence[str], content: dict[str, Any]) -> None:
    """The model card and, last, `metrics.json`: a run with it is finished.

    `content` has `val` and `test` as `record_predictions` returns them; `facts` are the card's lines.
    """
    lines = [
        f"# {title}",
        "",
        "For research only: not a medical device, not validated for diagnosis.",
        "",
        *(f"- {fact}" for fact in facts),
        f"- Everything that decided the run is in `{RECIPE}`, the data's digests in `{DATA}`, versions in "
        f"`{ENVIRONMENT}`.",
        "- It knows the scanners, stains and tissues of its training data, and no others.",
        "",
        "| metric | val | test | test, 95 % interval |",
        "|---|---|---|---|",
    ]
    for name, value in content["test"]["metrics"].items():
        low, high = content["test"]["intervals_95"][name]
        row = (f"{number:.3f}" for number in (content["val"]["metrics"][name], value, low, high))
        lines.append("| {} | {} | {} | {} to {} |".format(name, *row))
    (folder / CARD).write_text("\n".join([*lines, ""]), encoding="utf-8")
    write_json(folder / METRICS, content)


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
