"""Counterfactuals, as in HIPPO: a region removed, kept alone, or replaced by benign tissue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from ..arrays import Float32, Float64, Int64, KeepMask
from ..errors import ClientError
from .methods.game import CoalitionGame
from .methods.model_outputs import ModelOutputs
from .methods.scorer import bank_draws
from .model.masked_slide import MaskedSlide

Change = Literal["remove", "keep", "replace"]


@dataclass(frozen=True, eq=False)
class Effect:
    """The effect of changing one region.

    tiles: number of tiles in the region.
    draws: v(changed) - v(slide), [R, K]; R = 1 unless tiles were drawn from a bank.
    """

    name: str
    change: Change
    tiles: int
    draws: Float64

    @property
    def mean(self) -> Float64:
        """Mean change of the outputs, [K]."""
        return np.asarray(self.draws.mean(axis=0))

    @property
    def stderr(self) -> Float64 | None:
        """Standard error of the mean over draws, [K]; None for a single one."""
        if len(self.draws) < 2:
            return None
        return np.asarray(self.draws.std(axis=0, ddof=1) / np.sqrt(len(self.draws)))


def counterfactual(
    masked_slide: MaskedSlide,
    outputs: ModelOutputs,
    regions: Mapping[str, KeepMask],
    *,
    change: Change = "remove",
    bank: Float32 | None = None,
    n_samples: int = 16,
    seed: int = 0,
) -> list[Effect]:
    """The effect of a change of each named region (bool [N] of tiles).

    change: `remove` and `keep` mask in place, `replace` gives every tile of the region an embedding drawn
        from `bank` [B, D], in `n_samples` independent draws.

    Raises:
        ClientError: a region without tiles, `replace` without a bank, or the model fails.
    """
    if change == "replace" and (bank is None or bank.ndim != 2 or not len(bank)):
        raise ClientError("to replace a region give a bank of benign tiles: --bank, a benign slide's H5 file")
    for name, inside in regions.items():
        if not inside.any():
            raise ClientError(f"region {name!r} holds no tile of this slide")
    tiles = np.arange(len(masked_slide.coords), dtype=np.int64)
    outside = ~np.stack(list(regions.values()))
    in_place = CoalitionGame(masked_slide.in_place(), outputs, tiles)
    full = in_place.values(np.ones((1, len(tiles)), dtype=bool))
    if change == "replace":
        assert bank is not None
        references = bank_draws(bank, len(tiles), n_samples, seed)
        games = [CoalitionGame(masked_slide.replaced(reference), outputs, tiles) for reference in references]
        draws = np.stack([game.values(outside) for game in games], axis=1) - full
    else:
        draws = (in_place.values(outside if change == "remove" else ~outside) - full)[:, None]
    return [
        Effect(name, change, int(inside.sum()), changes)
        for (name, inside), changes in zip(regions.items(), draws, strict=True)
    ]


def tiles_inside(geometry: BaseGeometry, coords: Int64, tile_size: tuple[int, int]) -> KeepMask:
    """Which tiles [N] have their centre in `geometry` (level-0 px)."""
    x, y = (coords + np.array(tile_size) / 2).T
    return np.asarray(shapely.contains_xy(geometry, x, y), dtype=bool)
