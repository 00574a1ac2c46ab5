"""Class probabilities of logits, by the kind of the classes."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

HeadKind = Literal["multiclass", "multilabel", "binary"]


def probabilities(logits: NDArray[Any], kind: HeadKind) -> NDArray[np.float64]:
    """Class probabilities [..., C] of logits [..., C]: softmax for `multiclass`, else a sigmoid per class."""
    x = logits.astype(np.float64)
    if kind == "multiclass":
        raised = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.asarray(raised / raised.sum(axis=-1, keepdims=True), np.float64)
    return np.exp(-np.logaddexp(0, -x))  # 1 / (1 + exp(-x)), which overflows for large negative x
