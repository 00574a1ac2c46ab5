"""The outputs that are explained: log-odds, probabilities, logits or the slide embedding's similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from gigapath_contract.probabilities import HeadKind, probabilities

from ...arrays import Bool, Float32, Float64
from ...errors import ClientError
from .scorer import Scores

Score = Literal["log_odds", "probability", "logit", "embedding"]


@dataclass(frozen=True)
class ModelOutputs:
    """Turns scores into K explained outputs: one per class, or the embedding's similarity (K = 1).

    Attributes:
        names: the classes, or `embedding`.
        score: `log_odds`: logit_c - logsumexp(the other logits); for a multilabel or one-logit head the logit
            itself. `probability`: softmax or sigmoid. `logit`: as it is. `embedding`: cosine similarity to
            `reference`.
        reference: the unmasked slide's embedding [E], for `embedding` only.

    Raises:
        ClientError: `embedding` without a reference.
    """

    names: tuple[str, ...]
    score: Score = "log_odds"
    head: HeadKind = "multiclass"
    reference: Float32 | None = None

    def __post_init__(self) -> None:
        if self.score == "embedding" and self.reference is None:
            raise ClientError("the `embedding` score compares with the unmasked slide: give its embedding")

    def calls(self, values: Float64) -> Bool:
        """Which classes outputs [M, K] predict: the highest, or each above even odds where several may hold.

        Raises:
            ClientError: for `embedding`, which has no classes.
        """
        if self.score == "embedding":
            raise ClientError("the `embedding` score has no classes that a slide could be called")
        if self.head != "multilabel" and values.shape[1] > 1:
            return np.asarray(values == values.max(axis=1, keepdims=True))
        return np.asarray(values > (0.5 if self.score == "probability" else 0))

    def __call__(self, scores: Scores) -> Float64:
        """Scores of M masks -> outputs, float64 [M, K]."""
        if self.score == "embedding":
            assert self.reference is not None
            return _cosine(scores.slide.astype(np.float64), self.reference.astype(np.float64))[:, None]
        logits = scores.logits.astype(np.float64)
        exclusive = self.head != "multilabel" and logits.shape[1] > 1
        if self.score == "logit" or (self.score == "log_odds" and not exclusive):
            return logits
        if self.score == "log_odds":
            return _log_odds(logits)
        return probabilities(logits, "multiclass" if exclusive else "multilabel")


def _log_odds(logits: Float64) -> Float64:
    # The class itself is set to -inf rather than subtracted: exact where one class has all the mass.
    classes = logits.shape[1]
    others = np.repeat(logits[:, None, :], classes, axis=1)
    others[:, np.arange(classes), np.arange(classes)] = -np.inf
    return np.asarray(logits - np.logaddexp.reduce(others, axis=2))


def _cosine(rows: Float64, reference: Float64) -> Float64:
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(reference)
    return np.asarray((rows @ reference) / np.maximum(norms, np.finfo(np.float64).tiny))
