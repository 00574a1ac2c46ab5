"""`make bench-serving`: a slide's stages and every load beside bare sessions; what each setting does.

Writes serving.md, .csv and .png, and tuning.md, to docs/benchmarks or where `--pages` says. Every comparison
is measured in turns within one run (client/benchmark), for this machine's speed changes from minute to
minute.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from benchmarks.client import fresh, slide_of
from client.batch.job import BatchJob, process_slide
from client.benchmark import report
from client.benchmark.baseline import local_sessions
from client.benchmark.measure import Result, sweep
from client.benchmark.workloads import WORKLOADS, Workload
from client.outputs.records import OK
from client.reading.stream import read_tiles
from client.scoring.embedding import Throughput
from client.scoring.score import SlideSource, TilingOptions
from client.slides.slide import open_slide
from client.slides.tiling import plan_tiles
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from gigapath_contract.schema import Contract
from server.local import run_triton

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "benchmarks"
MACHINE = f"{report.cpu_name()}, {os.cpu_count()} cores"
SLIDE_TILES = 1280
THROUGHPUT = Throughput()
Edit = Callable[[str, Any], None]


def bounded_queue(model: str, config: Any) -> None:
    """Refuse what finds 64 requests waiting."""
    config.dynamic_batching.default_queue_policy.max_queue_size = 64


def delay(milliseconds: int) -> Edit:
    """How long the batcher waits for more tiles."""

    def edit(model: str, config: Any) -> None:
        if model == "tile_encoder":
            config.dynamic_batching.max_queue_delay_microseconds = milliseconds * 1000

    return edit


def batches_of(tiles: int) -> Edit:
    """How many tiles the batcher joins before it stops waiting."""

    def edit(model: str, config: Any) -> None:
        if model == "tile_encoder":
            config.dynamic_batching.preferred_batch_size[:] = [tiles]

    return edit


def two_instances(model: str, config: Any) -> None:
    """Two sessions of the tile encoder."""
    if model == "tile_encoder":
        config.instance_group[0].count = 2


def one_thread(model: str, config: Any) -> None:
    """Sessions of the tile encoder that compute on one thread."""
    if model == "tile_encoder":
        config.parameters["intra_op_thread_count"].string_value = "1"


def two_instances_of_one_thread(model: str, config: Any) -> None:
    """As many threads as before, in two sessions."""
    two_instances(model, config)
    one_thread(model, config)


# What is changed, how, and the load (kind, size, requests under way) that shows it.
SETTINGS: tuple[tuple[str, Edit, str, int, int], ...] = (
    ("queue bounded to 64", bounded_queue, "tiles", 8, 1),
    ("queue bounded to 64", bounded_queue, "tiles", 64, 4),
    ("queue bounded to 64", bounded_queue, "slides", 200, 1),
    ("delay 0 ms instead of 2", delay(0), "tiles", 2, 16),
    ("delay 20 ms instead of 2", delay(20), "tiles", 2, 16),
    ("delay 20 ms instead of 2", delay(20), "tiles", 2, 1),
    ("batches of 8 preferred to 64", batches_of(8), "tiles", 2, 16),
    ("2 instances instead of 1", two_instances, "tiles", 64, 4),
    ("1 thread instead of all", one_thread, "tiles", 64, 4),
    ("2 instances of 1 thread", two_instances_of_one_thread, "tiles", 64, 4),
)


def edited(repository: Path, target: Path, edit: Edit) -> Path:
    """A copy of a model repository with its served configurations changed."""
    shutil.copytree(repository, target)
    for path in target.glob("*/configs/onnxruntime.pbtxt"):
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        if config.platform != "ensemble":
            edit(path.parents[1].name, config)
            path.write_text(text_format.MessageToString(config))
    return target


def measure(
    repositories: dict[str, Path],
    loads: Callable[[Contract], list[Workload]],
    concurrencies: list[int],
    seconds: float,
    *,
    bare: bool,
) -> list[Result]:
    """Serve every repository at once and measure them in turns."""
    with tempfile.TemporaryDirectory() as logs, ExitStack() as opened:
        targets = {}
        for name, repository in repositories.items():
            server = opened.enter_context(run_triton(repository, log=Path(logs) / name))
            targets[name] = opened.enter_context(Connection(Endpoint(server.url)))
        contract = read_contract(next(iter(targets.values())))
        alone = local_sessions(next(iter(repositories.values())), contract) if bare else None
        return list(sweep(targets, loads(contract), concurrencies, seconds=seconds, rounds=3, baseline=alone))


def stages(repository: Path, rounds: int = 3) -> list[tuple[str, float, float]]:
    """For each stage of a slide: its name, tiles a second, and that over the bare tile encoder's.

    All stages and the bare session take turns in every round; the median of the rounds' ratios counts.
    """
    path = slide_of(SLIDE_TILES)
    with open_slide(path) as slide:
        plan = plan_tiles(slide, None)
    rates: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as logs,
        run_triton(repository, log=Path(logs) / "triton.log") as server,
        Connection(Endpoint(server.url), in_flight=THROUGHPUT.in_flight) as connection,
    ):
        contract = read_contract(connection)
        alone = local_sessions(repository, contract)
        tiles, ensemble = (WORKLOADS[kind](contract, THROUGHPUT.chunk) for kind in ("tiles", "ensemble"))

        def read() -> None:
            assert (
                sum(int(batch.valid.sum()) for batch in read_tiles(plan, workers=THROUGHPUT.workers))
                == SLIDE_TILES
            )

        def send(workload: Workload) -> None:
            requests = [workload.inputs] * (SLIDE_TILES // THROUGHPUT.chunk)
            answers = connection.infer_in_order(workload.model, requests, workload.outputs)
            assert sum(1 for _ in answers) == len(requests)

        def score() -> None:
            work = BatchJob(
                fresh("stages"), connection.endpoint, contract, TilingOptions(tissue=False), THROUGHPUT
            )
            record = process_slide(work, SlideSource(path, "slide"), connection)
            assert (record.status, record.tiles) == (OK, SLIDE_TILES), record

        steps: dict[str, Callable[[], None]] = {
            "reading the slide": read,
            "tile encoder through Triton": lambda: send(tiles),
            f"ensemble through Triton, a slide of each {THROUGHPUT.chunk} tiles": lambda: send(ensemble),
            "`client score`: reading, encoding, slide encoder, writing": score,
        }
        score()
        for _ in range(rounds):
            rates.setdefault("tile encoder, bare session", []).append(alone(tiles, 3.0))
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                rates.setdefault(name, []).append(SLIDE_TILES / (time.perf_counter() - began))
    bare = rates["tile encoder, bare session"]
    return [
        (name, statistics.median(rate), statistics.median(r / b for r, b in zip(rate, bare, strict=True)))
        for name, rate in rates.items()
    ]


def write_serving(repository: Path, seconds: float, pages: Path) -> None:
    """A slide's stages, and every kind of request, beside bare sessions."""
    slide = [f"| {name} | {rate:,.0f} | {ratio:.2f} |" for name, rate, ratio in stages(repository)]

    def loads(contract: Contract) -> list[Workload]:
        sizes = {"tiles": (1, 8, 32, 64), "ensemble": (64,), "slides": (200, 2000), "occlusion": (200,)}
        return [WORKLOADS[kind](contract, size) for kind in sizes for size in sizes[kind]]

    points = measure({"local": repository}, loads, [1, 2, 4], seconds, bare=True)
    report.write_csv(pages / "serving.csv", points)
    report.write_plot(pages / "serving.png", points)
    rows = [
        f"| {p.kind} | {p.tiles_per_request} | {p.concurrency} | {p.rate:.3g} {p.unit} "
        f"| {p.rate / (p.baseline or 1):.2f} | {p.p50_us / 1e3:.0f} | {p.p95_us / 1e3:.0f} "
        f"| {p.queue_us / 1e3:.0f} | {p.compute_infer_us / 1e3:.0f} | {p.batch:.0f} |"
        for p in points
    ]
    head = "| kind | tiles in a request | under way | a second | of bare | p50 ms | p95 ms | queue ms "
    head += "| compute ms | batch |"
    text = f"""# Serving

Written by `make bench-serving`: demo preset, fp32, Triton 2.51 with the Python ONNX Runtime backend, gRPC on
loopback; client, server and the bare sessions share one machine ({MACHINE}). *Of bare* is the rate divided
by that of a bare ONNX Runtime session with the same graphs, measured in turns (medians of 3 rounds): the
ratio is what to read here. The rates belong to a toy model on a small machine. No GPU was at hand.

## Every stage of a slide

{SLIDE_TILES} tiles (256 px at 0.5 mpp), {THROUGHPUT.in_flight} requests of {THROUGHPUT.chunk} in flight;
next to the tile encoder's bare session.

| stage | tiles a second | of bare |
|---|---|---|
{chr(10).join(slide)}

## Every kind of request

{head}
|{"---|" * 10}
{chr(10).join(rows)}

![Throughput over requests under way](serving.png)
"""
    (pages / "serving.md").write_text(text)


