"""`make bench-client`: the client beside the bare encoder, its memory, and what kills leave behind.

Writes docs/benchmarks/client.md. Times are taken in turns within one run: this machine's speed changes from
minute to minute.
"""

from __future__ import annotations

import hashlib
import os
import platform
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
from rich.console import Console

from client.batch.job import BatchJob, process_slide
from client.outputs.records import OK
from client.scoring.embedding import Throughput
from client.scoring.score import SlideSource, TilingOptions
from client.scoring.timings import bottleneck
from client.slides.slide import open_slide
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from export.repository import copy_configs, served_version
from gigapath_contract.schema import Contract
from server.local import run_triton
from training.cohort.pyramid import write_pyramid

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "build" / "bench" / "client"
REAL = ROOT / "build" / "CMU-1-Small-Region.svs"
TILE = 256

console = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: str
    wanted: str
    reached: bool


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="The table.")] = ROOT / "docs" / "benchmarks" / "client.md",
    tiles: Annotated[int, typer.Option(help="Tiles a round, end to end.")] = 640,
    rounds: Annotated[int, typer.Option(help="Rounds end to end.")] = 3,
    kills: Annotated[int, typer.Option(help="How often the batch is killed.")] = 20,
) -> None:
    """Measure the client's streaming, memory and resume, and write the table."""
    BENCH.mkdir(parents=True, exist_ok=True)
    rows = [end_to_end(tiles, rounds), *memory(), resume(kills)]
    lines = [
        "# The client, measured",
        "",
        f"`make bench-client` on {os.cpu_count()} cores ({platform.machine()}), Triton on the same machine.",
        "",
        "| what | measured | wanted |",
        "|---|---|---|",
        *(f"| {row.what} | {row.value} | {row.wanted} |" for row in rows),
        "",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines))
    console.print("\n".join(lines), markup=False)
    raise typer.Exit(0 if all(row.reached for row in rows) else 1)


