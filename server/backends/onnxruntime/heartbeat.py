"""Keeps a Python stub counted as alive for as long as its process exists, and ends a Triton that lost one.

Run by the backend as `python -I -S heartbeat.py STUB_PID`. Standard library only.

While a batch takes longer than a second, Triton 2.51 asks the stub every second for a sign of life: a byte in
their shared memory, set by one of the stub's threads every 300 ms. A stub that does not get to run that long
(an overloaded or paused machine) is given up: its requests fail, but it keeps running, and both sides free
each other's messages until one of them crashes. So the byte is set from here, whether or not the stub's
threads run. Once the stub is gone, the byte stays unset; Triton never starts another stub, and every request
would fail. So it gets SIGTERM, and its supervisor restarts it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import sys
from pathlib import Path

REGION, PARENT, CONTROL = 2, 5, 7
"""Where the stub's command line names its shared memory, tritonserver and the control block in the memory."""
OWNERSHIP_BYTES = 16
"""In front of every block; the control block's first byte is the sign of life."""
PERIOD_MS = 20


def main(pid: int) -> None:
    """Beat until the process `pid`, a stub, ends; then end its tritonserver."""
    stub = os.pidfd_open(pid)
    command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    parent = os.pidfd_open(int(command[PARENT]))
    sign = int(command[CONTROL]) + OWNERSHIP_BYTES
    with Path("/dev/shm", command[REGION].lstrip("/")).open("r+b") as region:
        memory = mmap.mmap(region.fileno(), sign + 1)
    ended = select.poll()
    ended.register(stub, select.POLLIN)
    while not ended.poll(PERIOD_MS):
        memory[sign] = 1
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(parent, signal.SIGTERM)


if __name__ == "__main__":
    main(int(sys.argv[1]))
