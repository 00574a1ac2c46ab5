"""Toy slides whose attributions are known exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest

from client.arrays import Float64, Int64, KeepMask
from client.attribution.methods.game import CoalitionGame
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.scorer import Scores
from gigapath_contract.schema import (
    Contract,
    HeadContract,
    LimitsContract,
    OcclusionContract,
    SlideEncoderContract,
    TileContract,
    TileEncoderContract,
    VariantContract,
)

Rule = Callable[[KeepMask], Float64]


class MakeGame(Protocol):
    def __call__(self, rule: Rule, players: int, feature_mask: Int64 | None = None) -> CoalitionGame: ...


@pytest.fixture
def toy_game() -> MakeGame:
    """A game whose value is exactly `rule(keep [M, N]) -> [M]`, as the raw first logit of two classes."""

    def make(rule: Rule, players: int, feature_mask: Int64 | None = None) -> CoalitionGame:
        def scorer(keep: KeepMask) -> Scores:
            value = rule(keep).astype(np.float32)
            return Scores(
                np.stack([value, np.zeros_like(value)], axis=1), np.ones((len(keep), 2), np.float32)
            )

        mask = np.arange(players) if feature_mask is None else feature_mask
        return CoalitionGame(scorer, ModelOutputs(("tumour", "normal"), score="log_odds"), mask)

    return make


@pytest.fixture
def square() -> Callable[[int], Int64]:
    """Row-major coords [side², 2] of a full square of 256-px tiles."""

    def make(side: int) -> Int64:
        rows, columns = np.divmod(np.arange(side * side), side)
        return np.stack([columns, rows], axis=1).astype(np.int64) * 256

    return make


@pytest.fixture
def toy_contract() -> Contract:
    """The contract of a model that takes embeddings of width 2 and knows two classes."""
    return Contract(
        schema=1,
        export_id="toy",
        version=1,
        preset="toy",
        trained=False,
        tile_encoder=TileEncoderContract("toy", "tile-digest", 2),
        slide_encoder=SlideEncoderContract("toy", "slide-digest", 2, 1, (1024,), (1,)),
        head=HeadContract("head-digest", ("tumour", "normal"), "multiclass"),
        tile=TileContract(256, 224, 0.5, 64),
        variant=VariantContract("cls", 1, "norm", "level0/256", "row-major"),
        precision="fp32",
        occlusion=OcclusionContract("fp32", 4096),
        limits=LimitsContract(200_000, 1000),
        versions={},
    )
