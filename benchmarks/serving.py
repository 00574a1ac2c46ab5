"""A slide's stages and every kind of request against bare ONNX Runtime sessions, and every setting.

Writes serving.md, .csv and .png, and tuning.md. Comparisons are measured alternately (client/benchmark).
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from benchmarks.common import (
    MACHINE,
    PAGES,
    WORK,
    Pages,
    alternate,
    exported,
    fresh_folder,
    median_ratio,
    seconds_of,
    slide_of,
    table,
    write_page,
)
from client.batch.job import BatchJob, process_slide
from client.benchmark import report
from client.benchmark.baseline import local_sessions
from client.benchmark.measure import Result, sweep
from client.benchmark.workloads import WORKLOADS, Workload
from client.commands.options import finite
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

PRESETS = ("demo", "gigapath-flash")
TRIALS = 3
SLIDE_TILES = 1280
CHUNK = 64
BARE = "tile encoder, bare session"
THROUGHPUT = Throughput()
Edit = Callable[[str, Any], None]


def bounded_queue(model: str, config: Any) -> None:
    """Refuse what finds 64 requests waiting."""
    config.dynamic_batching.default_queue_policy.max_queue_size = 64


def delay(milliseconds: int) -> Edit:
    """Set how long the batcher waits for more tiles."""

    def edit(model: str, config: Any) -> None:
        if model == "tile_encoder":
            config.dynamic_batching.max_queue_delay_microseconds = milliseconds * 1000

    return edit


def batches_of(tiles: int) -> Edit:
    """Set how many tiles the batcher joins before it stops waiting."""

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


# What is changed, how, and the request (kind, tiles, how many in flight) that shows it.
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
    workloads: Callable[[Contract], list[Workload]],
    concurrencies: list[int],
    seconds: float,
    *,
    bare: bool,
) -> list[Result]:
    """Serve every repository at once and measure them alternately."""
    with tempfile.TemporaryDirectory() as logs, ExitStack() as opened:
        targets = {}
        for name, repository in repositories.items():
            server = opened.enter_context(run_triton(repository, log=Path(logs) / name))
            targets[name] = opened.enter_context(Connection(Endpoint(server.url)))
        contract = read_contract(next(iter(targets.values())))
        alone = local_sessions(next(iter(repositories.values())), contract) if bare else None
        return list(
            sweep(targets, workloads(contract), concurrencies, seconds=seconds, rounds=TRIALS, baseline=alone)
        )


def stages(repository: Path) -> list[tuple[str, float, float]]:
    """For each stage of a slide: its name, tiles per second, and that over the bare tile encoder's rate."""
    path = slide_of(SLIDE_TILES)
    with open_slide(path) as slide:
        plan = plan_tiles(slide, None)
    with (
        tempfile.TemporaryDirectory() as logs,
        run_triton(repository, log=Path(logs) / "triton.log") as server,
        Connection(Endpoint(server.url), in_flight=THROUGHPUT.in_flight) as connection,
    ):
        contract = read_contract(connection)
        bare = local_sessions(repository, contract)
        tiles, ensemble = (WORKLOADS[kind](contract, CHUNK) for kind in ("tiles", "ensemble"))

        def read() -> None:
            batches = read_tiles(plan, workers=THROUGHPUT.workers)
            assert sum(int(batch.valid.sum()) for batch in batches) == SLIDE_TILES

        def send(workload: Workload) -> None:
            requests = [workload.inputs] * (SLIDE_TILES // CHUNK)
            answers = connection.infer_stream(workload.model, requests, workload.outputs)
            assert sum(1 for _ in answers) == len(requests)

        def score() -> None:
            out = fresh_folder(WORK / "serving")
            job = BatchJob(out, connection.endpoint, contract, TilingOptions(tissue=False), THROUGHPUT)
            record = process_slide(job, SlideSource(path, "slide"), connection)
            assert (record.status, record.tiles) == (OK, SLIDE_TILES), record

        def rate(stage: Callable[[], None]) -> Callable[[], float]:
            return lambda: SLIDE_TILES / seconds_of(stage)

        score()
        rates = alternate(
            {
                BARE: lambda: bare(tiles, 3.0),
                "reading the slide": rate(read),
                "tile encoder through Triton": rate(lambda: send(tiles)),
                f"ensemble through Triton, a slide of each {CHUNK} tiles": rate(lambda: send(ensemble)),
                "`gigapath-client score`: reading, encoding, slide encoder, writing": rate(score),
            },
            TRIALS,
        )
    return [(name, statistics.median(own), median_ratio(own, rates[BARE])) for name, own in rates.items()]


def write_serving(repository: Path, seconds: float, pages: Path) -> None:
    """A slide's stages, the tile encoders and every kind of request, against bare sessions."""
    stage_rows = [f"{name} | {rate:,.0f} | {ratio:.2f}" for name, rate, ratio in stages(repository)]
    preset_rows = []
    for preset in PRESETS:
        served = {"local": exported(preset)}
        (r,) = measure(served, lambda contract: [WORKLOADS["tiles"](contract, 64)], [2], seconds, bare=True)
        assert r.baseline is not None
        preset_rows.append(f"{preset} | {r.baseline:.1f} | {r.rate:.1f} | {r.rate / r.baseline:.3f}")

    def workloads(contract: Contract) -> list[Workload]:
        sizes = {"tiles": (1, 8, 32, 64), "ensemble": (64,), "slides": (200, 2000), "occlusion": (200,)}
        return [WORKLOADS[kind](contract, size) for kind in sizes for size in sizes[kind]]

    results = measure({"local": repository}, workloads, [1, 2, 4], seconds, bare=True)
    pages.mkdir(parents=True, exist_ok=True)
    report.write_csv(pages / "serving.csv", results)
    report.write_plot(pages / "serving.png", results)
    request_rows = (
        f"{r.kind} | {r.tiles_per_request} | {r.concurrency} | {r.rate:,.4g} {r.unit} "
        f"| {r.rate / (r.baseline or 1):.2f} | {r.p50_us / 1e3:.0f} | {r.p95_us / 1e3:.0f} "
        f"| {r.queue_us / 1e3:.0f} | {r.compute_infer_us / 1e3:.0f} | {r.batch:.0f}"
        for r in results
    )
    header = "kind | tiles per request | in flight | per second | of bare | p50 ms | p95 ms | queue ms"
    page = f"""# Serving

Written by `make bench NAME=serving`: fp32, Triton 2.51 with the Python ONNX Runtime backend, gRPC on
loopback; client, server and the bare sessions share one machine ({MACHINE}, no GPU). *Of bare* is the rate
divided by that of a bare ONNX Runtime session with the same graphs, measured alternately (medians of {TRIALS}
trials): the ratio is what to read here. Where no preset is named it is `demo`, a small model.

## Every stage of a slide

{SLIDE_TILES} tiles (256 px at 0.5 mpp), {THROUGHPUT.in_flight} requests of {CHUNK} in flight, next
to the tile encoder's bare session.

{table("stage | tiles per second | of bare", stage_rows)}

## The tile encoder of two presets

Requests of 64 tiles (9.6 MB), 2 in flight, medians of {TRIALS} trials.

{table("preset | bare session, tiles per second | through Triton, tiles per second | of bare", preset_rows)}

## Every kind of request

{table(f"{header} | compute ms | batch", request_rows)}

![Throughput over requests in flight](serving.png)
"""
    write_page(pages / "serving.md", page)


def write_tuning(repository: Path, seconds: float, pages: Path) -> None:
    """Every setting against the repository as it is."""
    rows = []
    for name, edit, kind, size, in_flight in SETTINGS:
        with tempfile.TemporaryDirectory() as scratch:
            other = edited(repository, Path(scratch) / "models", edit)
            before, after = measure(
                {"as it is": repository, "changed": other},
                lambda contract, kind=kind, size=size: [WORKLOADS[kind](contract, size)],  # type: ignore[misc]
                [in_flight],
                seconds,
                bare=False,
            )
        rows.append(
            f"{name} | {kind} {size} | {in_flight} | {after.rate / before.rate:.2f} "
            f"| {before.p50_us / 1e3:.0f} → {after.p50_us / 1e3:.0f} "
            f"| {before.p95_us / 1e3:.0f} → {after.p95_us / 1e3:.0f} "
            f"| {before.batch:.1f} → {after.batch:.1f}"
        )
    page = f"""# Settings

Written by `make bench NAME=serving`: a setting of `config.pbtxt` changed, against the repository as it is;
two servers measured alternately on one machine ({MACHINE}; medians of {TRIALS} trials, demo preset, fp32, no
GPU).

{table("change | request | in flight | rate, to before | p50 ms | p95 ms | batch", rows)}
"""
    write_page(pages / "tuning.md", page)


def main(
    seconds: Annotated[float, typer.Option(min=0, callback=finite, help="Seconds of a trial.")] = 2.0,
    pages: Pages = PAGES,
) -> None:
    """Measure a local Triton."""
    repository = exported("demo")
    write_serving(repository, seconds, pages)
    write_tuning(repository, seconds, pages)
