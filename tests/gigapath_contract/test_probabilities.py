"""Probabilities of logits, against hand-made cases."""

from __future__ import annotations

import math

import numpy as np

from gigapath_contract.probabilities import probabilities
from gigapath_contract.schema import HeadContract


def test_probabilities_are_softmax_or_a_sigmoid_each() -> None:
    logits = np.array([[0.0, 1000.0], [3.0, 3.0]])
    np.testing.assert_allclose(probabilities(logits, "multiclass"), np.array([[0, 1], [0.5, 0.5]]))
    sigmoid = np.array([0.5, 1 / (1 + math.exp(-2))])
    np.testing.assert_allclose(probabilities(np.array([[0.0], [2.0]]), "binary")[:, 0], sigmoid)


def test_a_head_gives_float32_probabilities_of_any_size_of_logits() -> None:
    logits = np.array([1000.0, 999.0, -1000.0], np.float32)
    multiclass = HeadContract("", ("a", "b", "c"), "multiclass").probabilities(logits)
    np.testing.assert_allclose(multiclass, [0.7310586, 0.2689414, 0.0], atol=1e-7)
    assert multiclass.dtype == np.float32
    multilabel = HeadContract("", ("a", "b"), "multilabel").probabilities(np.array([0.0, 2.0], np.float32))
    np.testing.assert_allclose(multilabel, [0.5, 0.8807970], atol=1e-7)


def test_large_logits_raise_no_warning() -> None:
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        found = probabilities(np.array([[-1e4, 700.0]], np.float32), "multilabel")
    np.testing.assert_array_equal(found, [[0.0, 1.0]])
