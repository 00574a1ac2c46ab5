"""`client benchmark`: what a server achieves, and what of it is the server's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from gigapath_contract.schema import Contract

from ..benchmark import report
from ..benchmark.baseline import bare_rate
from ..benchmark.measure import Point, sweep
from ..benchmark.workloads import LOADS, Load
from ..errors import ClientError
from ..triton.connection import Connection
from ..triton.contract import read_contract
from ..triton.endpoint import Endpoint
from . import options


@options.shares(endpoint=options.endpoint)
def command(
    endpoint: Endpoint,
    kind: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(LOADS)}; may be repeated. All by default.")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests under way at a time.")] = "1,2,4,8",
    chunk: Annotated[str, typer.Option(help="Tiles a request, for tiles and ensemble.")] = "8,32,64",
    slide_tiles: Annotated[str, typer.Option(help="Tiles a slide, for slides and occlusion.")] = "1000",
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of a round.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 3,
    bare: Annotated[
        str | None,
        typer.Option(
            help="The served repository, to measure bare ONNX Runtime sessions in turn on this very machine, "
            "or a known rate, items a second, of a single --kind."
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="A second server, measured in turn.")] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="What all servers of a target together cost an hour: gives the cost of a slide "
            "(needs kind tiles).",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out/benchmark"),
) -> None:
    """Measure throughput and latency of the served models under load.

    Writes benchmark.csv (perf_analyzer's columns), benchmark.json and benchmark.png.

    Example: `python -m client benchmark --kind tiles --chunk 32,64 --bare model_repository`
    """
    kinds = kind or list(LOADS)
    unknown = [name for name in kinds if name not in LOADS]
    if unknown:
        raise ClientError(f"--kind {unknown[0]!r} is unknown: choose from {', '.join(LOADS)}")
    endpoints = {"--url": endpoint}
    if against is not None:
        endpoints["--against"] = dataclasses.replace(endpoint, url=against)
    for option, target in endpoints.items():
        if target.balanced_by_grpc:
            raise ClientError(
                f"{option}: name the servers (host:port): each must give an account of its own requests"
            )
    if against is not None and set(endpoints["--against"].servers) == set(endpoint.servers):
        raise ClientError("--against names the same server as --url: give it another one")
    if price_per_hour is not None and "tiles" not in kinds:
        raise ClientError("--price-per-hour needs the rate of tiles: add --kind tiles")
    under_way, chunks = _numbers(concurrency, "--concurrency"), _numbers(chunk, "--chunk")
    slides = _numbers(slide_tiles, "--slide-tiles")
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        targets = {target.url: opened.enter_context(Connection(target)) for target in endpoints.values()}
        contracts = {url: read_contract(connection) for url, connection in targets.items()}
        versions = {s: v for connection in targets.values() for s, v in connection.server_versions().items()}
        contract = contracts[endpoint.url]
        sizes = {"tiles": chunks, "ensemble": chunks, "slides": slides, "occlusion": slides}
        loads = [LOADS[name](contract, size) for name in kinds for size in sizes[name]]
        alone = _bare(bare, contract, loads)
        points: list[Point] = []
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=options.console) as progress:
            task = progress.add_task("measuring", total=len(loads) * len(under_way) * len(targets))
            for point in sweep(targets, loads, under_way, seconds=seconds, rounds=rounds, bare=alone):
                points.append(point)
                progress.update(task, advance=1, description=f"{point.kind} {point.size}")
    about = report.describe(contracts, versions, {"seconds": seconds, "rounds": rounds})
    report.write_csv(out / "benchmark.csv", points)
    report.write_json(out / "benchmark.json", about, points)
    report.write_plot(out / "benchmark.png", points)
    console = Console()
    console.print(report.as_table(points))
    for line in report.compare(points):
        console.print(line, soft_wrap=True, highlight=False)
    if price_per_hour is not None:
        for tiles in slides:
            for line in report.cost_of_a_slide(points, price_per_hour, tiles):
                console.print(line, soft_wrap=True, highlight=False)
    console.print(f"written: {out}/benchmark.csv, .json, .png", soft_wrap=True, highlight=False)


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise ClientError(f"{option} takes whole numbers from 1, with commas, not {text!r}")
    return numbers


def _bare(text: str | None, contract: Contract, loads: list[Load]) -> Callable[[Load, float], float] | None:
    if text is None:
        return None
    try:
        known = float(text)
    except ValueError:
        return bare_rate(Path(text), contract)
    # Tiles a second compare across chunks; slides and masks of another size are other items.
    if len({(load.kind, load.size if load.unit != "tiles" else 0) for load in loads}) > 1:
        raise ClientError(
            f"--bare {text}: a rate is that of one kind of request: choose it, e.g. --kind tiles, and for "
            "slides and occlusion one --slide-tiles"
        )
    return lambda load, seconds: known
