"""Keep a Python stub counted as alive while its process exists, and end a Triton whose stub has died.

Run by the backend as `python -I -S heartbeat.py STUB_PID MODEL`; the backend ends it when the model is
unloaded. Standard library only.

During a batch of more than a second, Triton 2.51 checks every second that the stub is alive by a byte in
their shared memory, which one of the stub's threads sets every 300 ms. If the stub does not run for that long
(on an overloaded or paused machine), Triton fails its requests, but the stub continues, and both sides free
each other's messages until one of them crashes. So this process sets the byte as well.

Once the stub has died, Triton never starts another one, and every request to the model would fail. Version
2.64 does not either (issue 8604 of triton-inference-server/server). So it is killed, for its supervisor
(`python -m server`, compose, Kubernetes) to start it again: asked to end, it would first wait for requests
that nobody answers. What it leaves in shared memory is removed.
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
KILLED_MS = 1000


def main(pid: int, model: str) -> None:
    """Set the byte until the process `pid`, the stub of `model`, ends; then end its tritonserver."""
    stub = os.pidfd_open(pid)
    command = _command(pid)
    triton = int(command[PARENT])
    parent = os.pidfd_open(triton)
    sign = int(command[CONTROL]) + OWNERSHIP_BYTES
    # It holds the requests' tensors, and Triton makes it readable for everybody.
    _region(command).chmod(0o600)
    with _region(command).open("r+b") as region:
        memory = mmap.mmap(region.fileno(), sign + 1)
    ended = select.poll()
    ended.register(stub, select.POLLIN)
    while not ended.poll(PERIOD_MS):
        memory[sign] = 1
    gone = select.poll()
    gone.register(parent, select.POLLIN)
    regions = [_region(command), *_regions_of(triton)]
    if not gone.poll(0):
        line = f"model '{model}': its process {pid} died, so the server ends, to be started again\n"
        os.write(2, line.encode())  # to the server's log, in which Triton itself writes nothing
        for number in (signal.SIGKILL, signal.SIGTERM):  # the first process of a container can't be killed
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(parent, number)
            if gone.poll(KILLED_MS):
                break
    for path in regions:
        path.unlink(missing_ok=True)


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def _region(command: list[str]) -> Path:
    return Path("/dev/shm", command[REGION].lstrip("/"))


def _regions_of(triton: int) -> list[Path]:
    """The shared memory of the stubs that the process `triton` still has."""
    regions = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            command = line.read_text().split("\0")
            if command[0].endswith("triton_python_backend_stub") and command[PARENT] == str(triton):
                regions.append(_region(command))
    return regions


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
