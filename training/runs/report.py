"""The report on a run's held-out predictions: ROC, precision-recall and confusion, as a picture and numbers.

Curves and metrics are scikit-learn's, intervals a percentile bootstrap over whole patients. With several
folds all held-out predictions are pooled: each slide is scored by the model that never saw its patient.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn import metrics

from gigapath_contract.probabilities import HeadKind
from training.files import atomic_path, make_folder, read_json, write_csv, write_json
from training.loops.metrics import (
    LEAST_GROUPS,
    LEAST_WIDTH,
    Array,
    confusion,
    evaluate,
    indicator,
    intervals,
    resamples,
)
from training.runs.layout import PREDICTIONS, REPORT

PICTURE, NUMBERS, ROC, PRECISION_RECALL = "report.png", "report.json", "roc.csv", "precision_recall.csv"
GRID = np.linspace(0, 1, 201)
# Okabe and Ito's, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#8a8a8a"
MOST_BANDS = 3  # more would hide each other; the tables have all
Corners = Callable[[Array, Array], tuple[Array, Array, Array]]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Held-out slides (or tiles): names of patients, truth as `evaluate` takes it, probabilities [n, C]."""

    groups: list[str]
    truth: Array
    scores: Array
    classes: Sequence[str]
    kind: HeadKind

    @property
    def flags(self) -> Array:
        """0 or 1 for each class, int [n, C]."""
        return indicator(self.truth, len(self.classes), self.kind)


@dataclass(frozen=True, eq=False)
class Curve:
    """A class's curve: corners x and y by falling threshold, and its 95 % band, NaN where there is none."""

    label: str
    thresholds: Array
    x: Array
    y: Array
    low: Array
    high: Array


def write_report(
    out: Path,
    folds: Sequence[Path],
    classes: Sequence[str],
    kind: HeadKind,
    *,
    bootstrap: int,
    seed: int,
    what: tuple[str, str] = ("slides", "patients"),
) -> None:
    """Write `report/` of a run in `out` from the held-out predictions of its folds.

    `report.png` shows what `report.json` (metrics, confusion), `roc.csv` and `precision_recall.csv` say. One
    that is there is kept, as a finished run does not change. `what` names the predictions and their groups.
    """
    folder = out / REPORT
    if (folder / NUMBERS).exists():
        return
    make_folder(folder)
    held_out = _read([fold / PREDICTIONS.format(split="test") for fold in folds], classes, kind)
    draws = list(resamples(held_out.groups, bootstrap, seed))
    curves = {
        ROC: _curves(held_out, draws, roc),
        PRECISION_RECALL: _curves(held_out, draws, precision_recall),
    }
    axes = {ROC: ("false_positive_rate", "true_positive_rate"), PRECISION_RECALL: ("recall", "precision")}
    for name, drawn in curves.items():
        rows = [
            (c.label, *row) for c in drawn for row in zip(c.thresholds, c.x, c.y, c.low, c.high, strict=True)
        ]
        write_csv(folder / name, ("class", "threshold", *axes[name], "low_95", "high_95"), rows)
    numbers = {
        what[0]: len(held_out.groups),
        what[1]: len(set(held_out.groups)),
        "folds": len(folds),
        "metrics": evaluate(held_out.truth, held_out.scores, classes, kind),
        "intervals_95": intervals(
            held_out.truth,
            held_out.scores,
            classes,
            kind,
            groups=held_out.groups,
            samples=bootstrap,
            seed=seed,
        ),
        "confusion": _confusion(held_out, draws),
    }
    with atomic_path(folder / PICTURE) as part, rc_context({"text.parse_math": False}):
        _draw(numbers, curves[ROC], curves[PRECISION_RECALL], what).savefig(part, format="png", dpi=150)
    write_json(folder / NUMBERS, numbers)


def read_report(out: Path) -> tuple[Path, dict[str, Any]]:
    """The picture of a finished run's report, and its numbers; null where one is undefined."""
    return out / REPORT / PICTURE, read_json(out / REPORT / NUMBERS)


