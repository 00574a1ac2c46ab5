"""Triton's statistics of a model: running counts of requests, rows and executions, and their times."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from ..errors import ClientError
from .connection import Connection

STATISTICS_TIMEOUT = 5.0
"""Seconds to wait for Triton's statistics to include the last answers; it takes milliseconds."""


@dataclass(frozen=True)
class ModelStatistics:
    """What Triton has counted for one model since it was loaded, summed over servers; times in seconds.

    Attributes:
        requests: successful requests.
        rows: rows of these requests, of which the batcher may put several requests' into one execution.
        executions: runs of the model.
        executed_rows: rows of these executions.
        request_s, queue_s, compute_input_s, compute_infer_s, compute_output_s: sums over requests: where two
            share an execution, its time counts twice.
        execution_s: inference time of the executions, each counted once.
    """

    requests: int = 0
    rows: int = 0
    executions: int = 0
    executed_rows: int = 0
    request_s: float = 0.0
    queue_s: float = 0.0
    compute_input_s: float = 0.0
    compute_infer_s: float = 0.0
    compute_output_s: float = 0.0
    execution_s: float = 0.0

    def __sub__(self, earlier: ModelStatistics) -> ModelStatistics:
        return ModelStatistics(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


def read_statistics(
    connection: Connection, model: str, version: int | None = None, *, retry: bool = True
) -> ModelStatistics:
    """A model's statistics over all servers of the connection; of all its versions where `version` is None.

    Raises:
        ServerUnavailable, DeadlineExceeded: a server does not answer, with `retry` False at once.
        RequestRefused: it restricts its statistics, or has no such model.
    """
    text = "" if version is None else str(version)
    headers, timeout = dict(connection.endpoint.headers), connection.endpoint.timeout
    answers = connection.for_each_server(
        lambda client: client.get_inference_statistics(model, text, headers=headers, client_timeout=timeout),
        model=model,
        retry=retry,
    )
    models = [stats for answer in answers.values() for stats in answer.model_stats]
    requests = [stats.inference_stats for stats in models]
    batches = [batch for stats in models for batch in stats.batch_stats]
    return ModelStatistics(
        requests=sum(stats.success.count for stats in requests),
        rows=sum(stats.inference_count for stats in models),
        executions=sum(stats.execution_count for stats in models),
        executed_rows=sum(batch.batch_size * batch.compute_infer.count for batch in batches),
        request_s=sum(stats.success.ns for stats in requests) / 1e9,
        queue_s=sum(stats.queue.ns for stats in requests) / 1e9,
        compute_input_s=sum(stats.compute_input.ns for stats in requests) / 1e9,
        compute_infer_s=sum(stats.compute_infer.ns for stats in requests) / 1e9,
        compute_output_s=sum(stats.compute_output.ns for stats in requests) / 1e9,
        execution_s=sum(batch.compute_infer.ns for batch in batches) / 1e9,
    )


def available_statistics(
    connection: Connection, model: str, version: int | None = None
) -> ModelStatistics | None:
    """The same, or None where they can't be read.

    They can't where access is restricted, nor behind a name that gRPC balances: each answer would be another
    server's.
    """
    if connection.endpoint.balanced_by_grpc:
        return None
    try:
        return read_statistics(connection, model, version, retry=False)
    except ClientError:
        return None


def wait_for_rows(
    connection: Connection, model: str, version: int | None, rows: int
) -> ModelStatistics | None:
    """The model's statistics once they count `rows` rows, or as they are after `STATISTICS_TIMEOUT`.

    None where they can't be read.
    """
    deadline = time.monotonic() + STATISTICS_TIMEOUT
    while statistics := available_statistics(connection, model, version):
        if statistics.rows >= rows or time.monotonic() > deadline:
            return statistics
        time.sleep(0.002)
    return None


def wait_for_statistics(
    connection: Connection, models: Sequence[str], since: Mapping[str, ModelStatistics], requests: int
) -> dict[str, ModelStatistics]:
    """The models' statistics once each has counted `requests` more than in `since`, and their executions.

    Where they don't within `STATISTICS_TIMEOUT` (the server was restarted, say), the statistics as they are
    then. Raises as `read_statistics` does.
    """
    deadline = time.monotonic() + STATISTICS_TIMEOUT
    while True:
        statistics = {model: read_statistics(connection, model) for model in models}
        new = [statistics[model] - since[model] for model in models]
        # A server counts rows request by request, and the execution with its batch's size only afterwards.
        complete = all(model.requests >= requests and model.executed_rows >= model.rows for model in new)
        if complete or time.monotonic() > deadline:
            return statistics
        time.sleep(0.002)
