"""Closed-loop load: keeps a fixed number of requests in flight and measures throughput and latency.

The figures are perf_analyzer's (throughput, latency percentiles, the server's times of a request), for
requests that it can't generate: whole slides, and masks over a slide.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..triton.connection import Connection
from ..triton.statistics import ModelStatistics, read_statistics, wait_for_statistics
from .baseline import Baseline
from .workloads import Workload

MIN_REQUESTS = 8
"""A trial lasts until it has this many answers, however long one takes."""


@dataclass(frozen=True)
class Trial:
    """One measurement.

    Attributes:
        latencies: of each request, in seconds.
        seconds: how long the trial took.
        statistics: what the server counted during it, for each of the workload's steps.
    """

    latencies: tuple[float, ...]
    seconds: float
    statistics: tuple[ModelStatistics, ...]


def measure_trial(connection: Connection, workload: Workload, concurrency: int, seconds: float) -> Trial:
    """Keep `concurrency` requests in flight for `seconds`, and for at least `MIN_REQUESTS` answers.

    Raises:
        ServerUnavailable, RequestRefused: a request fails, or the statistics can't be read.
    """

    def request() -> float:
        began = time.perf_counter()
        connection.infer(workload.model, workload.inputs, workload.outputs)
        return time.perf_counter() - began

    def repeat(deadline: float) -> list[float]:
        latencies: list[float] = []
        while time.perf_counter() < deadline or len(latencies) * concurrency < MIN_REQUESTS:
            latencies.append(request())
        return latencies

    with ThreadPoolExecutor(concurrency) as pool:
        start = {step: read_statistics(connection, step) for step in workload.steps}
        for warm_up in [pool.submit(request) for _ in range(concurrency)]:
            warm_up.result()
        before = wait_for_statistics(connection, workload.steps, start, concurrency)
        began = time.perf_counter()
        streams = [pool.submit(repeat, began + seconds) for _ in range(concurrency)]
        latencies = tuple(latency for stream in streams for latency in stream.result())
        took = time.perf_counter() - began
    after = wait_for_statistics(connection, workload.steps, before, len(latencies))
    return Trial(latencies, took, tuple(after[step] - before[step] for step in workload.steps))


@dataclass(frozen=True)
class Result:
    """One workload at one concurrency on one target; times in µs.

    Attributes:
        target: the server's name.
        kind, tiles_per_request, unit, items: as in the `Workload`.
        requests: number of requests in all trials.
        rate: items per second, the median of the trials.
        spread: the lowest and the highest rate of the trials.
        baseline: items per second of the baseline, None without one.
        mean_us, p50_us, p90_us, p95_us, p99_us: latency of a request.
        queue_us, compute_input_us, compute_infer_us, compute_output_us: the server's mean times per request,
            summed over the steps of an ensemble.
        batch: mean rows per execution of the first step.
    """

    target: str
    kind: str
    tiles_per_request: int
    unit: str
    items: int
    concurrency: int
    requests: int
    rate: float
    spread: tuple[float, float]
    baseline: float | None
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
    target: str, workload: Workload, concurrency: int, trials: Sequence[Trial], baseline: float | None
) -> Result:
    """The trials of one workload as one result."""
    rates = [workload.items * len(trial.latencies) / trial.seconds for trial in trials]
    latencies = np.array([latency for trial in trials for latency in trial.latencies]) * 1e6
    p50, p90, p95, p99 = np.percentile(latencies, [50, 90, 95, 99])
    first = [trial.statistics[0] for trial in trials]  # an ensemble's first step is the one that batches
    requests, rows = sum(step.requests for step in first), sum(step.rows for step in first)
    executions = sum(step.executions for step in first)

    def mean_us(name: str) -> float:
        seconds = sum(getattr(step, name) for trial in trials for step in trial.statistics)
        return float(seconds / max(requests, 1) * 1e6)

    return Result(
        target=target,
        kind=workload.kind,
        tiles_per_request=workload.tiles_per_request,
        unit=workload.unit,
        items=workload.items,
        concurrency=concurrency,
        requests=len(latencies),
        rate=statistics.median(rates),
        spread=(min(rates), max(rates)),
        baseline=baseline,
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
    workloads: Sequence[Workload],
    concurrencies: Sequence[int],
    *,
    seconds: float,
    rounds: int,
    baseline: Baseline | None = None,
) -> Iterator[Result]:
    """Measure every workload at every concurrency on every target, and yield each result when it is done.

    A round has one trial of each target and one of the baseline, so that changes of the machine's speed
    affect all of them alike. Raises as `measure_trial` does.
    """
    for workload in workloads:
        for concurrency in concurrencies:
            trials: dict[str, list[Trial]] = {name: [] for name in targets}
            baselines: list[float] = []
            for _ in range(rounds):
                for name, connection in targets.items():
                    trials[name].append(measure_trial(connection, workload, concurrency, seconds))
                if baseline:
                    baselines.append(baseline(workload, seconds))
            median = statistics.median(baselines) if baselines else None
            for name in targets:
                yield summarise(name, workload, concurrency, trials[name], median)
