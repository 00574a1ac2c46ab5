"""32 clients at once against a local Triton, for five minutes.

The tile encoder's queue is bounded, and together the clients keep more requests in flight than it and the
batches hold: the server must refuse some and the clients must retry. Every answer is compared with one that
was given without load. Exits 1 where an answer is lost or wrong, nothing was refused, or memory grows.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.common import MACHINE, PAGES, Pages, exported, resident_mib, table, write_page
from benchmarks.serving import bounded_queue, edited
from client.arrays import Array
from client.benchmark.workloads import tiles_workload
from client.commands.options import finite
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from server.local import run_triton

TOLERANCE = 1e-5
GROWTH = 1.05
"""How much more memory the last fifth of the time may take than the second (the first fills the arenas)."""


class Refusals(logging.Handler):
    """Counts what connections log when they retry: Triton's metrics leave out a full queue's refusals."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count one line."""
        self.count += "maximum queue size" in record.getMessage()


def main(
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 32,
    seconds: Annotated[float, typer.Option(min=0, callback=finite, help="For how long.")] = 300,
    pages: Pages = PAGES,
) -> None:
    """Overload a local Triton, and check every answer and its memory."""
    in_flight, chunk = 8, 2
    stop, refusals, logger = threading.Event(), Refusals(), logging.getLogger("client.triton.connection")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(refusals)
    with (
        tempfile.TemporaryDirectory() as scratch,
        run_triton(
            edited(exported("demo"), Path(scratch) / "models", bounded_queue), log=Path(scratch) / "log"
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

                for answer in mine.infer_stream(workload.model, requests(), workload.outputs):
                    right = expected[(number + answered) % len(tiles)]
                    wrong += not np.allclose(answer["EMBEDDINGS"], right, rtol=0, atol=TOLERANCE)
                    answered += 1
            return sent, answered, wrong

        samples: list[float] = []
        start = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            working = [pool.submit(work, number) for number in range(clients)]
            while time.monotonic() - start < seconds and not any(w.done() for w in working):
                time.sleep(1)
                samples.append(resident_mib(server.pid))
            stop.set()
            sent, answered, wrong = (
                sum(column) for column in zip(*(w.result() for w in working), strict=True)
            )
        took = time.monotonic() - start
    fifths = [float(np.median(part)) for part in np.array_split(samples, 5)]
    growth = fifths[-1] / fifths[1]
    checks = (
        ("answers lost", f"{sent - answered}", sent == answered),
        (f"answers that differ by more than {TOLERANCE:g}", f"{wrong}", wrong == 0),
        ("requests refused by the full queue, and retried", f"{refusals.count}", refusals.count > 0),
        (
            f"memory in the last fifth of the time, over that in the second (at most {GROWTH})",
            f"{growth:.3f}",
            growth <= GROWTH,
        ),
    )
    rows = [
        f"clients, requests in flight of each, tiles per request | {clients}, {in_flight}, {chunk}",
        f"seconds | {took:.0f}",
        f"requests answered | {answered} ({answered * chunk / took:.1f} tiles/s)",
        *(f"{name} | {value}{'' if passed else ' — FAILED'}" for name, value, passed in checks),
        f"memory of server and backends by fifths, MiB | {', '.join(f'{part:.0f}' for part in fifths)}",
    ]
    page = f"""# Soak

Written by `make bench NAME=soak` (demo preset, loopback; server and clients share one machine, {MACHINE}).

{table("|", rows)}
"""
    write_page(pages / "soak.md", page, passed=all(passed for *_, passed in checks))
