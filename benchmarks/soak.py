"""`make bench-soak`: 32 clients at once against a local Triton, for five minutes; writes what came of it.

The tile encoder's queue is bounded for this, and together they keep more requests under way than it and the
batches take: the server must refuse some and the clients must try again. Every answer is compared with one
that was given in quiet. Exits 1 where an answer is lost or wrong, nothing was refused, or memory grows.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from benchmarks.serving import MACHINE, bounded_queue, edited
from client.arrays import Array
from client.benchmark.workloads import tiles_workload
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from server.local import RunningServer, run_triton

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5
GROWTH = 1.05
"""How much more memory the last fifth of the time may take than the second (the first fills the arenas)."""


class Refusals(logging.Handler):
    """Counts what connections log when they try again: Triton's metrics leave out a full queue's refusals."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count one line."""
        self.count += "maximum queue size" in record.getMessage()


def memory(server: RunningServer) -> float:
    """Resident memory of tritonserver and its backend processes in MiB."""
    parent = psutil.Process(server.pid)
    return float(sum(process.memory_info().rss for process in (parent, *parent.children())) / 2**20)


def main(
    repository: Annotated[Path, typer.Option(help="The exported model repository.")] = ROOT
    / "model_repository",
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 32,
    seconds: Annotated[float, typer.Option(help="For how long.")] = 300,
    page: Annotated[Path, typer.Option(help="Where the results go.")] = ROOT
    / "docs"
    / "benchmarks"
    / "soak.md",
) -> None:
    """Hold a local Triton under an overload and write down what it did."""
    in_flight, chunk = 8, 2
    stop, refusals, logger = threading.Event(), Refusals(), logging.getLogger("client.triton.connection")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(refusals)
    with (
        tempfile.TemporaryDirectory() as scratch,
        run_triton(
            edited(repository, Path(scratch) / "models", bounded_queue), log=Path(scratch) / "log"
        ) as server,
    ):
        endpoint = Endpoint(server.url, timeout=600, retry_for=120)
        with Connection(endpoint) as connection:
            workload = tiles_workload(read_contract(connection), chunk)
            random = np.random.default_rng(0)
            tiles = [random.integers(0, 256, workload.inputs["TILES"].shape, np.uint8) for _ in range(16)]
            expected = [
                connection.infer(workload.model, {"TILES": t}, workload.outputs)["EMBEDDINGS"] for t in tiles
            ]

        def work(number: int) -> tuple[int, int, int]:
            """One client: requests sent, answered and answered wrongly."""
            sent = answered = wrong = 0
            with Connection(endpoint, in_flight=in_flight) as mine:

                def requests() -> Iterator[dict[str, Array]]:
                    nonlocal sent
                    while not stop.is_set():
                        yield {"TILES": tiles[(number + sent) % len(tiles)]}
                        sent += 1

                for answer in mine.infer_in_order(workload.model, requests(), workload.outputs):
                    right = expected[(number + answered) % len(tiles)]
                    wrong += not np.allclose(answer["EMBEDDINGS"], right, rtol=0, atol=TOLERANCE)
                    answered += 1
            return sent, answered, wrong

        samples: list[float] = []
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            working = [pool.submit(work, number) for number in range(clients)]
            while time.monotonic() - began < seconds and not any(w.done() for w in working):
                time.sleep(1)
                samples.append(memory(server))
            stop.set()
            sent, answered, wrong = (
                sum(column) for column in zip(*(w.result() for w in working), strict=True)
            )
        took = time.monotonic() - began
    fifths = [float(np.median(part)) for part in np.array_split(samples, 5)]
    growth = fifths[-1] / fifths[1]
    checks = {
        "answers lost": (sent - answered, sent == answered),
        f"answers that differ by more than {TOLERANCE:g}": (wrong, wrong == 0),
        "requests refused by the full queue, tried again": (refusals.count, refusals.count > 0),
        f"memory in the last fifth of the time, to that in the second (at most {GROWTH})": (
            f"{growth:.3f}",
            growth <= GROWTH,
        ),
    }
    rows = [
        ("clients, requests each keeps under way, tiles in each", f"{clients}, {in_flight}, {chunk}"),
        ("seconds", f"{took:.0f}"),
        ("requests answered", f"{answered} ({answered * chunk / took:.1f} tiles/s)"),
        *((name, f"{value}{'' if good else ' — FAILED'}") for name, (value, good) in checks.items()),
        ("memory of server and backends by fifths, MiB", ", ".join(f"{part:.0f}" for part in fifths)),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(
        "# Soak\n\nWritten by `make bench-soak` (demo preset, loopback; server and clients share "
        f"one machine, {MACHINE}).\n\n| | |\n|---|---|\n{table}\n"
    )
    typer.echo(page.read_text())
    sys.exit(not all(good for _, good in checks.values()))


if __name__ == "__main__":
    typer.run(main)