def write_tuning(repository: Path, seconds: float, pages: Path) -> None:
    """Every setting against the repository as it is."""
    rows = []
    for name, edit, kind, size, under_way in SETTINGS:
        with tempfile.TemporaryDirectory() as scratch:
            other = edited(repository, Path(scratch) / "models", edit)
            points = measure(
                {"as it is": repository, "changed": other},
                lambda contract, kind=kind, size=size: [WORKLOADS[kind](contract, size)],  # type: ignore[misc]
                [under_way],
                seconds,
                bare=False,
            )
        before, after = points
        rows.append(
            f"| {name} | {kind} {size} | {under_way} | {after.rate / before.rate:.2f} "
            f"| {before.p50_us / 1e3:.0f} → {after.p50_us / 1e3:.0f} "
            f"| {before.p95_us / 1e3:.0f} → {after.p95_us / 1e3:.0f} "
            f"| {before.batch:.1f} → {after.batch:.1f} |"
        )
    text = f"""# Settings

Written by `make bench-serving`: a setting of `config.pbtxt` changed, against the repository as it is; two
servers measured in turns on one machine ({MACHINE}; medians of 3 rounds, demo preset, fp32, no GPU).

| change | load | under way | rate, to before | p50 ms | p95 ms | batch |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
    (pages / "tuning.md").write_text(text)


def main(
    repository: Annotated[Path, typer.Option(help="The exported model repository.")] = ROOT
    / "model_repository",
    seconds: Annotated[float, typer.Option(help="Seconds of a round.")] = 2.0,
    pages: Annotated[Path, typer.Option(help="Where the pages go.")] = PAGES,
) -> None:
    """Measure a local Triton and write the pages."""
    pages.mkdir(parents=True, exist_ok=True)
    write_serving(repository, seconds, pages)
    write_tuning(repository, seconds, pages)


if __name__ == "__main__":
    typer.run(main)
