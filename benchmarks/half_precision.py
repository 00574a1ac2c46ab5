"""`make bench NAME=half-precision`: what half precision costs the tile encoder, and maps of attributions.

A few channels of a trained ViT's tokens may be hundreds of times as large as the others ("massive
activations"). They are simulated: the bias of a block in the first third adds an amplitude to three channels,
and that of the last block takes it away again. Each graph is computed operator by operator in true half
(`export.half_gate`).

For maps the demo's slide encoder is computed in half by PyTorch, and the difference to float32 is compared
with the noise floor of `client.attribution.reliability`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import MACHINE, PAGES, REAL_SLIDE, Pages, console, table, write_page
from client.arrays import Float32, Int64, KeepMask
from client.attribution.attribute import Method, Settings, attribute
from client.attribution.curves import spearman
from client.attribution.methods.game import CoalitionGame
from client.attribution.methods.model_outputs import ModelOutputs
from client.attribution.methods.scorer import Forward, Scores
from client.attribution.model.masked_slide import MaskedSlide
from client.attribution.reliability import position_noise
from export.graphs import write_graph
from export.half_gate import TrueHalf
from export.precision import PRECISIONS, halve
from export.samples import real_tiles, seeded_coords
from export.tile_graph import tile_graph
from training.models.build import build_models
from training.models.slide_model import SlideModel
from training.models.tile_encoder import TileEncoder

AMPLITUDES = (0, 100, 300, 1000)
CHANNELS = (5, 17, 40)
MAPS: tuple[tuple[int, Method], ...] = (
    (56, "partition_shap"),
    (56, "occlusion"),
    (300, "partition_shap"),
    (300, "occlusion"),
)
"""Tiles of a slide, and the method; windows are single tiles."""


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


def forward_of(model: SlideModel) -> Forward:
    """A forward on PyTorch's model, 16 masks at a time."""

    @torch.inference_mode()
    def forward(embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        inputs = torch.from_numpy(embeddings), torch.from_numpy(coords)
        parts = (torch.from_numpy(keep[i : i + 16].copy()) for i in range(0, len(keep), 16))
        found = [model.score(*inputs, part) for part in parts]
        logits = [one.logits for one in found if one.logits is not None]
        return Scores(torch.cat(logits).numpy(), torch.cat([one.slide for one in found]).numpy())

    return forward


def slide_of_real_tiles(tiles: int) -> tuple[Float32, Int64]:
    """Embeddings of the real slide's darkest 56 tiles; for larger slides, points between pairs of them."""
    encoder = build_models("demo").tile
    with torch.inference_mode():
        real: Float32 = encoder(torch.from_numpy(real_tiles(REAL_SLIDE, count=56))).numpy()
    if tiles > len(real):
        rng = np.random.default_rng(0)
        first, second = rng.integers(len(real), size=(2, tiles))
        real = real[first] + rng.random((tiles, 1), np.float32) * (real[second] - real[first])
    return real, seeded_coords(tiles)


def measure_map(tiles: int, method: Method) -> str:
    """A row: the map in float32, its noise floor, and what half precision changes."""
    classes = build_models("demo").preset.classes
    embeddings, coords = slide_of_real_tiles(tiles)
    exact, half = (build_models("demo").slide_model for _ in range(2))
    halve(half.encoder)
    settings = Settings(method=method, sliding_window_shapes=1, strides=1)
    outputs, target = ModelOutputs(classes), classes.index("lesion")
    slides = [MaskedSlide(forward_of(model), embeddings, coords) for model in (exact, half)]
    maps = [attribute(slide, outputs, settings, target_index=target).values[:, target] for slide in slides]
    game = CoalitionGame(slides[0].in_place(), outputs, np.arange(tiles))
    _, floor = position_noise(slides[0], game, target, seed=0)
    difference = np.abs(maps[1] - maps[0])
    size = np.abs(maps[0])
    row = (
        f"{tiles:,} | {method} | {np.median(size):.1e} | {size.max():.1e} | {floor:.1e} "
        f"| {np.median(difference):.1e} | {difference.max():.1e} | {spearman(maps[0], maps[1]):.4f}"
    )
    console.print(row, markup=False)
    return row


def main(
    presets: Annotated[list[str] | None, typer.Argument(help="Presets [demo, gigapath-flash].")] = None,
    pages: Pages = PAGES,
) -> None:
    """Compare both half precisions with float32, without and with massive activations."""
    tiles = real_tiles(REAL_SLIDE)
    chosen = presets or ["demo", "gigapath-flash"]
    rows = [row for preset in chosen for size in AMPLITUDES for row in measure(preset, size, tiles)]
    maps = [measure_map(size, method) for size, method in MAPS]
    write_page(pages / "half-precision.md", _page(rows, maps))


def _page(rows: list[str], maps: list[str]) -> str:
    header = "preset | amplitude | precision | 1 - cosine | max-abs | largest half | margin to 65,504"
    of_maps = "tiles | method | median value | largest | noise floor | median difference | largest | rank"
    return f"""# Half precision

`make bench NAME=half-precision` on {MACHINE}.

## The tile encoder

4 real tiles, against PyTorch in float32. Weights are random
for `gigapath-flash`. Three channels of every token carry an amplitude from the first third of the
blocks to the last one, as massive activations of trained models do. An export passes up to 1 - cosine
of 1e-3.

{table(header, rows)}

In half precision the residual stream holds a number of several hundred to a quarter, so what the three
channels carry besides their amplitude is lost, of 96 channels or of 384. `fp16-mixed` keeps it.
Published weights are not on this machine: the parity report of an export decides.

## Maps

`slide_occlusion` of `demo` in `fp16` (`python -m export run --occlusion-precision fp16`) against float32:
values in log-odds of the class lesion, by 512 masks or without one tile at a time. The noise floor is what
a tile's value changes when all tiles are shifted by a few positions
([reliability](../attribution.md#reliability)).

{table(f"{of_maps} correlation", maps)}

A value of `partition_shap` is a difference between large groups: half precision changes it by a seventh of
the noise floor at most. The effect of leaving one tile out of many comes close to half precision's own
rounding: there `fp16` changes values by more than the noise floor, so float32 is the default.
"""
