"""A front before a server, for as long as a test needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from server.front.proxy import Settings, run_front
from server.local import LOOPBACK
from server.ports import free_port


@contextmanager
def fronted(upstream: str, **settings: Any) -> Iterator[str]:
    """The host:port of a front before `upstream`; it stops at once."""
    listen = f"{LOOPBACK}:{free_port(LOOPBACK)}"
    with run_front(Settings(listen, upstream, grace=0, **settings)):
        yield listen