def end_to_end(tiles: int, rounds: int) -> Row:
    """A slide through the whole client, over the same tiles through a bare session of the encoder."""
    repository = exported("gigapath-flash")
    slide = slide_of(tiles)
    session = ort.InferenceSession(
        repository / "tile_encoder" / str(served_version(repository)) / "model.onnx",
        providers=ort.get_available_providers(),
    )
    batch = np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), np.uint8)

    def bare() -> float:
        began = time.perf_counter()
        for _ in range(tiles // 64):
            session.run(["EMBEDDINGS"], {"TILES": batch})
        return time.perf_counter() - began

    session.run(["EMBEDDINGS"], {"TILES": batch})
    alone, whole, said = [bare()], [], ""
    with run_triton(repository, log=BENCH / "flash.log") as server:
        contract, endpoint = contract_of(server.url), Endpoint(server.url, timeout=600)
        for number in range(rounds):
            folder = fresh(f"flash-{number}")
            work = BatchJob(folder, endpoint, contract, TilingOptions(tissue=False), Throughput())
            with Connection(endpoint, in_flight=work.throughput.in_flight) as connection:
                began = time.perf_counter()
                record = process_slide(work, SlideSource(slide, "slide"), connection)
                whole.append(time.perf_counter() - began)
            assert (record.status, record.tiles) == (OK, tiles), record
            alone.append(bare())
            said = bottleneck(record.stages)
            console.print(
                f"end to end: {whole[-1]:.1f} s, bare {alone[-2]:.1f} and {alone[-1]:.1f} s; {said}"
            )
    ratios = [took / ((a + b) / 2) for took, a, b in zip(whole, alone, alone[1:], strict=False)]
    ratio = statistics.median(ratios)
    value = f"{ratio:.3f} (rounds {', '.join(f'{r:.3f}' for r in ratios)}); {said}"
    what = f"{tiles} tiles end to end, gigapath-flash: total time ÷ time of the bare encoder"
    return Row(what, value, "≤ 1.05", ratio <= 1.05)


def memory() -> list[Row]:
    """Peak memory of `client score` for a slide and for one of ten times its tiles."""
    repository = exported("demo")
    peaks, embeddings = {}, {}
    with run_triton(repository, log=BENCH / "demo.log") as server:
        dim = contract_of(server.url).tile_encoder.embed_dim
        for tiles in (2_000, 20_000):
            slide = slide_of(tiles)
            options = ["--all-tiles", "--out", str(fresh("memory")), "--url", server.url]
            began = time.perf_counter()
            peaks[tiles] = peak_of(["score", str(slide), *options])
            embeddings[tiles] = tiles * dim * 4
            took = time.perf_counter() - began
            console.print(f"memory: {tiles} tiles, peak {peaks[tiles] / 1e6:.0f} MB, {took:.0f} s")
    limit = 1.2 * peaks[2_000] + embeddings[20_000]
    what = "peak memory for 20,000 tiles (for 2,000 tiles; embeddings of 20,000)"
    value = (
        " MB, ".join(f"{size / 1e6:.0f}" for size in (peaks[20_000], peaks[2_000], embeddings[20_000]))
        + " MB"
    )
    return [
        Row(
            what, value, f"≤ {limit / 1e6:.0f} MB (1.2 × that for 2,000 + embeddings)", peaks[20_000] <= limit
        )
    ]


def peak_of(arguments: list[str]) -> int:
    """The most memory in bytes that a client command held in RAM (VmHWM; maxrss would count ours too)."""
    program = (
        "from client.cli import main\ntry:\n    main()\nfinally:\n"
        "    print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-2]) * 1024


def resume(kills: int) -> Row:
    """Outputs of a batch that was killed at random moments, beside those of an undisturbed one."""
    slides = fresh("slides")
    for number in range(6):
        shutil.copy(slide_of(128 + 16 * number), slides / f"s{number}.tif")
    rng = random.Random(0)
    with run_triton(exported("demo"), log=BENCH / "demo.log") as server:

        def command(out: Path) -> list[str]:
            options = ["--all-tiles", "--out", str(out), "--url", server.url, "--chunk", "8"]
            return [sys.executable, "-m", "client", "batch", str(slides), *options]

        whole, killed = fresh("whole"), fresh("killed")
        began = time.perf_counter()
        subprocess.run(command(whole), cwd=ROOT, check=True, capture_output=True)
        took, done, starts = time.perf_counter() - began, 0, 0
        while done < kills:
            process = subprocess.Popen(
                command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            starts += 1
            try:
                process.wait(rng.uniform(0.3, 1.0) * took)
                shutil.rmtree(killed)  # it ended before its kill: again from the beginning
                killed.mkdir()
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
        subprocess.run(command(killed), cwd=ROOT, check=True, capture_output=True)
    expected, found = digests(whole), digests(killed)
    same = sum(found.get(name) == digest for name, digest in expected.items())
    what = f"{kills} kills (-9) at random moments of a batch of 6 slides, then resumed: outputs identical"
    value = f"{same} of {len(expected)}, {len(found.keys() - expected.keys())} left over ({starts} starts)"
    return Row(what, value, "all", expected == found)


def exported(preset: str) -> Path:
    """A model repository with a preset's seeded weights, kept from one run to the next."""
    repository = BENCH / preset
    if not repository.exists() or served_version(repository) is None:
        from export.export import export_preset  # torch, which nothing else here needs

        copy_configs(ROOT / "model_repository", repository)
        with console.status(f"exporting {preset}"):
            export_preset(preset, repository=repository, slide=REAL)
    return repository


def slide_of(tiles: int) -> Path:
    """A slide of exactly so many tiles, made by repeating a piece of the real slide's tissue."""
    path = BENCH / f"{tiles}.tif"
    if not path.exists():
        columns = next(n for n in range(int(tiles**0.5), 0, -1) if tiles % n == 0)
        with open_slide(REAL) as slide:
            tissue = slide.read(0, (768, 512), (1024, 1024))
        size = (columns * TILE, tiles // columns * TILE)
        write_pyramid(path, tissue, size=size, levels=(1, 4, 16))
    return path


def contract_of(url: str) -> Contract:
    """What a server serves."""
    with Connection(Endpoint(url)) as connection:
        return read_contract(connection)


def fresh(name: str) -> Path:
    """An empty folder."""
    folder = BENCH / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every output whose bytes must not depend on how the run went."""
    apart = {"records", ".partial", ".lock", "status.csv"}
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if apart.isdisjoint(path.relative_to(out).parts)
    }


if __name__ == "__main__":
    app()
