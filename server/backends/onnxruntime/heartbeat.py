"""Keep a Python stub counted as alive while its process exists, and end a Triton whose stub has died.

Run by the backend as `python -I -S heartbeat.py STUB_PID`. Standard library only.

During a batch of more than a second, Triton 2.51 checks every second that the stub is alive by a byte in
their shared memory, which one of the stub's threads sets every 300 ms. If the stub does not run for that long
(on an overloaded or paused machine), Triton fails its requests, but the stub continues, and both sides free
each other's messages until one of them crashes. So this process sets the byte as well.

Once the stub has died, the byte stays unset, and Triton gets SIGTERM, so that its supervisor (compose,
Kubernetes) restarts it: it never starts another stub, and every request would fail. Version 2.64 does not
either (issue 8604 of triton-inference-server/server).
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
"""Length of the header before every block; the first byte of the control block is the sign of life."""
PERIOD_MS = 20


def main(pid: int) -> None:
    """Set the byte until the process `pid`, a stub, ends; then end its tritonserver."""
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
