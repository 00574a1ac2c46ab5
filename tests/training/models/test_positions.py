"""Grid positions: the published layout, and an error for a tile outside."""

from __future__ import annotations

import math

import pytest
import torch

from training.errors import TrainingError
from training.models.positions import check_grid, embed_positions, sine_table


def test_first_half_is_y_and_second_half_x() -> None:
    width = 8
    coords = torch.tensor([[256 * 7 + 255, 256 * 990], [0, 255]])
    got = embed_positions(coords, sine_table(1000, width), 256)

    def sines(index: int) -> list[float]:
        frequencies = [10_000 ** (-i / 4) for i in range(4)]
        return [math.sin(index * f) for f in frequencies] + [math.cos(index * f) for f in frequencies]

    want = torch.tensor([sines(990) + sines(7), sines(0) + sines(0)])
    assert torch.allclose(got, want, atol=1e-6)


def test_the_table_is_small() -> None:
    assert sine_table(1000, 384).nbytes < 2e6


@pytest.mark.parametrize("bad", [(-1, 0), (0, -300), (256_000, 0), (0, 256_000)])
def test_names_the_tile_outside_the_grid(bad: tuple[int, int]) -> None:
    coords = torch.tensor([[0, 0], [255_999, 255_999], bad, bad])
    with pytest.raises(TrainingError, match=rf"tile 2 at x={bad[0]}, y={bad[1]} lies outside .* target mpp"):
        check_grid(coords, 256, 1000)
    check_grid(coords[:2], 256, 1000)


@pytest.mark.parametrize("bad", [(-1, 0), (0, 256_000)])
def test_the_graph_itself_fails_on_a_tile_outside_instead_of_wrapping(bad: tuple[int, int]) -> None:
    with pytest.raises(IndexError):
        embed_positions(torch.tensor([bad]), sine_table(1000, 8), 256)
