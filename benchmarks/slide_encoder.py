"""Seconds and memory of the `gigapath` slide encoder in float32, and against plain matmul and softmax.

`make bench-slide-encoder` writes the table to `docs/benchmarks/slide-encoder.md`. Every row has a process of
its own, so that a peak is that row's.
"""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.plain_longnet import PlainAttention
from training.models.dilated_attention import plan_fused_attention
from training.models.presets import get_preset
from training.models.random_init import randomise
from training.models.slide_encoder import LongNetSlideEncoder

REPORT = Path("docs/benchmarks/slide-encoder.md")

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def measure(tiles: int, out: Path, plain: bool = False) -> None:
    """One row: print seconds and peak GiB, and write the pooled states to `out`."""
    torch.manual_seed(0)
    attention = PlainAttention if plain else plan_fused_attention
    model = LongNetSlideEncoder(get_preset("gigapath").slide, attention).eval()
    randomise(model, 0)
    cells = torch.arange(tiles)
    coords = torch.stack([cells % 1000, cells // 1000], dim=1) * 256
    embeddings = torch.randn(tiles, 1536)
    start = time.perf_counter()
    with torch.inference_mode():
        layers = model(embeddings, coords).layers
    seconds = time.perf_counter() - start
    torch.save(layers, out)
    typer.echo(f"{seconds} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}")


@app.command()
def report(
    sizes: Annotated[list[int] | None, typer.Argument(help="Numbers of tiles [1000 10000 100000].")] = None,
    plain_at: Annotated[int, typer.Option(help="Tiles for plain matmul and softmax.")] = 10_000,
) -> None:
    """Measure every size with fused attention, and one with plain attention too; write the table."""
    console = Console()
    fused = sizes or [1000, 10_000, 100_000]
    rows: dict[tuple[str, int], tuple[float, float]] = {}
    with TemporaryDirectory() as folder:
        for name, tiles in [("fused", n) for n in fused] + [("plain", plain_at)]:
            out = Path(folder) / f"{name}-{tiles}.pt"
            command = [sys.executable, "-m", "benchmarks.slide_encoder", "measure", str(tiles), str(out)]
            with console.status(f"{name} attention, {tiles:,} tiles"):
                done = subprocess.run(
                    command + ["--plain"] * (name == "plain"), check=True, stdout=subprocess.PIPE, text=True
                )
            seconds, peak = map(float, done.stdout.split()[:2])
            rows[name, tiles] = seconds, peak
            console.print(f"{name} {tiles:9,} tiles  {seconds:8.1f} s  {peak:6.2f} GiB")
        difference = None
        if plain_at in fused:
            ours, theirs = (torch.load(Path(folder) / f"{n}-{plain_at}.pt") for n in ("fused", "plain"))
            difference = float((ours - theirs).abs().max())
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(_page(rows, plain_at, difference))


def _page(rows: dict[tuple[str, int], tuple[float, float]], plain_at: int, difference: float | None) -> str:
    """The report in Markdown."""
    lines = [
        "# The slide encoder on a CPU",
        "",
        "`make bench-slide-encoder`: one forward of the `gigapath` slide encoder (86 million weights from",
        "a seed, 12 layers, all 13 states pooled) in float32. Each row has a process of its own, and its",
        f"peak is the whole process's. {torch.get_num_threads()} threads, {platform.machine()}, "
        f"torch {torch.__version__}.",
        "",
        "| attention | tiles | seconds | peak memory, GiB |",
        "|---|---|---|---|",
        *(f"| {name} | {tiles:,} | {s:.1f} | {peak:.2f} |" for (name, tiles), (s, peak) in rows.items()),
        "",
    ]
    if difference is not None:
        fused, plain = rows["fused", plain_at], rows["plain", plain_at]
        lines += [
            "Plain is matmul and softmax with score matrices in memory. "
            f"At {plain_at:,} tiles it takes {plain[0] / fused[0]:.1f} times the seconds",
            f"and {plain[1] / fused[1]:.1f} times the memory of fused attention; "
            f"the pooled states differ by at most {difference:.1e}.",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    app()