def chance_text(numbers: dict[str, Any]) -> str:
    """A line on the classes whose AUROC, or its interval, reaches down to chance; empty where there are none.

    `numbers` are a report's; what is undefined is NaN or null.
    """
    doubtful = []
    for name, value in numbers["metrics"].items():
        low = numbers["intervals_95"][name][0]
        lowest = value if low is None or np.isnan(low) else low
        if name.startswith("auroc_") and name != "auroc_macro" and lowest is not None and lowest <= 0.5:
            doubtful.append(f"{name.removeprefix('auroc_')} ({value:.3f})")
    if not doubtful:
        return ""
    return f"no better than chance by AUROC: {', '.join(doubtful)}; train for more epochs or on more slides"


def _read(paths: Sequence[Path], classes: Sequence[str], kind: HeadKind) -> Predictions:
    """The predictions that `record_predictions` wrote."""
    rows: list[list[str]] = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            rows += list(csv.reader(file))[1:]
    truth = np.array([[int(flag) for flag in row[2].split()] for row in rows])
    scores = np.array([[float(score) for score in row[3:]] for row in rows])
    return Predictions(
        [row[1] for row in rows], truth[:, 0] if kind == "multiclass" else truth, scores, classes, kind
    )


def roc(flags: Array, scores: Array) -> tuple[Array, Array, Array]:
    """False and true positive rates, rising, and thresholds."""
    x, y, thresholds = metrics.roc_curve(flags, scores, drop_intermediate=False)
    return x, y, thresholds


def precision_recall(flags: Array, scores: Array) -> tuple[Array, Array, Array]:
    """Recall, rising, precision, and thresholds."""
    y, x, thresholds = metrics.precision_recall_curve(flags, scores)
    return x[::-1], y[::-1], np.append(thresholds, np.inf)[::-1]


def _curves(found: Predictions, draws: Sequence[Array], corners: Corners) -> list[Curve]:
    """A curve for each class; of two exclusive classes the second, as the first mirrors it."""
    curves = []
    one = found.kind == "multiclass" and len(found.classes) == 2
    for label, flags, scores in list(zip(found.classes, found.flags.T, found.scores.T, strict=True))[one:]:
        if not 0 < flags.sum() < len(flags):  # no slide, or every one, is of this class
            continue
        x, y, thresholds = corners(flags, scores)
        drawn = [
            _at_grid(*corners(flags[chosen], scores[chosen])[:2], corners is roc)
            for chosen in draws
            if 0 < flags[chosen].sum() < len(chosen)
        ]
        low, high = np.percentile(drawn, (2.5, 97.5), axis=0) if drawn else np.full((2, len(GRID)), np.nan)
        curves.append(Curve(label, thresholds, x, y, np.interp(x, GRID, low), np.interp(x, GRID, high)))
    return curves


def _at_grid(x: Array, y: Array, rising: bool) -> Array:
    """y at GRID of a step through corners, x rising: the last y up to it or (precision) the first from it."""
    at = np.searchsorted(x, GRID, "right") - 1 if rising else np.searchsorted(x, GRID, "left")
    return np.asarray(y[at])


def _counts(found: Predictions, chosen: Array | slice = slice(None)) -> Array:
    """How often each truth (row) is predicted as what (column).

    Classes by classes; for multilabel and binary two rows a class, present and absent, by predicted or not.
    """
    truth, scores = found.truth[chosen], found.scores[chosen]
    if found.kind == "multiclass":
        return confusion(truth, scores.argmax(axis=1), len(found.classes))
    pairs = zip(1 - truth.T, scores.T < 0.5, strict=True)
    return np.concatenate([confusion(*pair, 2) for pair in pairs])


def _confusion(found: Predictions, draws: Sequence[Array]) -> dict[str, Any]:
    """Counts [R, K], their share of the row's slides, and the share's interval."""
    rows, columns = list(found.classes), list(found.classes)
    if found.kind != "multiclass":
        rows = [f"{name}: {is_there}" for name in found.classes for is_there in ("present", "absent")]
        columns = ["present", "absent"]
    counts = _counts(found)
    drawn = np.array([_shares(_counts(found, chosen)) for chosen in draws] or [np.full(counts.shape, np.nan)])
    with warnings.catch_warnings():  # a class without held-out slides: NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        between = np.nanpercentile(drawn, (2.5, 97.5), axis=0)
    return {
        "rows": rows,
        "columns": columns,
        "counts": counts.tolist(),
        "share_of_row": _shares(counts).tolist(),
        "intervals_95": np.moveaxis(between, 0, -1).tolist(),
    }


