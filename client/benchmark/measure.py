"""Closed-loop load: so many requests are always under way, and what comes of it is measured.

The figures are perf_analyzer's (throughput, latency percentiles, the server's own account of a request), for
requests that it can't make up by itself: whole slides, and masks over a slide.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..triton.connection import Connection
from ..triton.statistics import ModelStatistics, read_statistics, wait_for_statistics
from .workloads import Load

LEAST_REQUESTS = 8
"""A round goes on until it has so many answers, however long one takes."""


@dataclass(frozen=True)
class Round:
    """The latency of each answer and how long the round took, in seconds, and what the server counted.

    `statistics` are those of the load's steps, in their order.
    """

    latencies: tuple[float, ...]
    seconds: float
    statistics: tuple[ModelStatistics, ...]


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
        start = {step: read_statistics(connection, step) for step in load.steps}
        for warm in [pool.submit(ask) for _ in range(concurrency)]:
            warm.result()
        before = wait_for_statistics(connection, load.steps, start, concurrency)
        began = time.perf_counter()
        asking = [pool.submit(keep_asking, began + seconds) for _ in range(concurrency)]
        latencies = tuple(latency for future in asking for latency in future.result())
        took = time.perf_counter() - began
    after = wait_for_statistics(connection, load.steps, before, len(latencies))
    return Round(latencies, took, tuple(after[step] - before[step] for step in load.steps))


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
    first = [r.statistics[0] for r in rounds]  # an ensemble's first step is the one that batches
    requests, rows = sum(step.requests for step in first), sum(step.rows for step in first)
    executions = sum(step.executions for step in first)

    def mean_us(name: str) -> float:
        seconds = sum(getattr(step, name) for r in rounds for step in r.statistics)
        return float(seconds / max(requests, 1) * 1e6)

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
        queue_us=mean_us("queue_s"),
        compute_input_us=mean_us("compute_input_s"),
        compute_infer_us=mean_us("compute_infer_s"),
        compute_output_us=mean_us("compute_output_s"),
        batch=rows / max(executions, 1),
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
