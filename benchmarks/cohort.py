"""A batch of 200 small slides against the tile encoder alone: how long does the encoder wait for the client?

The encoder alone gets as many tiles, in full requests from memory, through the same server; both run
alternately. Exits 1 where the batch takes over 1.1 times as long as the encoder computes during it.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from benchmarks.common import (
    MACHINE,
    PAGES,
    REAL_SLIDE,
    ROOT,
    WORK,
    Pages,
    Trials,
    alternate,
    exported,
    fresh_folder,
    median_ratio,
    seconds_of,
    table,
    write_page,
)
from client.arrays import Pixels
from client.errors import ClientError
from client.outputs.records import SlideRecord, read_records
from client.reading.stream import read_tiles
from client.scoring.timings import STAGES, total
from client.slides.slide import open_slide
from client.slides.tiling import plan_tiles
from client.triton.connection import Connection
from client.triton.endpoint import Endpoint
from client.triton.statistics import ModelStatistics, read_statistics, wait_for_statistics
from server.local import RunningServer, run_triton
from tests.support.pyramid import write_pyramid

FOLDER = WORK / "cohort"
OUT = FOLDER / "out"
ALONE, BATCH = "encoder alone", "batch"
WANTED = 1.1
GLASS, MARGIN = (246, 243, 243), 384
"""The colour of the real slide's glass, and how many px of it lie around each piece of tissue."""


@dataclass(frozen=True)
class Run:
    """Seconds, processor seconds of client and server, and what the tile encoder did meanwhile."""

    seconds: float
    client_s: float
    server_s: float
    encoder: ModelStatistics


def main(
    slides: Annotated[int, typer.Option(min=1, help="Slides of the batch.")] = 200,
    trials: Trials = 3,
    pages: Pages = PAGES,
) -> None:
    """Time a batch of small slides, and the tile encoder alone."""
    folder = make_slides(FOLDER / f"{slides}", slides)
    with (
        run_triton(exported("demo"), log=FOLDER / "server.log") as server,
        Connection(Endpoint(server.url)) as connection,
    ):
        batch(server, folder)  # once for the page cache
        tiles, pixels = sum(record.tiles for record in read_records(OUT)), full_requests(folder)
        works: dict[str, Callable[[], None]] = {
            ALONE: lambda: encode(connection, pixels, tiles),
            BATCH: partial(batch, server, folder),
        }
        runs: dict[str, list[Run]] = {name: [] for name in works}

        def timed(name: str) -> float:
            fresh_folder(OUT)
            runs[name].append(measure(server, connection, works[name]))
            return runs[name][-1].seconds

        alternate({name: partial(timed, name) for name in works}, trials)
        restarted = seconds_of(partial(batch, server, folder))
        page, passed = report(read_records(OUT), runs, restarted)
    write_page(pages / "cohort.md", page, passed=passed)


def make_slides(folder: Path, count: int) -> Path:
    """Slides of one or two pieces of the real slide's tissue on glass, 7 to 70 tiles each; made once."""
    if not folder.exists():
        part, rng = fresh_folder(folder.with_suffix(".part")), np.random.default_rng(0)
        with open_slide(REAL_SLIDE) as slide:
            tissue = slide.read(0, (900, 0), (900, 2900))
        for number in range(count):
            pieces = []
            for _ in range(rng.integers(1, 3)):
                height, width = int(rng.integers(600, 2800)), int(rng.integers(350, 800))
                top, left = rng.integers(0, (2900 - height, 900 - width))
                piece = tissue[top : top + height, left : left + width]
                pieces.append(on_glass(piece, (2800 + 2 * MARGIN, width + 2 * MARGIN)))
            write_pyramid(part / f"biopsy-{number:03}.tif", np.hstack(pieces), levels=(1, 4, 16))
        part.replace(folder)
    return folder


