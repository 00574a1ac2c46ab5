"""Metrics of predictions, with bootstrap intervals over patients."""

from __future__ import annotations

import warnings
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
        predicted = scores.argmax(axis=1)
        result["accuracy"] = metrics.accuracy_score(truth, predicted)
        result["balanced_accuracy"] = _balanced_accuracy(truth, predicted)
        result["quadratic_kappa"] = _kappa(truth, predicted, len(classes))
    else:
        decided = (scores >= 0.5).astype(int)
        pairs = list(zip(flags.T, decided.T, strict=True))
        result["accuracy"] = float(np.mean([metrics.accuracy_score(*pair) for pair in pairs]))
        result["balanced_accuracy"] = float(np.mean([_balanced_accuracy(*pair) for pair in pairs]))
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


def _balanced_accuracy(truth: Array, predicted: Array) -> float:
    """Mean recall over the classes that occur in `truth`."""
    with warnings.catch_warnings():  # scikit-learn warns of predicted classes that do not
        warnings.simplefilter("ignore")
        return float(metrics.balanced_accuracy_score(truth, predicted))


def _kappa(truth: Array, predicted: Array, classes: int) -> float:
    with warnings.catch_warnings():  # a single class on both sides: undefined, which is NaN
        warnings.simplefilter("ignore")
        return float(
            metrics.cohen_kappa_score(truth, predicted, labels=list(range(classes)), weights="quadratic")
        )
