"""What a method returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scorer import Float64


@dataclass(frozen=True)
class Attribution:
    """Signed values of N tiles for K explained numbers; positive supports the class.

    additive: the values are meant to sum to full - base (Shapley and Owen values; not the necessity
        and sufficiency maps, whose tiles each answer a question of their own).
    stderr: standard error of `values` where the method samples, else None.
    leaf_size: mean number of tiles among which a tile's value was split evenly because the budget ended
        before they were told apart, [N]; 1 is fully resolved. None where the method has no such limit.
    evaluations: masks scored.
    """

    method: str
    names: tuple[str, ...]
    values: Float64  # [N, K]
    base: Float64  # [K], v(nothing)
    full: Float64  # [K], v(everything)
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
