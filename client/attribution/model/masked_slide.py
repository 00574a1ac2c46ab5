"""All scorers for one slide and one model, with cached results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from gigapath_contract.schema import Contract

from ...arrays import Float32, Int64, KeepMask
from ...errors import ClientError
from ..methods.scorer import Forward, Scorer, Scores, concatenate
from .cache import CachedScorer, ScoreCache, cache_key
from .embedded import EmbeddedSlide


@dataclass(frozen=True)
class Cost:
    """How many forwards were made and how long they took."""

    forwards: int
    seconds: float

    @property
    def per_forward(self) -> float | None:
        """Seconds per forward; None before the first."""
        return self.seconds / self.forwards if self.forwards else None


class MaskedSlide:
    """A slide's tiles in row-major order and the model that scores them; each mask is scored once.

    Attributes:
        forward: the model.
        embeddings: float32 [N, D].
        coords: int64 [N, 2] in level-0 px, from which regions are made.
        model_coords: int64 [N, 2] as the model takes them.
    """

    def __init__(
        self,
        forward: Forward,
        embeddings: Float32,
        coords: Int64,
        *,
        model_coords: Int64 | None = None,
        model: str = "",
        cache: ScoreCache | None = None,
    ) -> None:
        """`model_coords` are `coords` if None; `model` tells one model's scores in `cache` from another's.

        Raises:
            ClientError: no tiles; from the scorers, as `check_finite` does.
        """
        if not len(embeddings):
            raise ClientError("nothing to explain: the slide has no tiles")
        self.forward = forward
        self.embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        self.coords = coords
        self.model_coords = coords if model_coords is None else model_coords
        self._wrong = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        self._cache = cache or ScoreCache()
        self._key = cache_key(model, self.embeddings, self.model_coords).hex()
        self._whole: list[CachedScorer] = []
        self._dropped: list[CachedScorer] = []

    @classmethod
    def from_embedded(
        cls, slide: EmbeddedSlide, forward: Forward, contract: Contract, cache: ScoreCache | None = None
    ) -> MaskedSlide:
        """The slide under a served model.

        Raises:
            ContractMismatch: the model does not take these embeddings or coordinates.
        """
        slide.check(contract)
        return cls(
            forward,
            slide.embeddings,
            slide.coords,
            model_coords=slide.model_coords(contract),
            model=contract.export_id,
            cache=cache,
        )

    def in_place(self) -> Scorer:
        """Occluded tiles keep their position and are masked, so that no query sees them: the default."""
        score = partial(self.forward, self.embeddings, self.model_coords)
        return self._cached(score, "in_place", self._whole)

    def replaced(self, reference: Float32) -> Scorer:
        """An occluded tile's embedding becomes `reference`: [D] for all tiles, or [N, D] with one per tile.

        Masks differ in their embeddings, so every mask is a separate forward.
        """

        def score(keep: KeepMask) -> Scores:
            everything = np.ones((1, len(self.embeddings)), dtype=bool)
            changed = (np.where(row[:, None], self.embeddings, reference) for row in keep)
            return concatenate([self.forward(each, self.model_coords, everything) for each in changed])

        return self._cached(score, "replace" + cache_key(reference).hex(), self._whole)

    def dropped(self) -> Scorer:
        """Occluded tiles are taken out of the sequence, as HIPPO, xMIL and MILLI do.

        In LongNet that moves every later tile to another position, hence to other heads and segments: use it
        for bags of one tile (`keep_one`) and not for `occlusion`.

        The scorer raises ValueError for a mask that keeps no tile.
        """

        def score(keep: KeepMask) -> Scores:
            if not keep.any(axis=1).all():
                raise ValueError("a slide with every tile dropped has no score; use the in-place mask")
            bags = ((self.embeddings[row], self.model_coords[row]) for row in keep)
            return concatenate([self.forward(*bag, np.ones((1, len(bag[0])), dtype=bool)) for bag in bags])

        return self._cached(score, "drop", self._dropped)

    def shifted(self, positions: int) -> Scorer:
        """The same tiles, coordinates and masks, `positions` later in the sequence (cyclic)."""
        embeddings = np.roll(self.embeddings, positions, axis=0)
        coords = np.roll(self.model_coords, positions, axis=0)

        def score(keep: KeepMask) -> Scores:
            return self.forward(embeddings, coords, np.roll(keep, positions, axis=1))

        return self._cached(score, f"shift{positions}", self._whole)

    def check_finite(self, keep: KeepMask) -> None:
        """Refuse masks `keep` bool [M, N] of which one keeps a tile whose embedding is not finite.

        Raises:
            ClientError: one does; the tile is named.
        """
        kept = self._wrong[keep[:, self._wrong].any(axis=0)]
        if len(kept):
            raise ClientError(
                f"the embedding of tile {kept[0]} is NaN or infinite: leave the tile out or score the slide "
                "again"
            )

    @property
    def cost(self) -> Cost:
        """Of the masks of the whole sequence that were scored and not found in the cache."""
        return _sum(self._whole)

    @property
    def dropped_cost(self) -> Cost:
        """The same of sequences from which tiles were dropped."""
        return _sum(self._dropped)

    def _cached(self, scorer: Scorer, occluder: str, scorers: list[CachedScorer]) -> Scorer:
        cached = CachedScorer(scorer, self._cache, cache_key(self._key, occluder))
        scorers.append(cached)

        def score(keep: KeepMask) -> Scores:
            self.check_finite(keep)
            return cached(keep)

        return score


def _sum(scorers: list[CachedScorer]) -> Cost:
    return Cost(sum(scorer.forwards for scorer in scorers), sum(scorer.seconds for scorer in scorers))
