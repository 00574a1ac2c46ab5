"""What the drivers share: folders, exported models, slides, fair trials, processes, pages."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import psutil
import typer
from rich.console import Console
from rich.progress import track

from client.benchmark.report import cpu_name
from client.errors import ClientError
from client.slides.slide import open_slide
from export.errors import ExportError
from gigapath_contract.command_line import call, run
from gigapath_contract.files import file_sha256
from server.errors import ServerError
from training.errors import TrainingError

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "bench"
PAGES = ROOT / "docs" / "benchmarks"
REAL_SLIDE = ROOT / "build" / "CMU-1-Small-Region.svs"
CORES = len(os.sched_getaffinity(0))
MACHINE = f"{cpu_name()}, {CORES} cores"

Pages = Annotated[Path, typer.Option(help="Folder of the page.")]
Trials = Annotated[int, typer.Option(min=1, help="Trials; the median counts.")]
P = ParamSpec("P")
T = TypeVar("T")
K = TypeVar("K")

console = Console(highlight=False, soft_wrap=True)


def run_driver(main: Callable[..., None], name: str | None = None) -> None:
    """Run a driver's command line, called `name`; a mistake is one line, and exit code 1."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run(lambda: call(app, name), ClientError, ExportError, ServerError, TrainingError)


def write_page(path: Path, text: str, *, passed: bool = True) -> None:
    """Write a page of results and show it.

    Raises:
        typer.Exit: with code 1 unless `passed`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.rstrip("\n") + "\n")
    console.print(path.read_text(), markup=False)
    if not passed:
        raise typer.Exit(1)


def table(header: str, rows: Iterable[str]) -> str:
    """A Markdown table; cells are separated by ` | `."""
    rule = "|" + "---|" * (header.count("|") + 1)
    return "\n".join([f"| {header} |", rule, *(f"| {row} |" for row in rows)])


def fresh_folder(path: Path) -> Path:
    """An empty folder at `path`, whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def exported(preset: str) -> Path:
    """A model repository with a preset's own weights in float32; nothing is done where it is up to date."""
    with console.status(f"exporting {preset}"):
        return in_own_process(export_into, WORK / "repositories" / preset, preset)


def export_into(repository: Path, preset: str, **options: Any) -> Path:
    """`export_preset` with `options` into `repository`, which may not exist yet."""
    from export.export import export_preset
    from export.repository import copy_configs

    copy_configs(ROOT / "model_repository", repository)
    export_preset(preset, repository=repository, slide=REAL_SLIDE, **options)
    return repository


def slide_of(tiles: int, tile_px: int = 256) -> Path:
    """A slide of exactly `tiles` tiles, made by repeating a piece of the real slide's tissue."""
    from tests.support.pyramid import write_pyramid

    path = WORK / "slides" / f"{tiles}.tif"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = next(n for n in range(int(tiles**0.5), 0, -1) if tiles % n == 0)
        with open_slide(REAL_SLIDE) as slide:
            tissue = slide.read(0, (768, 512), (1024, 1024))
        part = path.with_suffix(".part")
        size = (columns * tile_px, tiles // columns * tile_px)
        write_pyramid(part, tissue, size=size, levels=(1, 4, 16))
        part.replace(path)
    return path


def in_own_process(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work(...)` in a fresh process: its peak of memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args, **kwargs).result()


def peak_bytes(pid: int | None = None) -> int:
    """The most resident memory of a process so far (Linux); `getrusage` would include its parent's."""
    status = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def resident_mib(pid: int) -> float:
    """Resident memory of a process and its children in MiB, such as tritonserver and its backends."""
    parent = psutil.Process(pid)
    return float(sum(process.memory_info().rss for process in (parent, *parent.children())) / 2**20)


def digests(out: Path, apart: Set[str]) -> dict[str, str]:
    """SHA-256 of every file below `out` but those called, or in a folder called, as one of `apart`."""
    files = {path.relative_to(out): path for path in sorted(out.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): file_sha256(path) for name, path in files.items() if apart.isdisjoint(name.parts)
    }


def seconds_of(work: Callable[[], Any]) -> float:
    """How long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(work: Mapping[K, Callable[[], float]], trials: int) -> dict[K, list[float]]:
    """What each of `work` measures, once per trial, in opposite order in every other trial.

    A machine's speed changes from minute to minute: compare within a trial (`median_ratio`).
    """
    measured: dict[K, list[float]] = {name: [] for name in work}
    for trial in track(range(trials), "measuring", console=console, disable=not console.is_terminal):
        for name in list(work)[:: -1 if trial % 2 else 1]:
            measured[name].append(work[name]())
    return measured


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """The median over trials of a value over the base of the same trial."""
    return statistics.median(value / one for value, one in zip(values, base, strict=True))
