"""`client benchmark`: throughput and latency of the served models."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from gigapath_contract.schema import Contract

from ..benchmark import report
from ..benchmark.baseline import Baseline, local_sessions
from ..benchmark.measure import Result, sweep
from ..benchmark.workloads import WORKLOADS, Workload
from ..errors import ClientError
from ..files import make_folder
from ..triton.connection import Connection
from ..triton.contract import read_contract
from ..triton.endpoint import Endpoint
from . import options


@options.shares(endpoint=options.endpoint)
def command(
    endpoint: Endpoint,
    kind: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(WORKLOADS)}; may be repeated [default: all].")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests in flight, one or several numbers.")] = "1,2,4,8",
    chunk: Annotated[str, typer.Option(help="Tiles per request, for tiles and ensemble.")] = "8,32,64",
    slide_tiles: Annotated[str, typer.Option(help="Tiles per slide, for slides and occlusion.")] = "1000",
    seconds: Annotated[float, typer.Option(min=0, callback=options.finite, help="Seconds per trial.")] = 3.0,
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of rounds, each a trial of every server; the median counts.")
    ] = 3,
    bare: Annotated[
        str | None,
        typer.Option(
            help="Baseline: the served repository, to measure bare ONNX Runtime sessions alternately on this "
            "machine, or a known rate (items per second) for a single --kind."
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Second server to compare with.")] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=options.finite,
            help="Hourly price of all servers of a target, used for cost per slide (needs kind tiles).",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/benchmark"),
) -> None:
    """Measure throughput and latency of the served models under load.

    Writes benchmark.csv (perf_analyzer's columns), benchmark.json and benchmark.png.

    Example: `gigapath-client benchmark --kind tiles --chunk 32,64 --bare model_repository`
    """
    kinds = kind or list(WORKLOADS)
    unknown = [name for name in kinds if name not in WORKLOADS]
    if unknown:
        raise ClientError(f"--kind {unknown[0]!r} is unknown: choose from {', '.join(WORKLOADS)}")
    if price_per_hour is not None and "tiles" not in kinds:
        raise ClientError("--price-per-hour needs the rate of tiles: add --kind tiles")
    endpoints = _endpoints(endpoint, against)
    concurrencies, chunks = _numbers(concurrency, "--concurrency"), _numbers(chunk, "--chunk")
    slides = _numbers(slide_tiles, "--slide-tiles")
    make_folder(out)
    with ExitStack() as opened:
        targets = {target.url: opened.enter_context(Connection(target)) for target in endpoints}
        contracts = {url: read_contract(connection) for url, connection in targets.items()}
        versions = {s: v for connection in targets.values() for s, v in connection.server_versions().items()}
        contract = contracts[endpoint.url]
        sizes = {"tiles": chunks, "ensemble": chunks, "slides": slides, "occlusion": slides}
        workloads = [WORKLOADS[name](contract, size) for name in kinds for size in sizes[name]]
        baseline = _baseline(bare, contract, workloads)
        results: list[Result] = []
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=options.console) as progress:
            task = progress.add_task("measuring", total=len(workloads) * len(concurrencies) * len(targets))
            for result in sweep(
                targets, workloads, concurrencies, seconds=seconds, rounds=rounds, baseline=baseline
            ):
                results.append(result)
                progress.update(task, advance=1, description=f"{result.kind} {result.tiles_per_request}")
    about = report.describe(contracts, versions, {"seconds": seconds, "rounds": rounds})
    report.write_csv(out / "benchmark.csv", results)
    report.write_json(out / "benchmark.json", about, results)
    report.write_plot(out / "benchmark.png", results)
    console = Console()
    console.print(_table(results))
    lines = report.compare_targets(results)
    if price_per_hour is not None:
        for tiles in slides:
            lines += report.cost_per_slide(results, price_per_hour, tiles)
    for line in [*lines, f"written: {out}/benchmark.csv, .json, .png"]:
        console.print(line, soft_wrap=True, highlight=False)


def _endpoints(endpoint: Endpoint, against: str | None) -> list[Endpoint]:
    """The endpoint and the one to compare it with, each with servers whose statistics can be read."""
    endpoints = {"--url": endpoint}
    if against is not None:
        endpoints["--against"] = dataclasses.replace(endpoint, url=against)
    for option, target in endpoints.items():
        if target.balanced_by_grpc:
            raise ClientError(
                f"{option}: name the servers (host:port), for the statistics of each have to be read"
            )
    if against is not None and set(endpoints["--against"].servers) == set(endpoint.servers):
        raise ClientError("--against names the same server as --url: give it another one")
    return list(endpoints.values())


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise ClientError(f"{option} takes whole numbers from 1, with commas, not {text!r}")
    return numbers


def _baseline(text: str | None, contract: Contract, workloads: list[Workload]) -> Baseline | None:
    """The baseline that --bare names: a repository or a rate."""
    if text is None:
        return None
    try:
        known = float(text)
    except ValueError:
        return local_sessions(Path(text), contract)
    # Tiles per second compare across chunks; slides and masks of another size are other items.
    if len({(w.kind, w.tiles_per_request if w.unit != "tiles" else 0) for w in workloads}) > 1:
        raise ClientError(
            f"--bare {text}: a rate is that of one kind of request: choose it, e.g. --kind tiles, and for "
            "slides and occlusion one --slide-tiles"
        )
    return lambda workload, seconds: known


def _table(results: list[Result]) -> Table:
    """The results, with times in ms; servers by letters where there are several."""
    letters = {target: chr(ord("A") + i) for i, target in enumerate(dict.fromkeys(r.target for r in results))}
    table = Table(box=None, header_style="bold")
    for heading in ("workload", "in\nflight", "per\nsecond", "of\nbaseline", "p50\nms", "p95\nms", "p99\nms"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "workload" else "right")
    for heading in ("queue\nms", "compute\nms", "batch"):
        table.add_column(heading, no_wrap=True, justify="right")
    for r in results:
        times = (r.p50_us, r.p95_us, r.p99_us, r.queue_us, r.compute_infer_us)
        table.add_row(
            f"{letters[r.target] + ' ' if len(letters) > 1 else ''}{r.kind} {r.tiles_per_request}",
            f"{r.concurrency}",
            report.short(r.rate),
            f"{r.rate / r.baseline:.2f}" if r.baseline else "",
            *(report.short(t / 1e3) for t in times),
            report.short(r.batch),
        )
    if len(letters) > 1:
        table.caption = ", ".join(f"{letter}: {target}" for target, letter in letters.items())
    return table
