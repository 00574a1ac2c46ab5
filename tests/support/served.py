"""Models of a server that are held up, so that what waits for them does not depend on the machine's speed."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from server.local import RunningServer


def stub_of(pid: int, model: str) -> psutil.Process:
    """The process that computes a model of the tritonserver `pid`."""
    (stub,) = (one for one in psutil.Process(pid).children() if f"{model}_0_0" in one.cmdline())
    return stub


@contextmanager
def suspended(pid: int, model: str) -> Iterator[None]:
    """A model that computes nothing meanwhile; the server itself continues to answer."""
    stub = stub_of(pid, model)
    stub.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            stub.resume()


def counted(server: RunningServer, what: str) -> int:
    """The sum of a counter of Triton, by a pattern, over its models and versions."""
    with urllib.request.urlopen(server.metrics_url) as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if re.match(what, line))


def waiting(server: RunningServer, model: str) -> int:
    """Requests that wait until a model has computed an earlier one."""
    return counted(server, rf'nv_inference_pending_request_count\{{model="{model}"')


def wait_for_queue(server: RunningServer, model: str, requests: int) -> None:
    """Wait until `requests` wait for a model, not for a moment only, as also the first does, which is run."""

    def steady() -> bool:
        if waiting(server, model) != requests:
            return False
        time.sleep(0.2)
        return waiting(server, model) == requests

    wait_until(steady)


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for what comes soon, however busy the machine is."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
