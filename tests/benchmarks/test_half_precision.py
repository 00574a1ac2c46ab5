"""What half precision does on a GPU, computed without one: rounding, massive activations, overflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.half_precision import make_massive, run_half
from export.parity import LARGEST_HALF
from export.samples import real_tiles
from training.models.build import build_models


@pytest.fixture
def tiles(real_slide: Path) -> Tensor:
    return torch.from_numpy(real_tiles(real_slide, count=2))


def lost(found: Tensor, exact: Tensor) -> float:
    """1 - the least cosine."""
    return 1 - torch.nn.functional.cosine_similarity(found.double(), exact.double()).min().item()


@torch.no_grad()
def test_in_float32_it_is_pytorchs_model(tiles: Tensor) -> None:
    encoder = build_models("demo").tile
    found, largest = run_half(encoder, "fp32", tiles.numpy())
    torch.testing.assert_close(found, encoder(tiles), atol=1e-5, rtol=0)
    assert not largest


@torch.no_grad()
def test_massive_activations_need_a_residual_in_float32(tiles: Tensor) -> None:
    encoder = build_models("demo").tile
    costs: dict[tuple[int, str], float] = {}
    for amplitude in (0, 1000):
        make_massive(encoder, amplitude)
        exact = encoder(tiles)
        for precision in ("fp16", "fp16-mixed"):
            found, largest = run_half(encoder, precision, tiles.numpy())
            costs[amplitude, precision] = lost(found, exact)
            assert max(largest.values()) < 2000
    assert costs[0, "fp16"] < 1e-5
    assert costs[0, "fp16-mixed"] < 1e-5
    assert costs[1000, "fp16-mixed"] < 1e-5
    assert costs[1000, "fp16"] > 1e-3, "three channels of 96 hold nothing but their amplitude"


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp16", "fp16-mixed"])
def test_an_overflow_is_found_and_named(tiles: Tensor, precision: str) -> None:
    """A SwiGLU product of 1.6e5, scaled down again by the projection after it."""
    encoder = build_models("demo").tile
    block: Any = encoder.vit.blocks[1]
    mlp = block.mlp
    hidden = mlp.fc2.in_features
    mlp.fc1.bias[0] = mlp.fc1.bias[hidden] = 400
    mlp.fc2.weight[:, 0] = 0
    found, largest = run_half(encoder, precision, tiles.numpy())
    assert encoder(tiles).isfinite().all()
    assert not found.isfinite().all()
    name, size = next((name, size) for name, size in largest.items() if not size <= LARGEST_HALF)
    assert name == "blocks.1.mlp.gated"
    assert size == pytest.approx(1.6e5, rel=0.1), "the product, had it not been rounded"
