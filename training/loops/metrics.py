"""Metrics of predictions, with bootstrap intervals over patients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn import metrics

from gigapath_contract.probabilities import HeadKind

Array = npt.NDArray[Any]
LEAST_GROUPS = 10
"""Patients, fewer than which have no bootstrap interval."""
LEAST_WIDTH = 1e-9
"""Of an interval: one that is narrower says that all draws agree, such as on slides without an error."""


def indicator(truth: Array, classes: int, kind: HeadKind) -> Array:
    """0 or 1 for each class, int [n, C], of targets as the data set gives them."""
    if kind == "multiclass":
        return np.eye(classes, dtype=np.int64)[truth]
    return truth.reshape(len(truth), classes)


def confusion(truth: Array, predicted: Array, classes: int) -> Array:
    """How often each class (row) is predicted as which (column), int [C, C], of class indices [n].

    scikit-learn's, and its scores of class indices, check their input at length: too slow for 1,000 draws.
    """
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)


def evaluate(truth: Array, scores: Array, classes: Sequence[str], kind: HeadKind) -> dict[str, float]:
    """Metrics of `scores` [n, C] (probabilities) against `truth`, by name.

    `truth` is the class index int [n] (multiclass) or 0 and 1 per class [n, C]. AUROC and AUPRC (average
    precision) are one against the rest, by class and as `macro`, the mean over the classes for which they are
    defined: where the slides are all or none of a class it is NaN. `quadratic_kappa` is for multiclass
    (ordered classes). Accuracies of `multilabel` and `binary` are means over the labels, threshold 0.5.
    """
    flags = indicator(truth, len(classes), kind)
    result: dict[str, float] = {}
    if kind == "multiclass":
        counts = confusion(truth, scores.argmax(axis=1), len(classes))
        result["accuracy"], result["balanced_accuracy"] = _accuracies(counts)
        result["quadratic_kappa"] = _kappa(counts)
    else:
        pairs = zip(flags.T, scores.T >= 0.5, strict=True)
        each_label = np.mean([_accuracies(confusion(*pair, 2)) for pair in pairs], axis=0)
        result["accuracy"], result["balanced_accuracy"] = each_label.tolist()
    for name, score in (("auroc", metrics.roc_auc_score), ("auprc", metrics.average_precision_score)):
        each = [
            float(score(flag, column)) if 0 < flag.sum() < len(flag) else float("nan")
            for flag, column in zip(flags.T, scores.T, strict=True)
        ]
        defined = [value for value in each if not np.isnan(value)]
        result[f"{name}_macro"] = float(np.mean(defined)) if defined else float("nan")
        result |= {f"{name}_{label}": value for label, value in zip(classes, each, strict=True)}
    return result


def metric_names(classes: Sequence[str], kind: HeadKind) -> list[str]:
    """The names of the metrics that `evaluate` returns."""
    each = np.eye(len(classes), dtype=np.int64)
    return list(evaluate(each.argmax(axis=1) if kind == "multiclass" else each, each, classes, kind))


def intervals(
    truth: Array,
    scores: Array,
    classes: Sequence[str],
    kind: HeadKind,
    *,
    groups: Sequence[str],
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of every metric, over whole patients (`groups`, one name per slide).

    Draws in which a metric is undefined don't count for it. With fewer than `LEAST_GROUPS` groups all are
    NaN: resampling so few says nothing of other patients.
    """
    draws = resamples(groups, samples, seed)
    drawn = [evaluate(truth[chosen], scores[chosen], classes, kind) for chosen in draws]
    if not drawn:
        return dict.fromkeys(evaluate(truth, scores, classes, kind), (float("nan"), float("nan")))
    edges = 100 * (1 - level) / 2, 100 * (1 + level) / 2
    result = {}
    for name in drawn[0]:
        values = [each[name] for each in drawn if not np.isnan(each[name])]
        low, high = np.percentile(values, edges) if values else (float("nan"), float("nan"))
        result[name] = (float(low), float(high))
    return result


def resamples(groups: Sequence[str], samples: int, seed: int) -> Iterator[Array]:
    """Bootstrap draws of whole groups, as the indices of their slides; none for fewer than `LEAST_GROUPS`."""
    rng = np.random.default_rng(seed)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < LEAST_GROUPS:
        return
    slides_of = [np.flatnonzero(member == index) for index in range(len(names))]
    for _ in range(samples):
        yield np.concatenate([slides_of[i] for i in rng.integers(len(names), size=len(names))])


def _accuracies(counts: Array) -> tuple[float, float]:
    """Accuracy, and balanced accuracy: mean recall over the classes that occur."""
    hits, of_class = np.diag(counts), counts.sum(axis=1)
    recall = hits[of_class > 0] / of_class[of_class > 0]
    return float(hits.sum() / counts.sum()), float(recall.mean())


def _kappa(counts: Array) -> float:
    """Cohen's kappa with quadratic weights; NaN where all are of one class and predicted so."""
    index = np.arange(len(counts))
    distance = (index[:, None] - index) ** 2
    by_chance = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
    expected = float((distance * by_chance).sum())
    return 1 - float((distance * counts).sum()) / expected if expected else float("nan")
