"""How every command line ends on a user's mistake: one line on standard error and exit code 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run(command: Callable[[], object], *errors: type[Exception]) -> None:
    """Call `command`; one of `errors`, or an OSError, ends the process with its one line."""
    expected: tuple[type[Exception], ...] = (*errors, OSError)
    try:
        command()
    except expected as error:
        fail(error)


def fail(error: Exception | str) -> NoReturn:
    """End the process with one line, in red on a terminal."""
    line = f"error: {one_line(error)}"
    coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\x1b[31m{line}\x1b[0m" if coloured else line, file=sys.stderr)  # noqa: T201
    sys.exit(1)


def one_line(error: Exception | str) -> str:
    """An error's message in one line; an OSError's with its file and a remedy."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}: check the path, its permissions and the disk"
    return " ".join(str(error).split())
