"""The sections of `gpu`: what each measures at the sizes of a plan, as tables."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import CORES, alternate, console, median_ratio, seconds_of, slide_of
from benchmarks.gpu_runtimes import (
    EAGER,
    IN_FLIGHT,
    Embeddings,
    Repositories,
    Stream,
    Tiles,
    contract_of,
    flops_per_tile,
    half,
    masks_in_pytorch,
    prepare,
    run_slide,
    serving,
    session,
    slide,
    slide_in_pytorch,
    slide_model,
    tile_encoders,
)
from client.batch.job import BatchJob, process_slide
from client.outputs.records import OK
from client.scoring.embedding import Throughput
from client.scoring.score import SlideSource, TilingOptions
from client.scoring.timings import bottleneck
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.parity import load_reference, verify
from export.errors import ExportError
from gigapath_contract.schema import Contract
from training.models.build import build_tile_encoder

PRECISIONS = {"fp16": "fp16", "fp16-mixed": "fp32", "fp32": "fp32"}
"""The precisions that are exported, each with that of its `slide_occlusion`."""
KEPT = (0.9, 0.5)
"""Shares of the tiles that masks keep: about what leave-one-out over regions and Owen values ask for."""
TFLOPS, BUSY = "TFLOP/s", "GPU busy, %"

Row = dict[str, str | int | float | None]
Tables = dict[str, list[Row]]


@dataclass(frozen=True)
class Plan:
    """What is measured: `slides` of so many tiles, `masks` of (tiles, masks), a `scored` slide of tiles."""

    device: str
    preset: str
    matrix: int
    batches: tuple[int, ...]
    slides: tuple[int, ...]
    masks: tuple[tuple[int, int], ...]
    scored: int
    trials: int
    seconds: float


FULL = Plan(
    "cuda",
    "gigapath",
    8192,
    (64, 128),
    (1000, 10_000, 100_000),
    ((1000, 64), (2000, 64), (10_000, 16)),
    5000,
    3,
    1.5,
)
TINY = Plan("cpu", "demo", 256, (2, 4), (50, 1100), ((50, 4), (1100, 2)), 12, 2, 0.05)


def matrix_product(plan: Plan, repositories: Repositories) -> Tables:
    """The most that a half-precision matrix product reaches here."""
    size = plan.matrix
    a, b = (torch.randn(size, size, device=plan.device, dtype=half(plan.device)) for _ in range(2))

    def multiply() -> None:
        (a @ b)[0, 0].item()  # waits for the product

    peak = 2 * size**3 / min(seconds_of(multiply) for _ in range(20))
    return {"Matrix product": [{"size": size, TFLOPS: peak / 1e12}]}


def tile_encoder(plan: Plan, repositories: Repositories) -> Tables:
    """Tiles/s from host to host: PyTorch, bare ONNX Runtime sessions and Triton, alternately."""
    encoder = build_tile_encoder(plan.preset)
    flops = flops_per_tile(encoder)
    encoder.to(plan.device)
    tiles = np.random.default_rng(0).integers(0, 256, (max(plan.batches), 224, 224, 3), np.uint8)
    rates, busy, answers = {}, {}, {}
    missing: list[Row] = []
    with ExitStack() as opened, ThreadPoolExecutor(1) as apart:
        for name, make in tile_encoders(encoder, plan.device, repositories, opened).items():
            batches = plan.batches[:1] if name.startswith("torch.compile") else plan.batches
            with console.status(f"preparing {name}"):
                prepared = apart.submit(prepare, make, [tiles[:batch] for batch in batches])
            if reason := outcome(prepared):
                missing.append({"runtime": name, "reason": reason})
                continue
            stream, found = prepared.result()
            for batch, answer in zip(batches, found, strict=True):
                work = partial(rate, stream, tiles[:batch], plan.seconds)
                rates[name, batch], busy[name, batch] = watched(work, plan.device)
                answers[name, batch] = answer
        measured = alternate(rates, plan.trials)
    rows: list[Row] = []
    for (name, batch), own in measured.items():
        eager = (EAGER, batch)
        tiles_per_second = statistics.median(own)
        rows.append(
            {
                "runtime": name,
                "batch": batch,
                "tiles/s": tiles_per_second,
                "lowest": min(own),
                "highest": max(own),
                "to eager autocast": median_ratio(own, measured[eager]) if eager in measured else None,
                TFLOPS: tiles_per_second * flops / 1e12,
                "1 - cosine to eager": far(answers[name, batch], answers[eager])
                if eager in answers
                else None,
                BUSY: mean(busy[name, batch]),
            }
        )
    return {"Tile encoder": rows, **({"Tile encoder, not measured": missing} if missing else {})}


def slide_encoder(plan: Plan, repositories: Repositories) -> Tables:
    """Milliseconds for one slide: PyTorch and bare ONNX Runtime sessions, alternately."""
    model = slide_model(plan.preset, plan.device)
    sessions = {name: session(path, "slide_encoder", plan.device) for name, path in repositories.items()}
    rows: list[Row] = []
    for tiles in plan.slides:
        inputs = slide(plan.preset, tiles)
        work: dict[str, Callable[[], Embeddings]] = {
            "PyTorch, fp32": partial(slide_in_pytorch, model, inputs, plan.device, autocast=False),
            "PyTorch, autocast": partial(slide_in_pytorch, model, inputs, plan.device, autocast=True),
            **{f"ONNX Runtime, {name}": partial(run_slide, one, inputs) for name, one in sessions.items()},
        }
        for name, found in compare(plan, work).items():
            rows.append({"tiles": tiles, "runtime": name, "ms": 1e3 * found.seconds, **found.columns})
    return {"Slide encoder": rows}


def occlusion(plan: Plan, repositories: Repositories) -> Tables:
    """Masks/s over one slide: PyTorch mask by mask, and bare ONNX Runtime sessions, alternately."""
    model = slide_model(plan.preset, plan.device)
    sessions = {
        PRECISIONS[name]: session(path, "slide_occlusion", plan.device) for name, path in repositories.items()
    }
    limit = min(
        (contract_of(path).occlusion.max_mask_tokens for path in repositories.values()), default=10**9
    )
    rows: list[Row] = []
    for tiles, wanted in plan.masks:
        masks = max(1, min(wanted, limit // (tiles + 1)))
        for share in KEPT:
            inputs = slide(plan.preset, tiles)
            keep = np.random.default_rng(0).random((masks, tiles)) < share
            keep[:, 0] = True
            some = keep[:4]
            work: dict[str, Callable[[], Embeddings]] = {
                "PyTorch, fp32, mask by mask": partial(masks_in_pytorch, model, inputs, plan.device, some)
            }
            for name, one in sessions.items():
                work[f"ONNX Runtime, {name}"] = partial(run_slide, one, {**inputs, "KEEP": keep})
            for name, found in compare(plan, work).items():
                count = len(some) if name.startswith("PyTorch") else masks
                row: Row = {"tiles": tiles, "masks": masks, "kept": share, "runtime": name}
                rows.append({**row, "masks/s": count / found.seconds, **found.columns})
    return {"Occlusion": rows}


def served(plan: Plan, repositories: Repositories) -> Tables:
    """`client verify` in every precision, and `client score` of a whole slide in the first."""
    verified: list[Row] = []
    scored: list[Row] = []
    for precision, repository in repositories.items():
        with serving(repository, f"served-{precision}") as connection:
            contract = read_contract(connection)
            path = repository / "slide_pipeline" / str(contract.version) / "reference.npz"
            rows = list(verify(connection, *load_reference(path, contract), contract))
            verified.append(
                {
                    "precision": precision,
                    "occlusion": contract.occlusion.precision,
                    "rows": len(rows),
                    "passed": sum(row.passed for row in rows),
                    "worst max-abs": max(row.max_abs for row in rows),
                    "worst relative": max(row.max_relative for row in rows),
                    "worst 1 - cosine": 1 - min(row.min_cosine for row in rows),
                }
            )
            if not scored:
                scored = [score(plan, connection, contract, n) for n in sorted({max(1, CORES // 2), CORES})]
    of_slide = f"`gigapath-client score` of {plan.scored:,} tiles"
    tables = {"`gigapath-client verify`": verified, of_slide: scored}
    return {title: rows for title, rows in tables.items() if rows}


def score(plan: Plan, connection: Connection, contract: Contract, workers: int) -> Row:
    """A whole slide, from its file to the outputs."""
    path = slide_of(plan.scored)
    with tempfile.TemporaryDirectory() as out:
        throughput = Throughput(workers, in_flight=IN_FLIGHT)
        job = BatchJob(Path(out), connection.endpoint, contract, TilingOptions(tissue=False), throughput)
        record = process_slide(job, SlideSource(path, "warm"), connection)
        work, busy = watched(
            lambda: seconds_of(lambda: process_slide(job, SlideSource(path, "slide"), connection)),
            plan.device,
        )
        seconds = work()
    if (record.status, record.tiles) != (OK, plan.scored):
        raise ExportError(f"the slide was not scored: {record.status}, {record.tiles} tiles, {record.reason}")
    return {
        "precision": contract.precision,
        "reader threads": workers,
        "seconds": seconds,
        "tiles/s": plan.scored / seconds,
        "bottleneck": bottleneck(record.stages).removeprefix("bottleneck: ").partition(":")[0],
        BUSY: mean(busy),
    }


SECTIONS: dict[str, tuple[Callable[[Plan, Repositories], Tables], tuple[str, ...]]] = {
    "matrix-product": (matrix_product, ()),
    "tile-encoder": (tile_encoder, tuple(PRECISIONS)),
    "slide-encoder": (slide_encoder, ("fp32", "fp16")),
    "occlusion": (occlusion, ("fp32", "fp16")),
    "served": (served, tuple(PRECISIONS)),
}
"""What each section runs, and the precisions that it is given, as far as they could be exported."""


def rate(stream: Stream, tiles: Tiles, seconds: float) -> float:
    """Tiles/s of a stream of batches that lasts for `seconds`."""
    start = time.perf_counter()

    def batches() -> Iterator[Tiles]:
        while time.perf_counter() - start < seconds:
            yield tiles

    count = sum(len(embeddings) for embeddings in stream(batches()))
    return count / (time.perf_counter() - start)


def watched(work: Callable[[], float], device: str) -> tuple[Callable[[], float], list[int]]:
    """`work`, and NVML's utilisation in percent five times per second while it runs (empty without NVML)."""
    busy: list[int] = []
    if device != "cuda" or importlib.util.find_spec("pynvml") is None:
        return work, busy

    def run() -> float:
        done = threading.Event()

        def sample() -> None:
            while not done.wait(0.2):
                busy.append(torch.cuda.utilization())

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            return work()
        finally:
            done.set()
            sampler.join()

    return run, busy