def on_glass(piece: Pixels, shape: tuple[int, int]) -> Pixels:
    """A picture of `shape` (h, w) of glass with a piece in its middle."""
    glass = np.full((*shape, 3), GLASS, np.uint8)
    top, left = ((whole - part) // 2 for whole, part in zip(shape, piece.shape, strict=False))
    glass[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
    return glass


def batch(server: RunningServer, slides: Path) -> None:
    """Score the slides with the command line."""
    command = [sys.executable, "-m", "client", "batch", str(slides), "--out", str(OUT), "--url", server.url]
    done = subprocess.run(command, cwd=ROOT, env=compiled(), capture_output=True, text=True)
    if done.returncode:
        raise ClientError(f"the batch failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")


def compiled() -> dict[str, str]:
    """An environment in which Python keeps bytecode, as pip does where it installs the client."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(FOLDER / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def full_requests(folder: Path) -> list[Pixels]:
    """Some full requests of the slides' tiles."""
    some = []
    for path in sorted(folder.iterdir())[:16]:
        with open_slide(path) as slide:
            some += [batch.pixels for batch in read_tiles(plan_tiles(slide, None))]
    tiles = np.concatenate(some)
    return [tiles[start : start + 64] for start in range(0, len(tiles) - 63, 64)][:16]


def encode(connection: Connection, pixels: list[Pixels], tiles: int) -> None:
    """Send `tiles` tiles in full requests, of which the connection keeps some in flight."""

    def requests() -> Iterator[dict[str, Pixels]]:
        for start, batch in zip(range(0, tiles, 64), itertools.cycle(pixels)):
            yield {"TILES": batch[: tiles - start]}

    for _ in connection.infer_stream("tile_encoder", requests(), ["EMBEDDINGS"]):
        pass


def measure(server: RunningServer, connection: Connection, work: Callable[[], object]) -> Run:
    """Do `work`, and find what it took."""
    process = psutil.Process(server.pid)
    before, own, began = read_statistics(connection, "tile_encoder"), sum(os.times()[:4]), time.perf_counter()
    served = processor_seconds(process)
    work()
    seconds = time.perf_counter() - began
    after = wait_for_statistics(connection, ["tile_encoder"], {"tile_encoder": before}, 1)["tile_encoder"]
    return Run(seconds, sum(os.times()[:4]) - own, processor_seconds(process) - served, after - before)


def processor_seconds(process: psutil.Process) -> float:
    """Processor time of a server and its models' processes so far."""
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children()))


def report(records: list[SlideRecord], runs: dict[str, list[Run]], restarted: float) -> tuple[str, bool]:
    """The page, and whether the batch is as fast as wanted."""
    batch, alone = runs[BATCH], runs[ALONE]
    encoder = [run.encoder.execution_s for run in batch]
    ratio = median_ratio([run.seconds for run in batch], encoder)
    alone_ratio = median_ratio([run.seconds for run in batch], [run.seconds for run in alone])
    between = 1 / median_ratio([run.seconds - restarted for run in batch], encoder)
    rows = [
        f"{name} | "
        + " | ".join(
            f"{statistics.median(value(run) for run in of):.{digits}f}" for value, digits in _COLUMNS.values()
        )
        for name, of in runs.items()
    ]
    stages = total([record.stages for record in records])
    spent = [
        f"{STAGES[name]} | {1000 * stage['seconds'] / len(records):.1f}" for name, stage in stages.items()
    ]
    counts, verdict = [record.tiles for record in records], "met" if ratio <= WANTED else "not met"
    page = f"""# Small slides

`make bench NAME=cohort` on {MACHINE}, Triton with the demo preset on the same machine,
{len(batch)} trials, alternately; medians. The batch is `gigapath-client batch` on {len(counts)} biopsies of
{min(counts)} to {max(counts)} tiles, {sum(counts)} in all. The encoder alone gets as many
tiles in full requests from memory, four in flight.

{table(" | ".join(["", *_COLUMNS]), rows)}

The batch takes {ratio:.2f} times as long as the encoder computes during it (wanted: at most {WANTED}:
{verdict}), and {alone_ratio:.2f} times as long as the encoder alone. Start and tables take {restarted:.1f} s,
as long as a batch that finds every slide done; of the time between, the encoder computes during
{between:.0%}. Client and server share the cores here: what the client decodes slows the encoder. The
client's modules were compiled before, as pip leaves them.

## Where a slide's time goes

Milliseconds per slide, by its record; several slides are in progress at a time.

{table("stage | ms", spent)}
"""
    return page, ratio <= WANTED


_COLUMNS: dict[str, tuple[Callable[[Run], float], int]] = {
    "seconds": (lambda run: run.seconds, 1),
    "processor seconds, client": (lambda run: run.client_s, 1),
    "server": (lambda run: run.server_s, 1),
    "encoder computes, s": (lambda run: run.encoder.execution_s, 1),
    "requests": (lambda run: run.encoder.requests, 0),
    "tiles per request": (lambda run: run.encoder.rows / run.encoder.requests, 1),
    "tiles per execution": (lambda run: run.encoder.rows / run.encoder.executions, 1),
}
