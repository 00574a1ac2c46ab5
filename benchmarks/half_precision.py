"""`make bench NAME=half-precision`: what each half precision costs the tile encoder.

A few channels of a trained ViT's tokens may be hundreds of times as large as the others ("massive
activations"). They are simulated: the bias of a block in the first third adds an amplitude to three channels,
and that of the last block takes it away again. Each graph is computed operator by operator in true half
(`export.half_gate`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import MACHINE, PAGES, REAL_SLIDE, Pages, console, run_driver, table, write_page
from export.graphs import write_graph
from export.half_gate import TrueHalf
from export.precision import PRECISIONS
from export.samples import real_tiles
from export.tile_graph import tile_graph
from training.models.build import build_models
from training.models.tile_encoder import TileEncoder

AMPLITUDES = (0, 100, 300, 1000)
CHANNELS = (5, 17, 40)


@torch.no_grad()
def make_massive(encoder: TileEncoder, amplitude: float) -> None:
    """Carry `amplitude` through the blocks in `CHANNELS` of every token."""
    blocks: Any = encoder.vit.blocks
    for block, sign in ((blocks[len(blocks) // 4], 1), (blocks[-1], -1)):
        for channel in CHANNELS:
            block.mlp.fc2.bias[channel] += sign * amplitude / block.ls2.gamma[channel]


def run_half(
    encoder: TileEncoder, precision: str, tiles: np.ndarray
) -> tuple[torch.Tensor, dict[str, float]]:
    """Embeddings of uint8 `tiles` in true half, and every float16 tensor's largest magnitude by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tile_encoder" / "model.onnx"
        path.parent.mkdir()
        write_graph(tile_graph(encoder, PRECISIONS[precision]), path)
        run = TrueHalf(Path(folder))
        found = torch.from_numpy(run("tile_encoder", {"TILES": tiles})["EMBEDDINGS"])
    return found, {tensor.name: tensor.largest for tensor in run.tensors()}


def measure(preset: str, amplitude: float, tiles: np.ndarray) -> list[str]:
    """A row for each half precision: the least cosine and largest difference to float32, the largest half."""
    encoder = build_models(preset).tile
    make_massive(encoder, amplitude)
    with torch.no_grad():
        exact = encoder(torch.from_numpy(tiles))
    rows = []
    for precision in ("fp16", "fp16-mixed"):
        found, largest = run_half(encoder, precision, tiles)
        cosine = torch.nn.functional.cosine_similarity(found.double(), exact.double()).min().item()
        difference = (found - exact).abs().max().item()
        rows.append(
            f"{preset} | {amplitude} | {precision} | {1 - cosine:.1e} | {difference:.1e} "
            f"| {max(largest.values()):.0f} | {65504 / max(largest.values()):.0f}"
        )
        console.print(rows[-1], markup=False)
    return rows


def main(
    presets: Annotated[list[str] | None, typer.Argument(help="Presets [demo, gigapath-flash].")] = None,
    pages: Pages = PAGES,
) -> None:
    """Compare both half precisions with float32, without and with massive activations."""
    tiles = real_tiles(REAL_SLIDE)
    chosen = presets or ["demo", "gigapath-flash"]
    rows = [row for preset in chosen for size in AMPLITUDES for row in measure(preset, size, tiles)]
    write_page(pages / "half-precision.md", _page(rows))


def _page(rows: list[str]) -> str:
    header = "preset | amplitude | precision | 1 - cosine | max-abs | largest half | margin to 65,504"
    return f"""# The tile encoder in half precision

`make bench NAME=half-precision` on {MACHINE}: 4 real tiles, against PyTorch in float32. Weights are random
for `gigapath-flash`. Three channels of every token carry an amplitude from the first third of the
blocks to the last one, as massive activations of trained models do. An export passes up to 1 - cosine
of 1e-3.

{table(header, rows)}

In half precision the residual stream holds a number of several hundred to a quarter, so what the three
channels carry besides their amplitude is lost, of 96 channels or of 384. `fp16-mixed` keeps it.
Published weights are not on this machine: the parity report of an export decides.
"""


if __name__ == "__main__":
    run_driver(main)