@dataclass(frozen=True)
class Compared:
    """The median trial's seconds, and the columns that all runtimes have."""

    seconds: float
    columns: Row


def compare(plan: Plan, work: Mapping[str, Callable[[], Embeddings]]) -> dict[str, Compared]:
    """Time `work` alternately, after a first run whose results are compared with the first runtime's."""
    found = {name: run() for name, run in work.items()}
    timed = {name: watched(partial(seconds_of, run), plan.device) for name, run in work.items()}
    seconds = alternate({name: run for name, (run, _) in timed.items()}, plan.trials)
    reference = next(iter(found.values()))
    return {
        name: Compared(
            statistics.median(own),
            {
                "1 - cosine to PyTorch": far(found[name][: len(reference)], reference),
                BUSY: mean(timed[name][1]),
            },
        )
        for name, own in seconds.items()
    }


def far(x: Embeddings, y: Embeddings) -> float:
    """1 - the least cosine of two vectors' pairs."""
    a, b = (np.atleast_2d(array).astype(np.float64) for array in (x, y))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(1 - ((a * b).sum(axis=1) / norms).min())


def mean(samples: list[int]) -> float | None:
    """The mean of NVML's samples; None without any."""
    return statistics.fmean(samples) if samples else None


def outcome(future: Future[Any]) -> str | None:
    """Why a process failed, in one line; None if it did not."""
    error = future.exception()
    return None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
