"""The record in a run folder: configuration, data, versions, metrics, predictions, model card."""

from __future__ import annotations

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
from training.config import RunConfig
from training.errors import TrainingError
from training.files import make_folder, read_json, read_yaml, write_csv, write_json, write_text
from training.loops.metrics import LEAST_GROUPS, LEAST_WIDTH, evaluate, indicator, intervals
from training.runs.layout import CONFIG, DATA, ENVIRONMENT, METRICS, MODEL_CARD, config_path

LIBRARIES = ("torch", "timm", "lightning", "numpy", "scikit-learn", "h5py", "safetensors")


def open_record(folder: Path, config: RunConfig, data: dict[str, Any]) -> None:
    """Record a new run of `config` on `data` (splits, digests), or check that `folder` holds the same run.

    Raises TrainingError for a run of another configuration or of other data, and for a folder of other files.
    """
    if (recorded := config_path(folder)).exists():
        if not _same_but_for_resources(recorded, config):
            raise TrainingError(f"{folder} holds a run of another configuration: choose another --out")
        if read_json(folder / DATA) != data:
            raise TrainingError(f"the data has changed since the run in {folder} began: choose another --out")
        return
    if folder.exists() and any(folder.iterdir()):
        raise TrainingError(f"{folder} is not empty and not a run: choose another --out")
    make_folder(folder)
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
    write_text(folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _same_but_for_resources(path: Path, config: RunConfig) -> bool:
    """Whether the configuration in `path` equals `config`; a setting that it lacks has its default."""
    try:
        before = type(config).model_validate(read_yaml(path))
    except ValidationError:
        return False
    return before.model_copy(update={"resources": config.resources}) == config


NO_INTERVAL = f"none: fewer than {LEAST_GROUPS} patients"


def interval_text(value: float | None, low: float | None, high: float | None) -> str:
    """The bootstrap interval of a metric's `value` in words, or why there is none.

    One without width says that draws agree, and not that all is certain.
    """
    if value is None or not np.isfinite(value):
        return "none: undefined"
    if low is None or high is None or not np.isfinite(low):
        return NO_INTERVAL
    return f"{low:.3f} to {high:.3f}" if high - low > LEAST_WIDTH else "none: all draws agree"


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

    `truth` is the class index [n], or 0 and 1 [n, C]; the bootstrap draws `groups` (patients).
    """
    truth = truth if kind == "multiclass" else indicator(truth, len(classes), kind)
    rows = [
        [name, group, " ".join(map(str, np.atleast_1d(target))), *(f"{score:.9g}" for score in row)]
        for name, group, target, row in zip(names, groups, truth, scores, strict=True)
    ]
    write_csv(path, ["slide_id", "pat_id", "target", *(f"prob_{name}" for name in classes)], rows)
    found = evaluate(truth, scores, classes, kind)
    between = intervals(truth, scores, classes, kind, groups=groups, samples=bootstrap, seed=seed)
    return {"count": len(truth), "metrics": found, "intervals_95": between}


def write_metrics(folder: Path, title: str, facts: Sequence[str], content: dict[str, Any]) -> None:
    """Write the model card and then `metrics.json`, which marks the run as finished.

    `content` has `val` and `test` as `record_predictions` returns them; `facts` are lines of the card.
    """
    lines = [
        f"# {title}",
        "",
        "For research only: not a medical device, not validated for diagnosis.",
        "",
        *(f"- {fact}" for fact in facts),
        f"- Configuration in `{CONFIG}`, digests of the data in `{DATA}`, versions in `{ENVIRONMENT}`.",
        "- Not validated for other scanners, stains or tissues than those of its training data.",
        "",
        "| metric | val | test | test, 95 % interval |",
        "|---|---|---|---|",
    ]
    for name, value in content["test"]["metrics"].items():
        low, high = content["test"]["intervals_95"][name]
        val = content["val"]["metrics"][name]
        lines.append(f"| {name} | {val:.3f} | {value:.3f} | {interval_text(value, low, high)} |")
    write_text(folder / MODEL_CARD, "\n".join([*lines, ""]))
    write_json(folder / METRICS, content)


def read_metrics(folder: Path) -> dict[str, Any]:
    """A finished run's metrics."""
    found: dict[str, Any] = read_json(folder / METRICS)
    return found


def summarise(out: Path, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the metrics over the folds, by split; written to `out`."""
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
