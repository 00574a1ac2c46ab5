"""The result of an attribution method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...arrays import Float64

Grouping = Literal["look", "place"]
"""Whether tiles are grouped by their embeddings or by their coordinates."""


@dataclass(frozen=True)
class Attribution:
    """Signed values of N tiles for K model outputs; positive supports the output.

    Attributes:
        names: the outputs' names.
        values: [N, K].
        base, full: the outputs with no tile and with every tile kept, [K].
        evaluations: number of masks scored.
        additive: the values sum to full - base (Shapley and Owen values, not necessity and sufficiency).
        stderr: standard error of `values` [N, K] where the method samples, else None.
        leaf_size: mean number of tiles that share a value evenly because the budget ended before they were
            resolved, [N]; 1 is resolved. None for methods without such a limit.
        unresolved: fraction of the absolute values that is shared evenly by several tiles.
        grouping: how the tiles were grouped, for `partition_shap`.
        srg: the SRG by which one of two groupings was chosen, when each had a sixth of the masks.
        alternative: the map by the other grouping, with a sixth of the masks.
    """

    method: str
    names: tuple[str, ...]
    values: Float64
    base: Float64
    full: Float64
    evaluations: int
    additive: bool
    stderr: Float64 | None = None
    leaf_size: Float64 | None = None
    unresolved: float = 0.0
    grouping: Grouping | None = None
    srg: float | None = None
    alternative: Attribution | None = None

    @property
    def groupings(self) -> tuple[Attribution, ...]:
        """This map and the one by the other grouping."""
        return (self,) if self.alternative is None else (self, self.alternative)

    @property
    def completeness_gap(self) -> Float64:
        """|sum of values - (full - base)| / |full - base|, [K]; infinite where full equals base."""
        span = np.abs(self.full - self.base)
        missing = np.abs(self.values.sum(axis=0) - (self.full - self.base))
        return np.where(span > 0, missing / np.where(span > 0, span, 1.0), np.inf)
