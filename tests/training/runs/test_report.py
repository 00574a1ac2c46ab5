"""The report on held-out predictions: its numbers are scikit-learn's, and a picture shows them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn import metrics

from gigapath_contract.probabilities import HeadKind
from training.cli import _print_report
from training.runs.record import interval_text, record_predictions
from training.runs.report import chance_text, read_report, write_report


def write_predictions(
    folder: Path,
    truth: list[int] | list[list[int]],
    scores: list[list[float]],
    kind: HeadKind,
    first: int = 0,
) -> None:
    """A fold's held-out predictions, two slides a patient."""
    folder.mkdir(parents=True)
    names = [f"s{first + k}" for k in range(len(truth))]
    record_predictions(
        folder / "predictions_test.csv",
        names,
        [f"p{(first + k) // 2}" for k in range(len(truth))],
        np.array(truth),
        np.array(scores),
        classes=[f"class {k}" for k in range(len(scores[0]))],
        kind=kind,
        bootstrap=1,
        seed=0,
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_curves_of_several_folds_are_pooled_and_are_those_of_scikit_learn(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 48)
    positive = np.round(np.clip(0.3 * truth + 0.7 * rng.random(48), 0, 1), 2)  # with ties
    scores = np.stack([1 - positive, positive], axis=1)
    folds = [tmp_path / f"fold_{k}" for k in range(3)]
    for k, fold in enumerate(folds):
        part = slice(16 * k, 16 * (k + 1))
        write_predictions(fold, truth[part].tolist(), scores[part].tolist(), "multiclass", first=16 * k)
    write_report(tmp_path, folds, ("class 0", "class 1"), "multiclass", bootstrap=50, seed=0)

    picture, numbers = read_report(tmp_path)
    auroc, precision = (
        metrics.roc_auc_score(truth, positive),
        metrics.average_precision_score(truth, positive),
    )
    assert (numbers["slides"], numbers["patients"], numbers["folds"]) == (48, 24, 3)
    assert numbers["metrics"]["auroc_class 1"] == pytest.approx(auroc)
    rows = table(tmp_path / "report" / "roc.csv")
    assert {row["class"] for row in rows} == {"class 1"}  # the other one mirrors it
    x, y, low, high = (
        np.array([float(row[name]) for row in rows])
        for name in ("false_positive_rate", "true_positive_rate", "low_95", "high_95")
    )
    assert metrics.auc(x, y) == pytest.approx(auroc)
    reached = np.append(np.diff(x) > 0, True)  # what a false positive rate reaches
    assert np.mean(((low <= y) & (y <= high))[reached]) > 0.95
    assert (high - low).max() > 0.1
    rows = table(tmp_path / "report" / "precision_recall.csv")
    recall, found = (np.array([float(row[name]) for row in rows]) for name in ("recall", "precision"))
    assert np.sum(np.diff(recall) * found[1:]) == pytest.approx(precision)
    for row in rows[1:]:  # the threshold gives what the row says
        chosen = positive >= float(row["threshold"])
        assert truth[chosen].mean() == pytest.approx(float(row["precision"]))
    confusion = numbers["confusion"]
    assert confusion["counts"] == metrics.confusion_matrix(truth, positive > 0.5).tolist()
    low, high = np.moveaxis(np.array(confusion["intervals_95"]), -1, 0)
    shares = np.array(confusion["share_of_row"])
    assert ((low <= shares) & (shares <= high)).all()
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape[1] > 1500
    assert pixels.std() > 20
    before = picture.stat().st_mtime_ns
    write_report(tmp_path, folds, ("class 0", "class 1"), "multiclass", bootstrap=50, seed=0)
    assert picture.stat().st_mtime_ns == before  # a finished run's report stays


def test_each_label_of_several_has_its_curve_and_what_is_not_defined_has_none(tmp_path: Path) -> None:
    truth = [[k % 2, 1] for k in range(24)]  # every slide has the second label
    scores = [[0.4 + 0.2 * (k % 3 == 1), 0.9] for k in range(24)]
    write_predictions(tmp_path / "run", truth, scores, "multilabel")
    write_report(tmp_path / "run", [tmp_path / "run"], ("A", "B"), "multilabel", bootstrap=20, seed=0)
    _, numbers = read_report(tmp_path / "run")
    assert {row["class"] for row in table(tmp_path / "run" / "report" / "roc.csv")} == {"A"}
    assert numbers["metrics"]["auroc_B"] is None
    assert numbers["confusion"]["rows"] == ["A: present", "A: absent", "B: present", "B: absent"]
    assert numbers["confusion"]["counts"] == [[4, 8], [4, 8], [24, 0], [0, 0]]
    assert numbers["confusion"]["share_of_row"][3] == [None, None]


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_few_patients_have_a_report_without_intervals(kind: HeadKind, tmp_path: Path) -> None:
    classes = ("a$b$_{",) if kind == "binary" else ("a", "b$_{$", "c")
    truth = [k % len(classes) if kind == "multiclass" else k % 2 for k in range(12)]
    scores = [[0.1 + 0.7 * (k % 3 == c) for c in range(len(classes))] for k in range(12)]
    write_predictions(tmp_path / "run", truth, scores, kind)
    write_report(tmp_path / "run", [tmp_path / "run"], classes, kind, bootstrap=20, seed=0)
    picture, numbers = read_report(tmp_path / "run")
    assert picture.stat().st_size > 10_000
    assert all(between == [None, None] for between in numbers["intervals_95"].values())
    assert json.dumps(numbers["confusion"]["intervals_95"]).count("null") == 2 * np.size(
        numbers["confusion"]["counts"]
    )
    assert {row["low_95"] for row in table(tmp_path / "run" / "report" / "roc.csv")} == {"nan"}


@pytest.mark.parametrize(
    ("patients", "rising", "title", "doubt"),
    [
        (12, True, "no intervals, as all draws agree", ""),
        (12, None, "in brackets and shaded: 95 % intervals", "a (0.500), b (0.500)"),
        (4, False, "fewer than 10 patients, so no intervals", "a (0.000), b (0.000)"),
    ],
)
def test_the_title_says_which_intervals_there_are_and_chance_is_named(
    patients: int,
    rising: bool | None,
    title: str,
    doubt: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth = [k % 2 for k in range(2 * patients)]
    right = [k // 2 % 2 if rising is None else k % 2 == int(rising) for k in range(2 * patients)]
    scores = [[1 - p, p] for p in (0.2 + 0.6 * flag for flag in right)]
    write_predictions(tmp_path / "run", truth, scores, "multiclass")
    titles: list[str] = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **style: titles.append(text))
    write_report(tmp_path / "run", [tmp_path / "run"], ("a", "b"), "multiclass", bootstrap=20, seed=0)
    assert title in titles[0]
    said = chance_text(read_report(tmp_path / "run")[1])
    assert said in titles[0]
    assert doubt in said if doubt else not said


@pytest.mark.parametrize(("patients", "reason"), [(4, "none: fewer than 10 patients"), (12, "")])
def test_a_reason_for_no_intervals_at_all_is_printed_once(
    patients: int, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = [k % 2 for k in range(2 * patients)]
    scores = [[0.4 + 0.2 * (k % 3 == 0), 0.6 - 0.2 * (k % 3 == 0)] for k in range(2 * patients)]
    write_predictions(tmp_path / "run", truth, scores, "multiclass")
    write_report(tmp_path / "run", [tmp_path / "run"], ("a", "b"), "multiclass", bootstrap=20, seed=0)
    _print_report(tmp_path / "run")
    shown = capsys.readouterr().out
    assert shown.count("none: ") == (1 if reason else 0)
    assert ("95 % interval " in shown.splitlines()[1]) == (not reason), "a column of intervals"


def test_a_missing_interval_says_why() -> None:
    nan = float("nan")
    assert interval_text(None, None, None) == interval_text(nan, nan, nan) == "none: undefined"
    assert interval_text(0.5, None, None) == "none: fewer than 10 patients"
    assert interval_text(1, 1, 1) == "none: all draws agree"
    assert interval_text(0.5, 0.25, 0.75) == "0.250 to 0.750"
