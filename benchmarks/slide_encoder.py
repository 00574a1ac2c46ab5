"""Seconds and memory of the `gigapath` slide encoder in float32, fused against plain matmul and softmax.

Every row is measured in its own process.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.common import (
    MACHINE,
    PAGES,
    Pages,
    console,
    in_own_process,
    peak_bytes,
    seconds_of,
    table,
    write_page,
)
from benchmarks.plain_longnet import PlainAttention
from training.models.dilated_attention import AttentionBackend, plan_fused_attention
from training.models.presets import get_preset
from training.models.random_init import randomise
from training.models.slide_encoder import LongNetSlideEncoder

ATTENTION: dict[str, AttentionBackend] = {"fused": plan_fused_attention, "plain": PlainAttention}
Measurement = tuple[str, int, float, float]  # attention, tiles, seconds, peak in GiB


def measure(attention: str, tiles: int) -> tuple[float, float, NDArray[np.float32]]:
    """Seconds of a forward over `tiles` tiles, this process's peak in GiB, and the pooled states."""
    torch.manual_seed(0)
    model = LongNetSlideEncoder(get_preset("gigapath").slide, ATTENTION[attention]).eval()
    randomise(model, 0)
    cells = torch.arange(tiles)
    coords = torch.stack([cells % 1000, cells // 1000], dim=1) * 256
    embeddings = torch.randn(tiles, 1536)
    states: list[torch.Tensor] = []
    with torch.inference_mode():
        seconds = seconds_of(lambda: states.append(model(embeddings, coords).layers))
    return seconds, peak_bytes() / 2**30, states[0].numpy()


def main(
    sizes: Annotated[list[int] | None, typer.Argument(help="Numbers of tiles [1000 10000 100000].")] = None,
    plain_at: Annotated[int, typer.Option(min=1, help="Tiles for plain matmul and softmax.")] = 10_000,
    pages: Pages = PAGES,
) -> None:
    """Measure every size with fused attention, and one with plain attention too."""
    rows: list[Measurement] = []
    states = {}
    for attention, tiles in [*(("fused", n) for n in sizes or [1000, 10_000, 100_000]), ("plain", plain_at)]:
        with console.status(f"{attention} attention, {tiles:,} tiles"):
            seconds, peak, states[attention, tiles] = in_own_process(measure, attention, tiles)
        rows.append((attention, tiles, seconds, peak))
        console.print(f"{attention} {tiles:9,} tiles  {seconds:8.1f} s  {peak:6.2f} GiB")
    difference = None
    if ("fused", plain_at) in states:
        difference = float(np.abs(states["fused", plain_at] - states["plain", plain_at]).max())
    write_page(pages / "slide-encoder.md", _page(rows, plain_at, difference))


def _page(rows: list[Measurement], plain_at: int, difference: float | None) -> str:
    lines = (f"{name} | {tiles:,} | {seconds:.1f} | {peak:.2f}" for name, tiles, seconds, peak in rows)
    page = f"""# The slide encoder on a CPU

`make bench NAME=slide-encoder`: one forward of the `gigapath` slide encoder (86 million weights from a seed,
12 layers, all 13 states pooled) in float32. Each row is measured in its own process, and its peak is that of
the whole process. {torch.get_num_threads()} threads, {MACHINE}, torch {torch.__version__}.

{table("attention | tiles | seconds | peak memory, GiB", lines)}
"""
    if difference is not None:
        (fused,) = (row for row in rows if row[:2] == ("fused", plain_at))
        plain = rows[-1]
        page += f"""
Plain is matmul and softmax with score matrices in memory. At {plain_at:,} tiles it takes
{plain[2] / fused[2]:.1f} times the seconds and {plain[3] / fused[3]:.1f} times the memory of fused attention;
the pooled states differ by at most {difference:.1e}.
"""
    return page
