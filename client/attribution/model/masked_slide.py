"""One slide under one model: the scorers of it that the methods and the reliability checks ask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import ClientError
from ..methods import scorer as occluders
from ..methods.scorer import Float32, Forward, Int64, Mask, Scorer, Scores
from .cache import CachedScorer, ScoreCache, identify


@dataclass(frozen=True)
class Cost:
    """How many forwards were made and how long they took."""

    forwards: int
    seconds: float

    @property
    def each(self) -> float | None:
        """Seconds a forward; None before the first."""
        return self.seconds / self.forwards if self.forwards else None


class MaskedSlide:
    """A slide's tiles in slot order (row-major) and the model that scores them; every mask is scored once.

    embeddings: float32 [N, D]. coords: int64 [N, 2] level-0 px. model: what tells one model's scores from
    another's in `memo` (the export's id).
    """

    def __init__(
        self,
        forward: Forward,
        embeddings: Float32,
        coords: Int64,
        *,
        model: str = "",
        memo: ScoreCache | None = None,
    ) -> None:
        if not len(embeddings):
            raise ClientError("nothing to explain: the slide has no tiles")
        if not np.isfinite(embeddings).all():
            raise ClientError(
                "some embeddings are NaN or infinite: leave those tiles out or score the slide again"
            )
        self.forward = forward
        self.embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        self.coords = coords
        self._memo = memo or ScoreCache()
        self._identity = identify(model, self.embeddings, coords).hex()
        self._whole: list[CachedScorer] = []
        self._bags: list[CachedScorer] = []

    def masked(self) -> Scorer:
        """In place: the default occluder."""
        return self._remembered(occluders.in_place(self.forward, self.embeddings, self.coords), "mask")

    def replaced(self, reference: Float32) -> Scorer:
        """A left-out tile's embedding becomes `reference` ([D] or [N, D])."""
        scorer = occluders.replace(self.forward, self.embeddings, self.coords, reference)
        return self._remembered(scorer, "replace" + identify(reference).hex())

    def bags(self) -> Scorer:
        """Only the kept tiles, as a sequence of their own: for bags of one tile."""
        scorer = occluders.drop(self.forward, self.embeddings, self.coords)
        return self._remembered(scorer, "drop", self._bags)

    def rolled(self, slots: int) -> Scorer:
        """The same tiles, coordinates and masks, each `slots` slots later in the sequence."""
        embeddings, coords = np.roll(self.embeddings, slots, axis=0), np.roll(self.coords, slots, axis=0)

        def score(keep: Mask) -> Scores:
            return self.forward(embeddings, coords, np.roll(keep, slots, axis=1))

        return self._remembered(score, f"roll{slots}")

    @property
    def cost(self) -> Cost:
        """Of masks of the whole slide that were really scored: neither repeated nor remembered."""
        return _sum(self._whole)

    @property
    def bag_cost(self) -> Cost:
        """The same of bags of tiles."""
        return _sum(self._bags)

    def _remembered(self, scorer: Scorer, occluder: str, kind: list[CachedScorer] | None = None) -> Scorer:
        remembered = CachedScorer(scorer, self._memo, identify(self._identity, occluder))
        (self._whole if kind is None else kind).append(remembered)
        return remembered


def _sum(scorers: list[CachedScorer]) -> Cost:
    return Cost(sum(scorer.forwards for scorer in scorers), sum(scorer.seconds for scorer in scorers))
