"""The order in which a batch tries its slides, and which it tries again."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..errors import ContractMismatch, DeadlineExceeded, RequestRefused, ServerUnavailable
from ..files import has_room
from ..outputs.records import Fault, SlideRecord
from ..scoring.score import SlideSource
from ..triton.connection import Connection
from ..triton.contract import check_same
from .job import BatchJob
from .pools import Pool

logger = logging.getLogger(__name__)

MOST_LOSSES = 3  # a slide during which this happens more often may be what brings the server down
_POLL_S = 5.0
_ANSWER_WITHIN_S = 10.0


class BatchReport(Protocol):
    """What a batch reports while it runs."""

    def end(self, record: SlideRecord) -> None:
        """A slide ended."""

    def late(self, record: SlideRecord) -> None:
        """A slide failed for now, and is tried again alone after the others."""

    def wait(self, what: str, reason: str, seconds: float) -> None:
        """The batch waits for `what`, a server or space on the disk, `seconds` at most."""

    def back(self, what: str) -> None:
        """The wait is over."""

    def give_up(self, slides: int, reason: str) -> None:
        """The batch ends: `slides` slides are not started."""


@dataclass(frozen=True)
class Unstarted:
    """The slides that were not tried, and why."""

    slides: list[SlideSource]
    reason: str


_AWAITED = {Fault.SERVER_LOST: "a server", Fault.DISK_FULL: "space on the disk"}


class Watch:
    """Waits for servers that were lost, or for space on a full disk.

    That is for at most `wait_for` seconds since a slide last ended otherwise.
    """

    def __init__(self, job: BatchJob, wait_for: float, report: BatchReport) -> None:
        self._job = job
        self._wait_for = wait_for
        self._report = report
        self._lost_at: float | None = None

    def answered(self) -> None:
        """Note that a slide met neither."""
        self._lost_at = None

    def wait(self, fault: Fault, reason: str) -> str:
        """Block until a server serves the batch's export, or there is space again.

        Returns "", or why there is no use in waiting.
        """
        if self._lost_at is None:
            self._lost_at = time.monotonic()
        waiting, what = False, _AWAITED[fault]
        while (left := self._lost_at + self._wait_for - time.monotonic()) > 0:
            try:
                if has_room(self._job.out) if fault == Fault.DISK_FULL else self._is_back():
                    if waiting:
                        self._report.back(what)
                    return ""
            except ContractMismatch as error:
                return str(error)
            if not waiting:
                self._report.wait(what, reason, left)
                waiting = True
            time.sleep(min(left, _POLL_S))
        return reason

    def _is_back(self) -> bool:
        asked = self._job.endpoint
        endpoint = replace(asked, timeout=min(asked.timeout, _ANSWER_WITHIN_S), retry_for=0)
        try:
            with Connection(endpoint) as connection:
                check_same(connection, self._job.contract)
        except (ServerUnavailable, DeadlineExceeded, RequestRefused) as error:
            logger.info("still waiting: %s", error)
            return False
        return True


def run(
    pool: Pool,
    slides: list[SlideSource],
    watch: Watch,
    report: BatchReport,
    end: Callable[[SlideRecord], None],
    suspects: Set[str] = frozenset(),
) -> Unstarted:
    """Score all slides, at most `pool.size` at a time; `end` gets each one's record.

    A slide that missed a deadline is tried again alone, once all others have ended: then it is not for
    another one of the batch that it fails. A slide during which the servers were lost or the disk was full is
    tried again once `watch` finds one, or space; where it finds none, or another export is served, the slides
    left are not started.
    The `suspects`, one of which may have killed an earlier run, come after the others, each in a process that
    may die; one whose process dies is tried again alone as well.
    """
    waiting = deque(sorted(slides, key=lambda slide: slide.slide_id in suspects))
    late, running = deque[SlideSource](), dict[Any, SlideSource]()
    losses, alone, given_up = Counter[str](), set[str](), ""
    try:
        while running or (not given_up and (waiting or late)):
            while waiting and not given_up and len(running) < pool.size:
                source = waiting.popleft()
                running[pool.submit(source, isolated=source.slide_id in suspects)] = source
            if late and not (running or given_up):
                source = late.popleft()
                alone.add(source.slide_id)
                running[pool.submit(source, isolated=source.slide_id in suspects)] = source
            for handle in pool.wait(list(running)):
                source = running.pop(handle)
                record = pool.result(handle, source)
                lost = record.fault in _AWAITED
                if lost:
                    losses[source.slide_id] += 1
                    given_up = given_up or watch.wait(record.fault, record.reason)
                elif record.fault == Fault.EXPORT_CHANGED:
                    given_up = given_up or record.reason
                else:
                    watch.answered()
                if given_up or record.fault == Fault.NONE:
                    end(record)
                elif lost and losses[source.slide_id] <= MOST_LOSSES:
                    (late if source.slide_id in alone else waiting).appendleft(source)
                elif source.slide_id not in alone:
                    late.append(source)
                    report.late(record)
                else:
                    end(record)
    finally:
        pool.close()
    return Unstarted([*waiting, *late], given_up)
