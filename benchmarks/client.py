"""The client end to end against the bare encoder, its memory, and its outputs after being killed."""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
import typer

from benchmarks.common import (
    MACHINE,
    PAGES,
    ROOT,
    WORK,
    Pages,
    Trials,
    console,
    digests,
    exported,
    fresh_folder,
    seconds_of,
    slide_of,
    table,
    write_page,
)
from client.batch.job import BatchJob, process_slide
from client.outputs.records import OK
from client.scoring.embedding import Throughput
from client.scoring.score import SlideSource, TilingOptions
from client.scoring.timings import bottleneck
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from export.repository import served_version
from gigapath_contract.schema import Contract
from server.local import run_triton

FOLDER = WORK / "client"
CHANGING = {".keys", "records", ".partial", ".lock", "status.csv"}
"""Outputs whose bytes may depend on how a run went."""


@dataclass(frozen=True)
class Requirement:
    """One line of the table."""

    what: str
    value: str
    wanted: str
    met: bool


def main(
    tiles: Annotated[int, typer.Option(min=1, help="Tiles per trial, end to end.")] = 640,
    trials: Trials = 3,
    kills: Annotated[int, typer.Option(min=1, help="How often the batch is killed.")] = 20,
    pages: Pages = PAGES,
) -> None:
    """Measure the client's streaming, memory and resuming."""
    found = [end_to_end(tiles, trials), memory(), resume(kills)]
    page = f"""# The client

`make bench NAME=client` on {MACHINE}, Triton on the same machine.

{table("what | measured | wanted", (f"{each.what} | {each.value} | {each.wanted}" for each in found))}
"""
    write_page(pages / "client.md", page, passed=all(each.met for each in found))


def end_to_end(tiles: int, trials: int) -> Requirement:
    """A slide through the whole client, over the same tiles through a bare session of the encoder."""
    repository, slide = exported("gigapath-flash"), slide_of(tiles)
    session = ort.InferenceSession(
        repository / "tile_encoder" / str(served_version(repository)) / "model.onnx",
        providers=ort.get_available_providers(),
    )
    batch = np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), np.uint8)

    def run_bare() -> None:
        for _ in range(tiles // 64):
            session.run(["EMBEDDINGS"], {"TILES": batch})

    session.run(["EMBEDDINGS"], {"TILES": batch})
    bare, whole, reported = [seconds_of(run_bare)], [], ""
    with run_triton(repository, log=FOLDER / "flash.log") as server:
        contract, endpoint = contract_of(server.url), Endpoint(server.url, timeout=600)
        for trial in range(trials):
            folder = fresh_folder(FOLDER / f"flash-{trial}")
            job = BatchJob(folder, endpoint, contract, TilingOptions(tissue=False), Throughput())
            with Connection(endpoint, in_flight=job.throughput.in_flight) as connection:
                start = time.perf_counter()
                record = process_slide(job, SlideSource(slide, "slide"), connection)
                whole.append(time.perf_counter() - start)
            assert (record.status, record.tiles) == (OK, tiles), record
            bare.append(seconds_of(run_bare))
            reported = bottleneck(record.stages)
            console.print(
                f"end to end: {whole[-1]:.1f} s, bare {bare[-2]:.1f} and {bare[-1]:.1f} s; {reported}"
            )
    ratios = [took / ((a + b) / 2) for took, a, b in zip(whole, bare, bare[1:], strict=False)]
    ratio = statistics.median(ratios)
    value = f"{ratio:.3f} (trials {', '.join(f'{r:.3f}' for r in ratios)}); {reported}"
    what = f"{tiles} tiles end to end, gigapath-flash: total time ÷ time of the bare encoder"
    return Requirement(what, value, "≤ 1.05", ratio <= 1.05)


def memory() -> Requirement:
    """Peak memory of `client score` for a slide and for one of ten times its tiles."""
    peaks, embeddings = {}, {}
    with run_triton(exported("demo"), log=FOLDER / "demo.log") as server:
        dim = contract_of(server.url).tile_encoder.embed_dim
        for tiles in (2_000, 20_000):
            out = fresh_folder(FOLDER / "memory")
            options = ["--all-tiles", "--out", str(out), "--url", server.url]
            peaks[tiles] = peak_of(["score", str(slide_of(tiles)), *options])
            embeddings[tiles] = tiles * dim * 4
            console.print(f"memory: {tiles} tiles, peak {peaks[tiles] / 1e6:.0f} MB")
    limit = 1.2 * peaks[2_000] + embeddings[20_000]
    sizes = (peaks[20_000], peaks[2_000], embeddings[20_000])
    return Requirement(
        "peak memory for 20,000 tiles (for 2,000 tiles; embeddings of 20,000)",
        ", ".join(f"{size / 1e6:.0f} MB" for size in sizes),
        f"≤ {limit / 1e6:.0f} MB (1.2 × that for 2,000 + embeddings)",
        peaks[20_000] <= limit,
    )


def peak_of(arguments: list[str]) -> int:
    """The most resident memory in bytes of a client command."""
    program = (
        "from client.cli import main\ntry:\n    main()\nfinally:\n"
        "    print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-2]) * 1024


def resume(kills: int) -> Requirement:
    """Outputs of a batch that was killed at random moments, against those of an undisturbed one."""
    slides = fresh_folder(FOLDER / "slides")
    for number in range(6):
        shutil.copy(slide_of(128 + 16 * number), slides / f"s{number}.tif")
    rng = random.Random(0)
    with run_triton(exported("demo"), log=FOLDER / "demo.log") as server:

        def command(out: Path) -> list[str]:
            options = ["--all-tiles", "--out", str(out), "--url", server.url, "--chunk", "8"]
            return [sys.executable, "-m", "client", "batch", str(slides), *options]

        def run(out: Path) -> None:
            subprocess.run(command(out), cwd=ROOT, check=True, capture_output=True)

        whole, killed = fresh_folder(FOLDER / "whole"), fresh_folder(FOLDER / "killed")
        took, done, starts = seconds_of(lambda: run(whole)), 0, 0
        while done < kills:
            process = subprocess.Popen(
                command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            starts += 1
            try:
                process.wait(rng.uniform(0.3, 1.0) * took)
                fresh_folder(killed)  # it ended before it was killed: start from the beginning
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
        run(killed)
    expected, found = digests(whole, CHANGING), digests(killed, CHANGING)
    same = sum(found.get(name) == digest for name, digest in expected.items())
    what = f"{kills} kills (-9) at random moments of a batch of 6 slides, then resumed: outputs identical"
    value = f"{same} of {len(expected)}, {len(found.keys() - expected.keys())} left over ({starts} starts)"
    return Requirement(what, value, "all", expected == found)


def contract_of(url: str) -> Contract:
    """What a server serves."""
    with Connection(Endpoint(url)) as connection:
        return read_contract(connection)
