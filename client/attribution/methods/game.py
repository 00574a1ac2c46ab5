"""The cooperative game behind every method: players are tiles or regions, values are model outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from ...arrays import Float64, Int64, KeepMask
from ...errors import ClientError
from .model_outputs import ModelOutputs
from .result import Attribution
from .scorer import Scorer


@dataclass(frozen=True)
class CoalitionGame:
    """v(S): the outputs [K] of a slide of which only the players in S are kept.

    Attributes:
        feature_mask: player of every tile, int64 [N], 0..G-1 (Captum's word).
        perturbations_per_eval: masks that the scorer gets at once; bounds memory, changes no result.
        progress_callback: called with the number of masks scored since the last call.

    Raises:
        ClientError: no tiles, a gap in `feature_mask`, or no masks at once.
    """

    scorer: Scorer
    outputs: ModelOutputs
    feature_mask: Int64
    perturbations_per_eval: int = 64
    progress_callback: Callable[[int], None] = lambda masks: None

    def __post_init__(self) -> None:
        if self.feature_mask.ndim != 1 or not len(self.feature_mask):
            raise ClientError("nothing to explain: the slide has no tiles")
        present = np.unique(self.feature_mask)
        if present[0] != 0 or present[-1] != len(present) - 1:
            raise ClientError("feature_mask must number the regions 0, 1, 2, … without a gap")
        if self.perturbations_per_eval < 1:
            raise ClientError("perturbations_per_eval must be at least 1")

    @property
    def players(self) -> int:
        """Number of players, G."""
        return int(self.feature_mask.max()) + 1

    @property
    def sizes(self) -> Int64:
        """Number of tiles of every player, [G]."""
        return np.bincount(self.feature_mask).astype(np.int64)

    def values(self, coalitions: Iterable[KeepMask]) -> Float64:
        """v of each coalition (bool [G], True: kept), float64 [M, K]; a generator is read in blocks.

        Raises:
            ClientError: a score is NaN or infinite, or the scorer fails.
        """
        rows = iter(coalitions)
        parts: list[Float64] = []
        while block := list(islice(rows, self.perturbations_per_eval)):
            parts.append(self.outputs(self.scorer(np.stack(block)[:, self.feature_mask])))
            self.progress_callback(len(block))
        if not parts:
            return np.zeros((0, len(self.outputs.names)))
        values = np.concatenate(parts)
        if not np.isfinite(values).all():
            raise ClientError(
                "the model scored a masked slide as NaN or infinite: these weights can't be explained"
            )
        return values

    @cached_property
    def base_and_full(self) -> tuple[Float64, Float64]:
        """v with no player and with every player kept, [K] each; scored once."""
        empty, full = self.values(np.stack([np.zeros(self.players, bool), np.ones(self.players, bool)]))
        return empty, full

    def attribution(
        self, method: str, values: Float64, *, evaluations: int, additive: bool, **more: Any
    ) -> Attribution:
        """An attribution from values of the players [G, K]; additive ones are split among a player's tiles.

        more: further fields of `Attribution`.
        """
        base, full = self.base_and_full
        tiles = self.to_tiles(values, share=additive)
        return Attribution(method, self.outputs.names, tiles, base, full, evaluations, additive, **more)

    def to_tiles(self, values: Float64, *, share: bool) -> Float64:
        """Player values [G, K] -> tile values [N, K]; `share` splits a player's value among its tiles."""
        per_tile: Float64 = values / self.sizes[:, None] if share else values
        return per_tile[self.feature_mask]