def _shares(counts: Array) -> Array:
    total = counts.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0))


def _draw(
    numbers: dict[str, Any], roc_curves: list[Curve], pr_curves: list[Curve], what: tuple[str, str]
) -> Figure:
    """The three panels next to each other."""
    figure = Figure(figsize=(15, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    slides, patients = what
    folds = f", pooled over {numbers['folds']} folds" if numbers["folds"] > 1 else ""
    certainty = f"fewer than {LEAST_GROUPS} {patients}, so no intervals"
    if numbers[patients] >= LEAST_GROUPS:
        between = [
            *numbers["intervals_95"].values(),
            *np.reshape(numbers["confusion"]["intervals_95"], (-1, 2)),
        ]
        certainty = "no intervals, as all draws agree"
        if any(high - low > LEAST_WIDTH for low, high in between):
            certainty = f"in brackets and shaded: 95 % intervals, bootstrap over {patients}"
    counted = f"{numbers[slides]} held-out {slides} of {numbers[patients]} {patients}{folds}"
    doubt = chance_text(numbers)
    title = f"{counted}; {certainty}. Research use only." + (f"\n{doubt}" if doubt else "")
    figure.suptitle(title, fontsize=11, x=0.012, ha="left")
    left, middle, right = figure.subplots(1, 3)
    _draw_curves(left, roc_curves, numbers, "auroc", "AUROC")
    left.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    left.set(title="ROC", xlabel="false positive rate (1 − specificity)", ylabel="sensitivity")
    _draw_curves(middle, pr_curves, numbers, "auprc", "average precision")
    middle.set(title="Precision-recall", xlabel="recall (sensitivity)", ylabel="precision")
    _draw_confusion(right, numbers["confusion"])
    title = f"Confusion; balanced accuracy {_with_interval(numbers, 'balanced_accuracy')}"
    right.set_title(title, fontsize=11)
    return figure


def _draw_curves(axes: Axes, curves: list[Curve], numbers: dict[str, Any], metric: str, name: str) -> None:
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        corners: Array | slice = slice(None)
        if metric == "auprc":  # the first corner of each recall: the others only lose precision
            corners = np.unique(curve.x, return_index=True)[1]
        axes.plot(
            curve.x[corners],
            curve.y[corners],
            color=colour,
            linewidth=2,
            drawstyle="steps-pre" if metric == "auprc" else "default",
            label=f"{curve.label}: {name} {_with_interval(numbers, f'{metric}_{curve.label}')}",
            clip_on=False,
        )
        if len(curves) <= MOST_BANDS:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0)
    if curves:
        axes.legend(loc="lower right" if metric == "auroc" else "lower left", fontsize=9, frameon=False)
    else:
        axes.text(0.5, 0.5, "every held-out slide is of one class", ha="center")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _with_interval(numbers: dict[str, Any], metric: str) -> str:
    low, high = numbers["intervals_95"][metric]
    value = f"{numbers['metrics'][metric]:.3f}"
    return f"{value} ({low:.3f}–{high:.3f})" if high - low > LEAST_WIDTH else value


def _draw_confusion(axes: Axes, confusion: dict[str, Any]) -> None:
    """Shaded by the share of the row; each cell has its count, and the share with any interval."""
    shares = np.array(confusion["share_of_row"])
    axes.imshow(np.nan_to_num(shares), cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    few = len(shares) <= 4
    for row, column in np.ndindex(shares.shape):
        share, (low, high) = shares[row, column], confusion["intervals_95"][row][column]
        lines = [str(confusion["counts"][row][column])]
        lines += [] if np.isnan(share) else [f"{100 * share:.0f} %"]
        lines += [f"({100 * low:.0f}–{100 * high:.0f} %)"] if high - low > LEAST_WIDTH else []
        style: dict[str, Any] = {"color": "white" if share > 0.6 else "black", "fontsize": 11 if few else 8}
        axes.text(column, row, "\n".join(lines), ha="center", va="center", **style)
    axes.set_xticks(range(shares.shape[1]), confusion["columns"])
    axes.set_yticks(range(shares.shape[0]), confusion["rows"], rotation=90 if few else 0, va="center")
    axes.set(xlabel="prediction", ylabel="truth (percent of the row)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
