"""How fast tiles are read: against a loop over OpenSlide, and against decoding the stored tiles alone."""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import openslide
import simplejpeg
import typer
from rich.console import Console
from rich.progress import track

from client.arrays import Pixels
from client.reading.jpeg_reader import stored_tiles
from client.reading.openslide_reader import OpenSlideReader
from client.reading.stream import read_tiles, resize
from client.reading.tile_reader import open_reader
from client.slides.slide import open_slide
from client.slides.tiling import TilePlan, plan_tiles
from training.cohort.pyramid import write_pyramid

REAL = Path("build/CMU-1-Small-Region.svs")
FOLDER = Path("build/bench")
SIZE = (40_000, 36_000)  # 22,137 tiles
STEP = 16  # tiles a thread takes at once, in every method
SAMPLE, SLOW_SAMPLE = 2400, 480  # tiles a round

T = TypeVar("T")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclasses.dataclass(frozen=True)
class Case:
    """One slide and the tiles asked of it."""

    name: str
    path: Path
    mpp: float | None = None  # level 0's, in place of the file's own

    def plan(self, count: int) -> TilePlan:
        """The first `count` tiles, tissue or not."""
        with open_slide(self.path, self.mpp) as slide:
            plan = plan_tiles(slide, None)
        return dataclasses.replace(plan, coords=plan.coords[:count])


def cases() -> list[Case]:
    """The real slide and two large ones made of it, written where they are not there yet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open_slide(REAL) as slide:
        picture = slide.read(0, (0, 0), slide.dimensions)
    large = {}
    for tile in (256, 240):
        large[tile] = FOLDER / f"large-{tile}.tif"
        if not large[tile].exists():
            whole = picture[: picture.shape[0] // tile * tile, : picture.shape[1] // tile * tile]
            part = large[tile].with_suffix(".part")
            write_pyramid(part, whole, size=SIZE, tile=tile, levels=(1, 4, 16), bigtiff=True)
            part.replace(large[tile])
    return [
        Case("real slide, 240-px storage", REAL),
        Case("large, 256-px storage", large[256]),
        Case("large, 240-px storage", large[240]),
        Case("large, 256-px storage, 0.25 mpp", large[256], 0.25),
    ]


Method = Callable[[Case, int], tuple[int, float]]
"""Reads some tiles of a case by so many threads; how many, and in how many seconds."""


def loop(case: Case, threads: int) -> tuple[int, float]:
    """`read_region` of every whole tile, RGB, crop: what one writes first."""
    plan = case.plan(SLOW_SAMPLE)
    size = plan.tile_size
    margin = (plan.tile_px - plan.crop_px) // 2
    kept = slice(margin, margin + plan.crop_px)

    def read(slide: openslide.OpenSlide, x: int, y: int) -> Pixels:
        pixels = np.asarray(slide.read_region((x, y), plan.level, size).convert("RGB"))
        return resize(pixels, (plan.tile_px, plan.tile_px))[kept, kept]

    return _openslide(plan, threads, read)


def middle_loop(case: Case, threads: int) -> tuple[int, float]:
    """`read_region` of the tiles' middles alone: the pixels that the client delivers."""
    plan = case.plan(SLOW_SAMPLE)
    dx, dy = (round(side * plan.downsample) for side in plan.read_offset)

    def read(slide: openslide.OpenSlide, x: int, y: int) -> Pixels:
        pixels = np.asarray(slide.read_region((x + dx, y + dy), plan.level, plan.read_size).convert("RGB"))
        return resize(pixels, (plan.crop_px, plan.crop_px))

    return _openslide(plan, threads, read)


def _openslide(
    plan: TilePlan, threads: int, read: Callable[[openslide.OpenSlide, int, int], Pixels]
) -> tuple[int, float]:
    with openslide.OpenSlide(plan.path) as slide:  # OpenSlide's handles may be shared by threads

        def some(corners: list[list[int]]) -> None:
            for x, y in corners:
                read(slide, x, y)

        return len(plan), _timed(some, plan.coords.tolist(), threads)


def client(case: Case, threads: int) -> tuple[int, float]:
    """`read_tiles`, less opening: that is reported apart."""
    plan = case.plan(SAMPLE)
    began = time.perf_counter()
    with closing(open_reader(plan)) as reader:
        opening = time.perf_counter() - began
        assert reader.name == "jpeg tiles", reader.reason
    began = time.perf_counter()
    count = sum(int(batch.valid.sum()) for batch in read_tiles(plan, workers=threads))
    assert count == len(plan)
    return count, time.perf_counter() - began - opening


def client_openslide(case: Case, threads: int) -> tuple[int, float]:
    """The client's reader for all other formats."""
    plan = case.plan(SLOW_SAMPLE)
    with closing(OpenSlideReader(plan)) as reader:

        def some(indices: list[int]) -> None:
            region = np.empty((*plan.read_size[::-1], 3), np.uint8)
            for index in indices:
                assert reader.read(index, region)
                resize(region, (plan.crop_px, plan.crop_px))

        return len(plan), _timed(some, list(range(len(plan))), threads)


