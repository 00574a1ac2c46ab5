"""`make bench-export`: what an export takes and its graphs do on a CPU; writes docs/benchmarks/export.md.

Every figure comes from a process of its own, so that a peak is that row's. Weights are seeded.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import typer
from rich.console import Console

from export.repository import copy_configs

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "benchmarks" / "export.md"
WORK = ROOT / "build" / "bench" / "export"
PRESETS = ["demo", "gigapath-flash", "gigapath"]
PRECISIONS = ["fp32", "fp16"]
ROUNDS = 7

Row = Mapping[str, Any]
app = typer.Typer(add_completion=False, help=__doc__)


def peak_gib() -> float:
    """The most memory that this process has had so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@app.command()
def export(preset: str, precision: str) -> None:
    """Export; print seconds, peak, the graphs' size and the worst parity row as JSON."""
    from export.export import export_preset

    repository = WORK / f"{preset}-{precision}"
    shutil.rmtree(repository, ignore_errors=True)
    copy_configs(ROOT / "model_repository", repository)
    result = export_preset(preset, repository=repository, precision=precision)
    assert result.report is not None
    files = [path for path in repository.rglob("model.onnx*") if path.is_file()]
    typer.echo(
        json.dumps(
            {
                "seconds": result.seconds,
                "peak": peak_gib(),
                "size": sum(path.stat().st_size for path in files) / 2**30,
                "max_abs": max(row.max_abs for row in result.report.rows),
                "cosine": min(row.min_cosine for row in result.report.rows),
            }
        )
    )


@app.command()
def tile(model: Path) -> None:
    """Load a tile encoder and encode one tile; print seconds of both and the peak as JSON."""
    began = time.perf_counter()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter()
    (embedding,) = session.run(None, {"TILES": np.full((1, 224, 224, 3), 200, np.uint8)})
    assert np.isfinite(embedding).all()
    answered = time.perf_counter()
    typer.echo(json.dumps({"load": loaded - began, "run": answered - loaded, "peak": peak_gib()}))


@app.command()
def slide(model: Path, tiles: int) -> None:
    """Run a slide encoder as it is served, on that many seeded tiles; print seconds and peak as JSON."""
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # as its config.pbtxt has it
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    width = session.get_inputs()[0].shape[1]
    embeddings = np.random.default_rng(0).standard_normal((tiles, width), np.float32)
    rows, columns = np.divmod(np.arange(tiles), 1000)
    coords = np.stack([columns, rows], axis=1) * 256
    began = time.perf_counter()
    outputs = session.run(None, {"EMBEDDINGS": embeddings, "COORDS": coords})
    assert all(np.isfinite(output).all() for output in outputs)
    typer.echo(json.dumps({"seconds": time.perf_counter() - began, "peak": peak_gib()}))


@app.command()
def attention(preset: str) -> None:
    """Encode tiles with fused and with decomposed attention in turns; print tiles/s of each as JSON."""
    from export.graphs import tile_graph, write_graph
    from training.models.build import build_models

    encoder = build_models(preset).tile
    paths = {name: WORK / f"{preset}-{name}" / "model.onnx" for name in ("fused", "decomposed")}
    for name, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_graph(tile_graph(encoder), path, fused=name == "fused")
    del encoder  # the largest fills the memory twice as it is
    sessions = {
        name: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for name, path in paths.items()
    }
    tiles = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), np.uint8)
    rates: dict[str, list[float]] = {name: [] for name in sessions}
    embeddings = {}
    for _ in range(ROUNDS + 1):  # the first one warms up
        for name, session in sessions.items():
            began = time.perf_counter()
            (embeddings[name],) = session.run(None, {"TILES": tiles})
            rates[name].append(len(tiles) / (time.perf_counter() - began))
    typer.echo(
        json.dumps(
            {name: statistics.median(each[1:]) for name, each in rates.items()}
            | {"difference": float(np.abs(embeddings["fused"] - embeddings["decomposed"]).max())}
        )
    )


@app.command()
def report(
    presets: Annotated[list[str] | None, typer.Argument(help="Presets [all three].")] = None,
    tiles: Annotated[int, typer.Option(help="Tiles of the large slide.")] = 100_000,
) -> None:
    """Measure everything and write the page."""
    presets = presets or PRESETS
    console = Console()

    def measure(*arguments: object) -> Row:
        command = [sys.executable, "-m", "benchmarks.export", *map(str, arguments)]
        with console.status(" ".join(command[3:])):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        row: Row = json.loads(done.stdout.splitlines()[-1])
        console.print(*command[3:], row, markup=False, highlight=False)
        return row

    exports, answers = {}, {}
    for preset in presets:
        for precision in PRECISIONS:
            exports[preset, precision] = measure("export", preset, precision)
            graph = WORK / f"{preset}-{precision}" / "tile_encoder" / "1" / "model.onnx"
            answers[preset, precision] = measure("tile", graph)
    largest = presets[-1]
    graph = WORK / f"{largest}-fp32" / "slide_encoder" / "1" / "model.onnx"
    slides = {count: measure("slide", graph, count) for count in (1000, 10_000, tiles)}
    attentions = {preset: measure("attention", preset) for preset in presets}
    REPORT.write_text(_page(exports, answers, largest, slides, attentions))
    shutil.rmtree(WORK)


def _page(
    exports: Mapping[tuple[str, str], Row],
    answers: Mapping[tuple[str, str], Row],
    largest: str,
    slides: Mapping[int, Row],
    attentions: Mapping[str, Row],
) -> str:
    """The report in Markdown."""
    lines = [
        "# Export on a CPU",
        "",
        f"`make bench-export`: seeded weights, {os.cpu_count()} cores, {platform.machine()}, ONNX Runtime "
        f"{onnxruntime.__version__}. Each figure is from a process of its own;",
        "peaks are whole processes', in GiB.",
        "",
        "| preset | precision | export, s | peak | graphs, GiB | worst max-abs | worst cosine "
        "| load tile encoder, s | one tile, s | peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (preset, precision), row in exports.items():
        answer = answers[preset, precision]
        lines.append(
            f"| {preset} | {precision} | {row['seconds']:.0f} | {row['peak']:.1f} | {row['size']:.2f} "
            f"| {row['max_abs']:.1e} | {row['cosine']:.7f} | {answer['load']:.1f} | {answer['run']:.2f} "
            f"| {answer['peak']:.1f} |"
        )
    lines += [
        "",
        "The worst parity row is over all outputs of the three graphs, against PyTorch in float32.",
        "",
        f"## The slide encoder of `{largest}` in ONNX Runtime, fp32, all outputs",
        "",
        "| tiles | seconds | peak |",
        "|---|---|---|",
        *(f"| {count:,} | {row['seconds']:.1f} | {row['peak']:.2f} |" for count, row in slides.items()),
        "",
        "## The tile encoder's attention, fused and decomposed",
        "",
        f"Tiles/s in batches of 8, in turns, median of {ROUNDS} rounds.",
        "",
        "| preset | fused | decomposed | ratio | embeddings differ by |",
        "|---|---|---|---|---|",
    ]
    for preset, row in attentions.items():
        lines.append(
            f"| {preset} | {row['fused']:.2f} | {row['decomposed']:.2f} "
            f"| {row['fused'] / row['decomposed']:.2f} | {row['difference']:.1e} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    app()
