"""Position embeddings: int64 grid indices and their sine embeddings, from a table with one row per index.

The published encoder keeps the embedding of every cell of the 1000 x 1000 grid (3 GB). The embedding of a
cell is only the embeddings of its two indices side by side, so 1000 rows of half the width suffice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.errors import TrainingError


def sine_table(rows: int, width: int) -> Tensor:
    """Embeddings f32 [rows, width] of the integers 0 .. rows-1: sines, then cosines.

    The width / 2 frequencies are 10000^(-i / (width/2)) (Vaswani et al. 2017, in the 2-D layout of MAE's
    `pos_embed`); computed in float64 and cast, as published.
    """
    half = width // 2
    numbers = torch.arange(max(rows, half), dtype=torch.float64, device="cpu")
    frequencies = 10_000.0 ** (-numbers[:half] / half)
    angles = numbers[:rows, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def check_grid(coords: Tensor, cell: int, grid: int) -> None:
    """Raise a `TrainingError` that names the first tile of `coords` i64 [N, 2] outside the position grid."""
    index = torch.div(coords, cell, rounding_mode="floor")
    outside = ((index < 0) | (index >= grid)).any(dim=1)
    if bool(outside.any()):
        tile = int(outside.nonzero()[0])
        x, y = coords[tile].tolist()
        raise TrainingError(
            f"tile {tile} at x={x}, y={y} lies outside the {grid} x {grid} grid of {cell}-px positions "
            f"(0 to {grid * cell - 1} px); give coordinates at the target mpp, or leave the tile out"
        )


def embed_positions(coords: Tensor, table: Tensor, cell: int) -> Tensor:
    """Position embeddings [N, 2 * width] of `coords` i64 [N, 2] = (x, y) px, y's half before x's.

    A tile outside the table is an error of the lookup on a CPU. Where it is none (in ONNX on CUDA, which
    looks up zeros, and in TensorRT, which takes the nearest row), all embeddings are NaN.
    """
    rows = table.shape[0]
    index = torch.div(coords, cell, rounding_mode="floor")
    index = torch.where(index < 0, rows, index)  # in ONNX a negative index would count from the end
    nothing = torch.where(index < rows, 0.0, torch.nan).sum()
    return torch.cat([F.embedding(index[:, 1], table), F.embedding(index[:, 0], table)], dim=1) + nothing
