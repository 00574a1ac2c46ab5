"""What if this region were not there, or only it, or benign tissue in its place? (HIPPO's questions.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from ..errors import ClientError
from .methods.game import CoalitionGame
from .methods.scorer import Float32, Float64, Int64, Mask, bank_draws
from .methods.target import Target
from .model.masked_slide import MaskedSlide

Change = Literal["remove", "keep", "replace"]


@dataclass(frozen=True, eq=False)
class Effect:
    """One region's what-if: `draws` [R, K] of v(changed) - v(slide); R = 1 unless replaced from a bank."""

    name: str
    change: Change
    tiles: int
    draws: Float64

    @property
    def mean(self) -> Float64:
        """Mean change of the explained numbers, [K]."""
        return np.asarray(self.draws.mean(axis=0))

    @property
    def stderr(self) -> Float64 | None:
        """Standard error of the mean over draws from the bank, [K]; None where nothing was drawn."""
        if len(self.draws) < 2:
            return None
        return np.asarray(self.draws.std(axis=0, ddof=1) / np.sqrt(len(self.draws)))


def counterfactual(
    subject: MaskedSlide,
    target: Target,
    regions: Mapping[str, Mask],
    *,
    change: Change = "remove",
    bank: Float32 | None = None,
    n_samples: int = 16,
    seed: int = 0,
) -> list[Effect]:
    """The effect of removing, keeping only, or replacing each named region (bool [N] of tiles).

    remove, keep: in place, through the mask.
    replace: every tile of the region takes an embedding drawn from `bank` [B, D], `n_samples` times over.
    """
    if change == "replace" and (bank is None or bank.ndim != 2 or not len(bank)):
        raise ClientError("to replace a region give a bank: embeddings [B, D] of benign tiles")
    for name, inside in regions.items():
        if not inside.any():
            raise ClientError(f"region {name!r} holds no tile of this slide")
    tiles = np.arange(len(subject.coords), dtype=np.int64)
    outside = ~np.stack(list(regions.values()))
    masked = CoalitionGame(subject.masked(), target, tiles)
    full = masked.values(np.ones((1, len(tiles)), dtype=bool))
    if change == "replace":
        assert bank is not None
        references = bank_draws(bank, len(tiles), n_samples, seed)
        games = [CoalitionGame(subject.replaced(reference), target, tiles) for reference in references]
        draws = np.stack([game.values(outside) for game in games], axis=1) - full
    else:
        draws = (masked.values(outside if change == "remove" else ~outside) - full)[:, None]
    return [
        Effect(name, change, int(inside.sum()), changes)
        for (name, inside), changes in zip(regions.items(), draws, strict=True)
    ]


def tiles_inside(geometry: BaseGeometry, coords: Int64, tile_size: tuple[int, int]) -> Mask:
    """Tiles [N] whose centre lies in `geometry` (level-0 px)."""
    x, y = (coords + np.array(tile_size) / 2).T
    return np.asarray(shapely.contains_xy(geometry, x, y), dtype=bool)
