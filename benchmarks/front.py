"""What the front costs: the same requests to a Triton, directly and through `python -m server.front`.

Writes front.md. Both ways are measured alternately.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks.common import (
    MACHINE,
    PAGES,
    ROOT,
    Pages,
    alternate,
    exported,
    median_ratio,
    seconds_of,
    table,
    write_page,
)
from client.benchmark.workloads import WORKLOADS, Workload
from client.commands.options import finite
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from server.local import LOOPBACK, run_triton
from server.ports import free_port

REQUESTS = (("tiles", 64), ("tiles", 8), ("slides", 2000), ("occlusion", 200))
"""Kind of request, and tiles per request."""
IN_FLIGHT = 4


@contextmanager
def front_process(upstream: str) -> Iterator[tuple[str, psutil.Process]]:
    """A front in a process of its own, as deployments run it: its host:port and the process."""
    listen = f"{LOOPBACK}:{free_port(LOOPBACK)}"
    command = [sys.executable, "-m", "server.front", "--listen", listen, "--upstream", upstream]
    with (
        tempfile.TemporaryFile("w") as log,
        subprocess.Popen(command, cwd=ROOT, stderr=log) as process,
    ):
        try:
            yield listen, psutil.Process(process.pid)
        finally:
            process.terminate()


def rate(connection: Connection, workload: Workload, count: int) -> float:
    """Items per second of `count` requests."""

    def send() -> None:
        answers = connection.infer_stream(workload.model, [workload.inputs] * count, workload.outputs)
        assert sum(1 for _ in answers) == count

    return count * workload.items / seconds_of(send)


def main(
    trials: Annotated[int, typer.Option(min=1, help="Trials of each way; the median counts.")] = 9,
    seconds: Annotated[float, typer.Option(min=0, callback=finite, help="Seconds of a trial, about.")] = 2.0,
    pages: Pages = PAGES,
) -> None:
    """Measure a local Triton with and without a front."""
    rows = []
    with (
        tempfile.TemporaryDirectory() as logs,
        run_triton(exported("demo"), log=Path(logs) / "triton.log") as server,
        front_process(server.url) as (listen, process),
        Connection(Endpoint(server.url), in_flight=IN_FLIGHT) as direct,
        Connection(Endpoint(listen), in_flight=IN_FLIGHT) as behind,
    ):
        contract = read_contract(behind)
        for kind, size in REQUESTS:
            workload = WORKLOADS[kind](contract, size)
            count = max(
                2 * IN_FLIGHT, round(seconds * rate(direct, workload, 2 * IN_FLIGHT) / workload.items)
            )
            ways: dict[str, Callable[[], float]] = {
                name: partial(rate, connection, workload, count)
                for name, connection in (("direct", direct), ("behind", behind))
            }
            before = sum(process.cpu_times()[:2])
            measured = alternate(ways, trials)
            spent = (sum(process.cpu_times()[:2]) - before) / (trials * count)
            rates = [statistics.median(measured[name]) for name in ways]
            ratio = median_ratio(measured["behind"], measured["direct"])
            rows.append(
                f"{kind} | {size} | {rates[0]:,.4g} {workload.unit} | {rates[1]:,.4g} | {ratio:.3f} "
                f"| {1e3 * spent:.1f}"
            )
    header = (
        "kind | tiles per request | direct, per second | through the front | of direct | CPU ms per request"
    )
    page = f"""# The front

Written by `make bench NAME=front`: the same Triton 2.51 (demo preset, fp32), directly and through the
[front](../server.md#the-front) in a process of its own, without TLS; client, front and server share one
machine ({MACHINE}, no GPU). {IN_FLIGHT} requests in flight, measured alternately: medians of {trials} trials,
and the median of their ratios. A request of 64 tiles has 9.6 MB. *CPU* is the front's own: where it has cores
of its own, that bounds what it passes on.

{table(header, rows)}
"""
    write_page(pages / "front.md", page)
