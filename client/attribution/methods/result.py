"""The result of an attribution method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...arrays import Float64


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
        unresolved: fraction of the absolute values that lies in nodes of several tiles.
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

    @property
    def completeness_gap(self) -> Float64:
        """|sum of values - (full - base)| / |full - base|, [K]; infinite where full equals base."""
        span = np.abs(self.full - self.base)
        missing = np.abs(self.values.sum(axis=0) - (self.full - self.base))
        return np.where(span > 0, missing / np.where(span > 0, span, 1.0), np.inf)
