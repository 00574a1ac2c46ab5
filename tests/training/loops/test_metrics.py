"""Metrics against hand-made cases and their definitions; intervals against repeated sampling."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from sklearn import metrics

from training.loops.metrics import evaluate, intervals

CLASSES = ("a", "b", "c")


def test_perfect_and_reversed_predictions() -> None:
    truth = np.array([0, 1, 2, 0, 1, 2])
    perfect = evaluate(truth, np.eye(3)[truth], CLASSES, "multiclass")
    assert set(perfect.values()) == {1.0}
    reversed_scores = np.eye(2)[1 - np.array([0, 1, 0, 1])]
    worst = evaluate(np.array([0, 1, 0, 1]), reversed_scores, ("a", "b"), "multiclass")
    assert worst["auroc_macro"] == worst["accuracy"] == worst["balanced_accuracy"] == 0
    assert worst["quadratic_kappa"] == -1


def test_auroc_is_the_share_of_ordered_pairs_and_kappa_its_formula() -> None:
    rng = np.random.default_rng(0)
    truth, scores = rng.integers(0, 3, 80), rng.dirichlet(np.ones(3), 80)
    found = evaluate(truth, scores, CLASSES, "multiclass")
    positive, negative = scores[truth == 1, 1], scores[truth != 1, 1]
    assert found["auroc_b"] == pytest.approx((positive[:, None] > negative).mean())
    assert found["auroc_macro"] == pytest.approx(np.mean([found[f"auroc_{name}"] for name in CLASSES]))
    predicted = scores.argmax(axis=1)
    distance = (np.arange(3)[:, None] - np.arange(3)) ** 2
    observed = np.histogram2d(truth, predicted, bins=(3, 3), range=((0, 3), (0, 3)))[0]
    expected = np.outer(np.bincount(truth, minlength=3), np.bincount(predicted, minlength=3)) / 80
    kappa = 1 - (distance * observed).sum() / (distance * expected).sum()
    assert found["quadratic_kappa"] == pytest.approx(kappa)


@pytest.mark.parametrize("absent", [None, 2])
def test_what_is_counted_is_scikit_learns(absent: int | None) -> None:
    rng = np.random.default_rng(0)
    truth, scores = rng.integers(0, 4, 60), rng.dirichlet(np.ones(4), 60)
    truth[truth == absent] = 3
    predicted = scores.argmax(axis=1)
    found = evaluate(truth, scores, (*CLASSES, "d"), "multiclass")
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert found["balanced_accuracy"] == pytest.approx(metrics.recall_score(
        truth, predicted, average="macro", labels=np.unique(truth)
    ))  # fmt: skip
    kappa = metrics.cohen_kappa_score(truth, predicted, weights="quadratic", labels=range(4))
    assert found["quadratic_kappa"] == pytest.approx(kappa)


def test_balanced_accuracy_does_not_reward_the_common_class() -> None:
    truth = np.array([0] * 9 + [1])
    scores = np.tile([0.9, 0.1], (10, 1))
    found = evaluate(truth, scores, ("a", "b"), "multiclass")
    assert found["accuracy"] == 0.9
    assert found["balanced_accuracy"] == 0.5


def test_a_class_that_does_not_occur_is_undefined_and_does_not_count() -> None:
    truth = np.array([0, 1, 0, 1])
    found = evaluate(truth, np.eye(3)[truth], CLASSES, "multiclass")
    assert math.isnan(found["auroc_c"])
    assert found["auroc_macro"] == 1


@pytest.mark.parametrize(("kind", "classes"), [("multilabel", ("a", "b")), ("binary", ("a",))])
def test_labels_by_themselves(kind: str, classes: tuple[str, ...]) -> None:
    truth = np.array([[0, 1], [1, 0], [1, 1], [0, 0]])[:, : len(classes)]
    found = evaluate(truth, np.where(truth, 0.8, 0.3), classes, kind)  # type: ignore[arg-type]
    assert found["accuracy"] == found["auroc_a"] == found["auprc_macro"] == 1
    assert "quadratic_kappa" not in found


def test_intervals_cover_as_often_as_they_say_and_widen_when_patients_have_many_slides() -> None:
    rng = np.random.default_rng(0)

    def draw(patients: int, slides: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Labels [n, 1] and scores [n, 1], alike in a patient's slides, of accuracy 0.8 in expectation."""
        truth = rng.integers(0, 2, patients)
        right = rng.random(patients) < 0.8
        scores = np.where(right, truth, 1 - truth).astype(float)
        return truth.repeat(slides)[:, None], scores.repeat(slides)[:, None]

    covered, each = 0, [str(k) for k in range(60)]
    for trial in range(40):
        found = intervals(*draw(60, 1), ("a",), "binary", groups=each, samples=40, seed=trial)
        covered += found["accuracy"][0] <= 0.8 <= found["accuracy"][1]
    assert covered >= 0.85 * 40
    truth, scores = draw(20, 5)
    by = {
        name: intervals(truth, scores, ("a",), "binary", groups=groups, samples=100)["accuracy"]
        for name, groups in {
            "patient": [str(k // 5) for k in range(100)],
            "slide": [str(k) for k in range(100)],
        }.items()
    }
    assert by["patient"][1] - by["patient"][0] > 1.5 * (by["slide"][1] - by["slide"][0])


def test_too_few_patients_have_no_interval() -> None:
    truth, scores = np.arange(20)[:, None] % 2, np.linspace(0, 1, 20)[:, None]
    few = intervals(truth, scores, ("a",), "binary", groups=["p", "q"] * 10, samples=20)
    assert all(math.isnan(edge) for pair in few.values() for edge in pair)
    enough = intervals(truth, scores, ("a",), "binary", groups=list("abcdefghij") * 2, samples=20)
    assert all(math.isfinite(edge) for edge in enough["accuracy"])
