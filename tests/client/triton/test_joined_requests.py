"""Requests that several callers share, against a real Triton."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from threading import Event
from typing import Any

import numpy as np
import pytest

from client.arrays import Array, Pixels
from client.errors import Cancelled, RequestRefused, ServerUnavailable
from client.triton.connection import Connection, result_of
from client.triton.endpoint import Endpoint
from client.triton.joined_requests import Answer, JoinedRequests

CALLERS = [np.random.default_rng(n).integers(0, 256, (n, 224, 224, 3), np.uint8) for n in (30, 20, 15, 14)]
Infer = Callable[[Array], dict[str, Array]]


def together(
    infer: Infer, most_rows: int, callers: list[Pixels], *, cancel: int | None = None
) -> tuple[list[Future[Answer]], list[int]]:
    """Send the callers' rows while the only thread is busy; their answers, and the size of each request."""
    sizes: list[int] = []

    def counted(rows: Array) -> dict[str, Array]:
        sizes.append(len(rows))
        return infer(rows)

    with ThreadPoolExecutor(1) as thread:
        free = Event()
        thread.submit(free.wait)
        requests = JoinedRequests(counted, thread.submit, most_rows)
        answers = [requests.send(rows) for rows in callers]
        if cancel is not None:
            answers[cancel].cancel()
        free.set()
        for answer in answers:
            if not answer.cancelled():
                answer.exception(60)
    return answers, sizes


@pytest.fixture
def embed(connection: Connection) -> Infer:
    """Embeddings of some tiles."""
    return lambda rows: connection.infer("tile_encoder", {"TILES": rows}, ["EMBEDDINGS"])


def test_callers_share_requests_and_get_their_own_rows(embed: Infer) -> None:
    answers, sizes = together(embed, 64, CALLERS)
    assert sizes == [64, 15]  # 30, 20 and 14 fit together
    for rows, answer in zip(CALLERS, answers, strict=True):
        assert np.array_equal(answer.result().outputs["EMBEDDINGS"], embed(rows)["EMBEDDINGS"])
        assert answer.result().seconds > 0


def test_a_refused_request_is_sent_again_for_each_caller(embed: Infer) -> None:
    """Its 79 rows are more than the server takes."""
    answers, sizes = together(embed, 100, CALLERS)
    assert sizes == [79, 30, 20, 15, 14]
    for rows, answer in zip(CALLERS, answers, strict=True):
        assert np.array_equal(answer.result().outputs["EMBEDDINGS"], embed(rows)["EMBEDDINGS"])


def test_what_is_given_up_is_not_sent(embed: Infer) -> None:
    answers, sizes = together(embed, 64, CALLERS[2:], cancel=0)
    assert sizes == [14]
    with pytest.raises(CancelledError):
        answers[0].result()


def test_a_lost_server_is_every_callers_error_and_is_not_asked_for_each() -> None:
    with Connection(Endpoint("127.0.0.1:1", retry_for=0)) as lost:
        answers, sizes = together(
            lambda rows: lost.infer("tile_encoder", {"TILES": rows}, ["EMBEDDINGS"]), 64, CALLERS[2:]
        )
    assert sizes == [29]
    assert all(isinstance(answer.exception(), ServerUnavailable) for answer in answers)


@pytest.mark.parametrize("shared", [False, True])
def test_closing_a_connection_cancels_what_waits_for_it(shared: bool) -> None:
    """Else who waits for it in another thread would do so for ever."""
    began = time.monotonic()
    with Connection(Endpoint("127.0.0.1:1", retry_for=60, shared_memory=shared), in_flight=1) as lost:
        sent = [
            lost.infer_rows("tile_encoder", "TILES", CALLERS[3], ["EMBEDDINGS"], most_rows=1) for _ in "ab"
        ]
    assert len(wait(sent, 60).done) == 2
    for answer in sent:
        with pytest.raises(Cancelled):
            result_of(answer)
    assert time.monotonic() - began < 30  # not until the time for retries is over


def test_rows_that_would_be_sent_again_end_with_their_threads() -> None:
    thread, queued, closed = ThreadPoolExecutor(1), Event(), Event()

    def refuse(rows: Array) -> dict[str, Array]:
        thread.shutdown(wait=False)
        closed.set()
        raise RequestRefused("too many rows")

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if closed.is_set():
            raise Cancelled("cancelled")
        return thread.submit(function, *arguments)

    thread.submit(queued.wait)
    requests = JoinedRequests(refuse, submit, 2)
    sent = [requests.send(np.zeros((1, 3))) for _ in "ab"]
    queued.set()
    assert all(isinstance(answer.exception(60), Cancelled) for answer in sent)


def test_no_rows_need_no_request(embed: Infer) -> None:
    answers, sizes = together(embed, 64, [CALLERS[0][:0]])
    assert (sizes, answers[0].result().outputs) == ([], {})
