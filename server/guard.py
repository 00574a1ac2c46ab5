"""Supervise a tritonserver for a Python process, so that no process is left when either of them dies.

Run as `python -I -S guard.py PARENT_PID SHM_PREFIX KILL_AFTER PROGRAM ARGUMENTS…`; writes the program's
process number to stdout and sends the program's output to stderr. Standard library only: it starts in 20 ms.

- When the parent dies (even by SIGKILL), or SIGTERM or SIGINT arrives, the program gets SIGTERM and, after
  KILL_AFTER seconds or at a second signal, SIGKILL.
- When the program ends, its process group (Triton's Python stubs) is killed, its files in /dev/shm are
  removed, and the guard exits with the program's code.
- When the guard itself is killed, the kernel sends the program SIGTERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
POLL_SECONDS = 0.2


def main(argv: list[str]) -> int:
    """Guard the program named in `argv` and return its exit code (128 + number for a signal)."""
    parent, shm_prefix, kill_after, *command = argv
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = _spawn(command)
    sys.stdout.write(f"{child}\n")
    sys.stdout.flush()
    status = _wait(child, int(parent), float(kill_after))
    _sweep(child, shm_prefix)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _spawn(command: list[str]) -> int:
    guard = os.getpid()
    child = os.fork()
    if child:
        return child
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != guard:
        os._exit(1)
    os.setpgid(0, 0)
    os.dup2(2, 1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        os.execv(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def _wait(child: int, parent: int, kill_after: float) -> int:
    """Wait for the child; stop it when the parent ends or a signal arrives."""
    deadline: float | None = None
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        received = signal.sigtimedwait(SIGNALS, POLL_SECONDS)
        stop = received is not None and received.si_signo != signal.SIGCHLD
        if deadline is None and (stop or os.getppid() != parent):
            deadline = time.monotonic() + kill_after
            os.kill(child, signal.SIGTERM if kill_after else signal.SIGKILL)
        elif deadline is not None and (stop or time.monotonic() > deadline):
            os.kill(child, signal.SIGKILL)


def _sweep(child: int, shm_prefix: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    for path in Path("/dev/shm").glob(f"{shm_prefix}*"):
        path.unlink(missing_ok=True)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
