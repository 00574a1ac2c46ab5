"""Several slides at a time: in threads of this process, or as tasks on a Ray cluster."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection as PipeConnection
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from ..errors import Cancelled, ClientError, OutputError
from ..outputs.records import FAILED, Fault, SlideRecord, write_record
from ..scoring.embedding import Progress
from ..scoring.score import SlideSource
from ..triton.connection import Connection
from ..triton.endpoint import Endpoint
from .job import BatchJob, process_slide

logger = logging.getLogger(__name__)
_SPAWN = multiprocessing.get_context("spawn")
_MOST_ISOLATED = 2
"""Processes of one slide each at a time: what ended the run may have been the memory."""

ProgressFactory = Callable[[SlideSource], Progress]
"""Makes the progress callback of a slide that is started."""


class Pool(Protocol):
    """Where slides are processed; `size` is how many at a time."""

    size: int

    def submit(self, source: SlideSource, *, isolated: bool = False) -> Any:
        """Start a slide; returns a handle. `isolated`: in a process whose death fails this slide alone."""

    def wait(self, handles: list[Any]) -> list[Any]:
        """Block until some of the handles are done, and return those."""

    def result(self, handle: Any, source: SlideSource) -> SlideRecord:
        """The record of a slide that is done."""

    def close(self) -> None:
        """Cancel the slides in progress and end the workers."""


class LocalPool:
    """Threads of this process with one connection: the next slide is opened while the last one finishes."""

    def __init__(self, job: BatchJob, size: int, progress_for: ProgressFactory) -> None:
        self.size = size
        self._job = job
        self._progress_for = progress_for
        self._connection = Connection(job.endpoint, in_flight=job.throughput.in_flight)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="slide")
        self._processes: set[SpawnProcess] = set()
        self._isolating = threading.Semaphore(_MOST_ISOLATED)
        self._closed = False

    def submit(self, source: SlideSource, *, isolated: bool = False) -> Future[SlideRecord]:
        """Start a slide."""
        if isolated:
            return self._threads.submit(self._isolated_in_turn, source)
        return self._threads.submit(
            process_slide, self._job, source, self._connection, self._progress_for(source)
        )

    def wait(self, handles: list[Future[SlideRecord]]) -> list[Future[SlideRecord]]:
        """Block until a slide is done."""
        return list(wait(handles, return_when=FIRST_COMPLETED).done)

    def result(self, handle: Future[SlideRecord], source: SlideSource) -> SlideRecord:
        """The record; an unexpected error in one slide is logged and does not affect the others."""
        error = handle.exception()
        if error is None:
            return handle.result()
        if isinstance(error, Cancelled | KeyboardInterrupt):
            raise error
        logger.error("%s: unexpected error, please report it", source.slide_id, exc_info=error)
        return _unexpected(source, f"{type(error).__name__}: {error}")

    def _isolated_in_turn(self, source: SlideSource) -> SlideRecord:
        with self._isolating:
            if self._closed:
                raise Cancelled(f"{source.path}: the batch was interrupted")
            return self._isolated(source)

    def _isolated(self, source: SlideSource) -> SlideRecord:
        receiver, sender = _SPAWN.Pipe(duplex=False)
        process = _SPAWN.Process(target=_send_record, args=(self._job, source, sender))
        process.start()
        self._processes.add(process)
        sender.close()
        if self._closed:  # since it was started
            process.kill()
        try:
            record: SlideRecord = receiver.recv()
        except EOFError:
            process.join()
            if self._closed:
                self._job.begun(source.slide_id).unlink(missing_ok=True)
                raise Cancelled(f"{source.path}: the batch was interrupted") from None
            code = process.exitcode or 0
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            record = SlideRecord(
                source.slide_id,
                str(source.path),
                FAILED,
                f"its process died ({how}): the slide is damaged, copy it again, or too large for the memory",
                Fault.PROCESS_DIED,
            )
            with contextlib.suppress(OutputError):
                write_record(self._job.layout.export, record)
        process.join()
        self._processes.discard(process)
        return record

    def close(self) -> None:
        """Cancel the requests in flight, so that the threads end, and wait for them."""
        self._closed = True
        self._connection.cancel()
        for process in self._processes.copy():
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._connection.close()


class RayPool:
    """Tasks on a Ray cluster, which shares the slides and `out`; `address` "local" starts one here."""

    def __init__(self, job: BatchJob, size: int | None, address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise ClientError("--ray needs Ray: pip install ray") from error
        self._ray: Any = ray
        _check_reachable(address)
        try:
            ray.init(address, include_dashboard=False if address == "local" else None, log_to_driver=False)
        except Exception as error:  # Ray raises a bare Exception where a node is slow to start
            raise ClientError(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from error
        resources: dict[str, float] = self._ray.cluster_resources()
        cores = job.throughput.workers
        self.size = size or max(1, int(resources.get("CPU", 1)) // cores)
        # A task that died with its worker is retried, and resumes where the worker stopped.
        self._task = ray.remote(num_cpus=cores, max_retries=2)(_process_on_ray)
        self._job = ray.put(job)

    def submit(self, source: SlideSource, *, isolated: bool = False) -> Any:
        """Start a slide; each has a process of Ray's."""
        return self._task.remote(self._job, source)

    def wait(self, handles: list[Any]) -> list[Any]:
        """Block until a slide is done."""
        done: list[Any] = self._ray.wait(handles, num_returns=1)[0]
        return done

    def result(self, handle: Any, source: SlideSource) -> SlideRecord:
        """The record; a worker that died fails its own slide alone."""
        try:
            record: SlideRecord = self._ray.get(handle)
        except self._ray.exceptions.RayError as error:
            logger.error("%s: unexpected error on Ray", source.slide_id, exc_info=error)
            return _unexpected(source, str(error).strip().splitlines()[-1])
        return record

    def close(self) -> None:
        """Leave the cluster (a local one ends), which cancels this batch's tasks."""
        self._ray.shutdown()


def _send_record(job: BatchJob, source: SlideSource, sender: PipeConnection) -> None:
    """Process a slide in a process of its own; Ctrl-C is its parent's, which then kills it.

    It ends with its parent: the next run would write the same files.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Connection(job.endpoint, in_flight=job.throughput.in_flight) as connection:
        sender.send(process_slide(job, source, connection))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check_reachable(address: str) -> None:
    """Connect to host:port first: Ray itself would try for minutes and log each attempt."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return  # auto, local
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ClientError(f"no Ray cluster at {address} ({error}): give auto, host:port or local") from error


def _process_on_ray(job: BatchJob, source: SlideSource) -> SlideRecord:
    return process_slide(job, source, _connection(job.endpoint, job.throughput.in_flight))


@functools.lru_cache(maxsize=1)
def _connection(endpoint: Endpoint, in_flight: int) -> Connection:
    """One connection per Ray worker, for all its slides."""
    return Connection(endpoint, in_flight=in_flight)


def _unexpected(source: SlideSource, message: str) -> SlideRecord:
    return SlideRecord(
        source.slide_id, str(source.path), FAILED, f"unexpected error, please report it: {message}"
    )
