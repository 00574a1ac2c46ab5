"""Closed-loop load: so many requests are always under way, and what comes of it is measured.

The figures are perf_analyzer's (throughput, latency percentiles, the server's own account of a request), for
requests that it can't make up by itself: whole slides, and masks over a slide.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient

from ..triton.connection import Connection
from .workloads import Load

LEAST_REQUESTS = 8
"""A round goes on until it has so many answers, however long one takes."""
BOOKED_WITHIN = 5.0
"""Seconds that a server gets to count what it has answered: it does so milliseconds after the answer."""


@dataclass(frozen=True)
class Account:
    """What a server has counted: requests, rows and executions; times are seconds, summed over requests.

    `requests`, `rows` and `executions` are of a load's first step, the one that batches, `executed` the rows
    of these executions; `ended` are the rows of its last step.
    """

    requests: int = 0
    rows: int = 0
    ended: int = 0
    executions: int = 0
    executed: int = 0
    queue: float = 0.0
    compute_input: float = 0.0
    compute_infer: float = 0.0
    compute_output: float = 0.0

    def __sub__(self, earlier: Account) -> Account:
        return Account(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


def read_account(connection: Connection, load: Load) -> Account:
    """The running counts of a load's models, over all servers of the connection.

    Raises:
        ServerUnavailable, RequestRefused: also where the server restricts its statistics.
    """
    headers = dict(connection.endpoint.headers)

    def ask(client: InferenceServerClient, *, step: str) -> list[Any]:
        return list(client.get_inference_statistics(step, headers=headers).model_stats)

    found = {
        step: [
            stats
            for answer in connection.on_each(functools.partial(ask, step=step)).values()
            for stats in answer
        ]
        for step in load.steps
    }
    first, every = found[load.steps[0]], [stats.inference_stats for step in found.values() for stats in step]
    return Account(
        requests=sum(stats.inference_stats.success.count for stats in first),
        rows=sum(stats.inference_count for stats in first),
        ended=sum(stats.inference_count for stats in found[load.steps[-1]]),
        executions=sum(stats.execution_count for stats in first),
        executed=sum(b.batch_size * b.compute_infer.count for stats in first for b in stats.batch_stats),
        queue=sum(stats.queue.ns for stats in every) / 1e9,
        compute_input=sum(stats.compute_input.ns for stats in every) / 1e9,
        compute_infer=sum(stats.compute_infer.ns for stats in every) / 1e9,
        compute_output=sum(stats.compute_output.ns for stats in every) / 1e9,
    )


def read_settled(connection: Connection, load: Load, earlier: Account, answered: int) -> Account:
    """The running counts once they hold the `answered` requests that followed on `earlier`.

    Where they don't within `BOOKED_WITHIN` (the server was restarted, say), the counts as they are then.
    """
    deadline = time.monotonic() + BOOKED_WITHIN
    while True:
        account = read_account(connection, load)
        new = account - earlier
        # A server counts rows request by request, and the execution with its batch's size only afterwards.
        booked = min(new.rows, new.executed) >= answered * load.rows and new.ended >= answered
        if booked or time.monotonic() > deadline:
            return account
        time.sleep(0.002)


@dataclass(frozen=True)
class Round:
    """The latency of each answer and how long the round took, in seconds, with the server's account of it."""

    latencies: tuple[float, ...]
    seconds: float
    account: Account


def measure_round(connection: Connection, load: Load, concurrency: int, seconds: float) -> Round:
    """Keep `concurrency` requests under way for `seconds`, and for `LEAST_REQUESTS` answers at least.

    Raises:
        ServerUnavailable, RequestRefused
    """

    def ask() -> float:
        began = time.perf_counter()
        connection.infer(load.model, load.inputs, load.outputs)
        return time.perf_counter() - began

    def keep_asking(deadline: float) -> list[float]:
        latencies: list[float] = []
        while time.perf_counter() < deadline or len(latencies) * concurrency < LEAST_REQUESTS:
            latencies.append(ask())
        return latencies

    with ThreadPoolExecutor(concurrency) as pool:
        start = read_account(connection, load)
        for warm in [pool.submit(ask) for _ in range(concurrency)]:
            warm.result()
        before, began = read_settled(connection, load, start, concurrency), time.perf_counter()
        asking = [pool.submit(keep_asking, began + seconds) for _ in range(concurrency)]
        latencies = tuple(latency for future in asking for latency in future.result())
        took = time.perf_counter() - began
    return Round(latencies, took, read_settled(connection, load, before, len(latencies)) - before)


@dataclass(frozen=True)
class Point:
    """One load at one concurrency.

    `rate` is items a second, the median of the rounds, and `spread` their least and most; `bare` is what a
    bare session makes of the same. Times are µs: percentiles of the latency, and the server's mean account of
    one request. `batch` is how many rows the server ran at once.
    """

    target: str
    kind: str
    size: int
    unit: str
    items: int
    concurrency: int
    requests: int
    rate: float
    spread: tuple[float, float]
    bare: float | None
    mean_us: float
    p50_us: float
    p90_us: float
    p95_us: float
    p99_us: float
    queue_us: float
    compute_input_us: float
    compute_infer_us: float
    compute_output_us: float
    batch: float


def summarise(
    target: str, load: Load, concurrency: int, rounds: Sequence[Round], bare: float | None
) -> Point:
    """The rounds of one load as one point."""
    rates = [load.items * len(r.latencies) / r.seconds for r in rounds]
    latencies = np.array([latency for r in rounds for latency in r.latencies]) * 1e6
    p50, p90, p95, p99 = np.percentile(latencies, [50, 90, 95, 99])
    requests = sum(r.account.requests for r in rounds)
    executions = sum(r.account.executions for r in rounds)

    def mean_us(name: str) -> float:
        return float(sum(getattr(r.account, name) for r in rounds) / max(requests, 1) * 1e6)

    return Point(
        target=target,
        kind=load.kind,
        size=load.size,
        unit=load.unit,
        items=load.items,
        concurrency=concurrency,
        requests=len(latencies),
        rate=statistics.median(rates),
        spread=(min(rates), max(rates)),
        bare=bare,
        mean_us=float(latencies.mean()),
        p50_us=float(p50),
        p90_us=float(p90),
        p95_us=float(p95),
        p99_us=float(p99),
        queue_us=mean_us("queue"),
        compute_input_us=mean_us("compute_input"),
        compute_infer_us=mean_us("compute_infer"),
        compute_output_us=mean_us("compute_output"),
        batch=sum(r.account.rows for r in rounds) / max(executions, 1),
    )


def sweep(
    targets: Mapping[str, Connection],
    loads: Sequence[Load],
    concurrencies: Sequence[int],
    *,
    seconds: float,
    rounds: int,
    bare: Callable[[Load, float], float] | None = None,
) -> Iterator[Point]:
    """Measure every load at every concurrency on every target, and yield each point when it is done.

    The targets, and the bare session where there is one (`bare(load, seconds)` gives items a second), take
    turns in every round: what else the machine does meanwhile hits all of them alike.
    """
    for load in loads:
        for concurrency in concurrencies:
            done: dict[str, list[Round]] = {name: [] for name in targets}
            bares: list[float] = []
            for _ in range(rounds):
                for name, connection in targets.items():
                    done[name].append(measure_round(connection, load, concurrency, seconds))
                if bare:
                    bares.append(bare(load, seconds))
            alone = statistics.median(bares) if bares else None
            for name, measured in done.items():
                yield summarise(name, load, concurrency, measured, alone)
