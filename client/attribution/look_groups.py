"""Groups of tiles that look alike as players: what kinds of tissue carry a slide's score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..arrays import Float32, Float64, Int64
from .attribute import Settings, attribute
from .methods.model_outputs import ModelOutputs
from .methods.trees import COMPONENTS, by_look, principal_components
from .model.masked_slide import MaskedSlide

MOST_GROUPS = 32
TYPICAL_TILES = 8


@dataclass(frozen=True, eq=False)
class LookGroups:
    """Groups of tiles by look and their Shapley values for one output, by decreasing value.

    Attributes:
        labels: group of every tile [N], 0..G-1.
        values: Shapley value of each group [G]; their sum is `span`, the full less the empty slide's output.
        stderr: their standard errors [G].
        typical: for each group, at most 8 of its tiles, nearest to its mean embedding first.
    """

    labels: Int64
    values: Float64
    stderr: Float64
    span: float
    typical: tuple[Int64, ...]

    @property
    def tissue(self) -> Float64:
        """The part of the tiles that each group holds, [G]."""
        return np.asarray(np.bincount(self.labels) / len(self.labels))

    @property
    def score(self) -> Float64:
        """The part of the score that each group carries, [G]; parts below 0 oppose the class."""
        return np.asarray(self.values / self.span if self.span else np.full(len(self.values), np.nan))

    def lines(self) -> list[str]:
        """One line per group."""
        errors = np.abs(self.stderr / self.span) if self.span else np.full(len(self.stderr), np.nan)
        return [
            f"group {number}, {tissue:.0%} of the tissue, carries {score:.0%} (± {error:.0%}) of the score"
            for number, (tissue, score, error) in enumerate(
                zip(self.tissue, self.score, errors, strict=True), start=1
            )
        ]


def find_look_groups(
    masked_slide: MaskedSlide,
    outputs: ModelOutputs,
    settings: Settings,
    *,
    count: int,
    target_index: int,
    progress_callback: Callable[[int], None] = lambda masks: None,
) -> LookGroups:
    """The slide's tiles in at most `count` groups by look, with Shapley values for the output `target_index`.

    settings: the occluder, the seed and the number of masks are taken from these.

    Raises:
        ClientError: the model fails.
    """
    embeddings = masked_slide.embeddings
    tiles = np.arange(len(embeddings), dtype=np.int64)
    components = principal_components(embeddings, COMPONENTS)

    def spread(members: Int64) -> float:
        return float(components[members].var(axis=0).sum() * len(members))

    parts = by_look(embeddings).parts(min(count, MOST_GROUPS), spread)
    found = attribute(
        masked_slide,
        outputs,
        replace(settings, method="shapley_regression", feature_mask=parts),
        target_index=target_index,
        progress_callback=progress_callback,
    )
    assert found.stderr is not None
    values, stderr = (
        np.bincount(parts, each[:, target_index]).astype(np.float64) for each in (found.values, found.stderr)
    )
    order = np.argsort(-values, kind="stable")
    labels = np.argsort(order)[parts]
    typical = tuple(
        _typical(embeddings[labels == group], tiles[labels == group]) for group in range(len(order))
    )
    span = float((found.full - found.base)[target_index])
    return LookGroups(labels, values[order], stderr[order], span, typical)


def _typical(embeddings: Float32, tiles: Int64) -> Int64:
    distances = np.square(embeddings - embeddings.mean(axis=0)).sum(axis=1)
    return np.asarray(tiles[np.argsort(distances, kind="stable")[:TYPICAL_TILES]])