def decode(case: Case, threads: int) -> tuple[int, float]:
    """Decode each stored tile under the plan once and throw it away: the limit."""
    plan = case.plan(SAMPLE)
    with open_slide(case.path, case.mpp) as slide:
        stored = stored_tiles(case.path, slide.vendor, slide.level_dimensions[plan.level])
    first = plan.level_positions() // np.array(stored.tile)
    last = (np.minimum(plan.level_positions() + plan.read_size, stored.size) - 1) // np.array(stored.tile)
    keys = {
        y * stored.columns + x
        for (x0, y0), (x1, y1) in zip(first.tolist(), last.tolist(), strict=True)
        for x in range(x0, x1 + 1)
        for y in range(y0, y1 + 1)
    }
    with case.path.open("rb") as file:
        streams = []
        for key in sorted(keys):
            file.seek(stored.offsets[key])
            streams.append(stored.prefix + file.read(stored.counts[key])[2:])

    def some(few: list[bytes]) -> None:
        for stream in few:
            simplejpeg.decode_jpeg(stream)

    return len(plan), _timed(some, streams, threads)


def _timed(work: Callable[[list[T]], None], items: list[T], threads: int) -> float:
    """Seconds that a pool takes for `items`, STEP at a time."""
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [items[low : low + STEP] for low in range(0, len(items), STEP)]))
    return time.perf_counter() - began


METHODS: dict[str, Method] = {
    "OpenSlide, `read_region` a tile": loop,
    "OpenSlide, only the middle read": middle_loop,
    "client, through OpenSlide": client_openslide,
    "**client, stored JPEG tiles**": client,
    "decoding the stored tiles alone": decode,
}
LOOP, MIDDLE, _, CLIENT, LIMIT = METHODS


@app.command()
def run(
    rounds: Annotated[int, typer.Option(help="Rounds; every round runs every method once, by turns.")] = 5,
    out: Annotated[Path, typer.Option(help="Where the tables go.")] = Path("docs/benchmarks/reading.md"),
) -> None:
    """Measure tile reading and write the tables, for example: python -m benchmarks.reading --rounds 3"""
    measured = cases()
    keys = [(case, threads, method) for case in measured for threads in (1, 2) for method in METHODS]
    rates: dict[tuple[Case, int, str], list[float]] = {key: [] for key in keys}
    for turn in track(range(rounds), "reading"):
        for case, threads, method in keys if turn % 2 else keys[::-1]:
            count, seconds = METHODS[method](case, threads)
            rates[case, threads, method].append(count / seconds)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(_report(measured, rates, rounds)) + "\n")
    Console().print(f"written: {out}")


def _report(
    measured: list[Case], rates: dict[tuple[Case, int, str], list[float]], rounds: int
) -> Iterator[str]:
    yield "# Reading tiles"
    yield ""
    yield (
        f"`make bench-reading`: {platform.machine()}, {_cores()} cores, {rounds} rounds, methods by turns. "
        "Tiles a second (median), and in brackets the median of the rounds' ratios to the first line. "
        "256-px tiles of 0.5 mpp, the middle 224 px delivered; files in the page cache; opening is apart."
    )
    for case in measured:
        yield ""
        yield f"## {case.name}: {len(case.plan(SAMPLE))} tiles"
        yield ""
        yield "| | 1 thread | 2 threads |"
        yield "|---|---|---|"
        for method in METHODS:
            cells = []
            for threads in (1, 2):
                own, base = rates[case, threads, method], rates[case, threads, LOOP]
                cells.append(f"{statistics.median(own):,.0f} ({_ratio(own, base):.1f})")
            yield f"| {method} | {' | '.join(cells)} |"
        for other, said in (
            (MIDDLE, "the client to OpenSlide's middles"),
            (LIMIT, "the client to the limit"),
        ):
            cells = [f"{_ratio(rates[case, n, CLIENT], rates[case, n, other]):.2f}" for n in (1, 2)]
            yield f"| *{said}* | {' | '.join(cells)} |"
        yield ""
        yield f"Opening, with the proof against OpenSlide: {_opening(case) * 1e3:.0f} ms."
    yield ""
    yield "## Memory"
    yield ""
    yield "Peak resident memory, MiB, of a process that plans a slide and reads its first tiles by 2 threads."
    yield ""
    yield "| | 2,000 tiles | 20,000 tiles | ratio |"
    yield "|---|---|---|---|"
    for case in measured[1:3]:
        few, many = _peak(case, 2_000), _peak(case, 20_000)
        yield f"| {case.name} | {few:.0f} | {many:.0f} | {many / few:.2f} |"


def _ratio(own: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, base, strict=True))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _opening(case: Case) -> float:
    plan = case.plan(SAMPLE)
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        open_reader(plan).close()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _peak(case: Case, count: int) -> float:
    """MiB; in a process of its own, for a peak never falls."""
    code = "import sys; from benchmarks.reading import peak; peak(sys.argv[1], int(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(case.path), str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(path: str, count: int) -> None:
    """Read tiles and print the peak of resident memory, MiB."""
    for _ in read_tiles(Case("", Path(path)).plan(count)):
        pass
    typer.echo(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    app()
