"""Everything that is served, on this machine's GPU; `--tiny` tries the driver itself on the CPU.

Writes gpu.md and gpu.json. Each section runs in its own process: one that fails takes no other along, and the
page names it. Weights are random, the same for PyTorch and for the exports.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
import torch
import typer

from benchmarks.common import (
    CORES,
    MACHINE,
    PAGES,
    console,
    export_into,
    slide_of,
    table,
    write_page,
)
from benchmarks.gpu_runtimes import FOLDER
from benchmarks.gpu_sections import FULL, PRECISIONS, SECTIONS, TFLOPS, TINY, Plan, Tables, outcome
from export.engines import find_gpu
from export.errors import ExportError


@dataclass
class Found:
    """What has been measured so far: tables, seconds per step, and why a step failed."""

    tables: Tables = field(default_factory=dict)
    seconds: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(plan: Plan, names: Sequence[str], gpu_memory: int | None) -> Iterator[Found]:
    """The sections `names` one after the other; what has been found so far, after each."""
    spawn = multiprocessing.get_context("spawn")
    found = Found()
    began = time.monotonic()
    wanted = {precision for name in names for precision in SECTIONS[name][1]}
    share = (max(1, CORES // len(PRECISIONS)),)  # more threads than cores made them several times slower
    exporters = ProcessPoolExecutor(4, spawn, torch.set_num_threads, share)
    with exporters as pool, console.status("exporting"):
        made: dict[str, Future[Any]] = {
            f"export {precision}": pool.submit(
                export_into,
                FOLDER / f"{plan.preset}-{precision}",
                plan.preset,
                precision=precision,
                occlusion_precision=PRECISIONS[precision],
                gpu_memory=gpu_memory,
            )
            for precision in PRECISIONS
            if precision in wanted
        }
        if "served" in names:
            made["slide"] = pool.submit(slide_of, plan.scored)
    found.failed |= {name: reason for name, future in made.items() if (reason := outcome(future))}
    found.seconds["exports"] = round(time.monotonic() - began)
    for name in names:
        began = time.monotonic()
        section, precisions = SECTIONS[name]
        repositories = {
            precision: made[f"export {precision}"].result()
            for precision in precisions
            if f"export {precision}" not in found.failed
        }
        with ProcessPoolExecutor(1, mp_context=spawn) as pool, console.status(name):
            future = pool.submit(section, plan, repositories)
            reason = outcome(future)
        if reason:
            found.failed[name] = reason
        else:
            found.tables |= future.result()
        found.seconds[name] = round(time.monotonic() - began)
        yield found


def add_shares(tables: Tables) -> None:
    """Give each rate in TFLOP/s its share of the matrix product's, where that was measured."""
    for row in tables.get("Tile encoder", []):
        peak = tables["Matrix product"][0][TFLOPS] if "Matrix product" in tables else None
        own = row[TFLOPS]
        row["of the peak"] = own / peak if isinstance(own, float) and isinstance(peak, float) else None


def page(about: Mapping[str, str], found: Found) -> str:
    """The page in Markdown."""
    steps = ", ".join(f"{name} {seconds}" for name, seconds in found.seconds.items())
    head = f"""# On a GPU

`{about["command"]}` on {about["device"]} ({about["host"]}): `{about["preset"]}`, random weights,
torch {about["torch"]}, ONNX Runtime {about["onnxruntime"]}, TF32 off. It took {sum(found.seconds.values())} s
({steps}). The runtimes of a table were measured alternately, from host to host. All figures: gpu.json."""
    parts = [head, *(f"**{name} failed**: {reason}" for name, reason in found.failed.items())]
    for title, rows in found.tables.items():
        lines = (" | ".join(cell(value) for value in row.values()) for row in rows)
        parts.append(f"## {title}\n\n{table(' | '.join(rows[0]), lines)}")
    return "\n\n".join(parts)


def cell(value: str | int | float | None) -> str:
    """A figure as a page shows it."""
    if isinstance(value, float):
        return f"{value:.1f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value or ""


def main(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Try the driver on the CPU, with tiny shapes.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(SECTIONS)}; may be repeated [default: all].")
    ] = None,
    pages: Annotated[
        Path | None, typer.Option(help="Folder of the page.", show_default="docs/benchmarks")
    ] = None,
) -> None:
    """Measure what is served on this machine's GPU, against PyTorch."""
    plan = TINY if tiny else FULL
    unknown = [name for name in only or [] if name not in SECTIONS]
    if unknown:
        raise ExportError(f"no section {unknown[0]!r}: choose from {', '.join(SECTIONS)}")
    device = "the CPU, with tiny shapes: these figures say nothing" if tiny else find_gpu()
    gpu_memory = None if tiny else torch.cuda.get_device_properties(0).total_memory >> 30
    about = {
        "command": " ".join(
            ["make bench NAME=gpu", *([f'ARGS="{" ".join(sys.argv[1:])}"'] if sys.argv[1:] else [])]
        ),
        "device": device,
        "host": MACHINE,
        "preset": plan.preset,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    folder = pages or (FOLDER if tiny else PAGES)
    folder.mkdir(parents=True, exist_ok=True)
    for found in measure(plan, only or list(SECTIONS), gpu_memory):
        add_shares(found.tables)
        result = {"about": about, "plan": dataclasses.asdict(plan), **dataclasses.asdict(found)}
        (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    write_page(folder / "gpu.md", page(about, found), passed=not found.failed)
