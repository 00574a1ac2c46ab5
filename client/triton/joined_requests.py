"""Rows of several callers in one request to a model that batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import Cancelled, NonFiniteAnswer, RequestRefused


@dataclass(frozen=True, eq=False)
class Answer:
    """The outputs of one caller's rows, and their share of the seconds that their request took."""

    outputs: dict[str, Array]
    seconds: float


@dataclass(eq=False)
class _Rows:
    rows: Array
    alone: bool = False
    future: Future[Answer] = field(default_factory=Future)


class JoinedRequests:
    """Sends rows at once where a thread is free, else together with others that wait, in order of arrival.

    A caller's rows stay together. Where a request of several callers is refused, or its answer is not finite,
    each caller's rows are sent again alone, so that the error is that of its own rows. Once the threads end,
    all that waits is cancelled.

    Args:
        infer: one request: rows [B, ...] in, the outputs [B, ...] back.
        submit: runs a function in one of the threads that send, now or when one is free; its future is
            cancelled, or it raises Cancelled, where they ended.
        most_rows: of a request of several callers.
    """

    def __init__(
        self,
        infer: Callable[[Array], dict[str, Array]],
        submit: Callable[..., Future[Any]],
        most_rows: int,
    ) -> None:
        self._infer = infer
        self._submit = submit
        self._most_rows = most_rows
        self._waiting: list[_Rows] = []
        self._lock = threading.Lock()

    def send(self, rows: Array) -> Future[Answer]:
        """The answer to rows [B, ...], some time later; of no rows there are no outputs."""
        one = _Rows(rows)
        if len(rows):
            self._enqueue(one)
        else:
            one.future.set_result(Answer({}, 0.0))
        return one.future

    def _enqueue(self, one: _Rows) -> None:
        with self._lock:
            self._waiting.append(one)
        # One task for each: where another request has taken the rows already, it has nothing to do.
        together: list[_Rows] = []
        try:
            self._submit(self._send, together).add_done_callback(partial(self._pass_on, together))
        except Cancelled:
            self._give_up()

    def _send(self, together: list[_Rows]) -> tuple[dict[str, Array], float]:
        """Fill `together` with what fits into a request, and send it; returns outputs and seconds per row."""
        together += self._take()
        if not together:
            return {}, 0.0
        began = time.perf_counter()
        rows = together[0].rows if len(together) == 1 else np.concatenate([one.rows for one in together])
        outputs = self._infer(rows)
        return outputs, (time.perf_counter() - began) / len(rows)

    def _pass_on(self, together: list[_Rows], sent: Future[tuple[dict[str, Array], float]]) -> None:
        if sent.cancelled():
            self._give_up()
            return
        if error := sent.exception():
            for one in together:
                if len(together) > 1 and isinstance(error, NonFiniteAnswer | RequestRefused):
                    self._enqueue(_Rows(one.rows, True, one.future))
                else:
                    one.future.set_exception(error)
            return
        (outputs, spent), end = sent.result(), 0
        for one in together:
            start, end = end, end + len(one.rows)
            own = {name: array[start:end] for name, array in outputs.items()}
            one.future.set_result(Answer(own, spent * len(one.rows)))

    def _give_up(self) -> None:
        """End all that waits, for which there is no thread any more."""
        with self._lock:
            left, self._waiting = self._waiting, []
        for one in left:
            if one.future.running() or one.future.set_running_or_notify_cancel():
                one.future.set_exception(Cancelled("cancelled"))

    def _take(self) -> list[_Rows]:
        """The rows that have waited longest, and those after them that fit into the same request."""
        taken: list[_Rows] = []
        with self._lock:
            left, self._waiting = self._waiting, []
            room = self._most_rows
            for one in left:
                if not taken or (len(one.rows) <= room and not (one.alone or taken[0].alone)):
                    if one.future.running() or one.future.set_running_or_notify_cancel():
                        taken.append(one)
                        room -= len(one.rows)
                else:
                    self._waiting.append(one)
        return taken
