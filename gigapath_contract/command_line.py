"""How every command line ends on a user's mistake: one line on standard error and exit code 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from gigapath_contract.errors import one_line


def run(command: Callable[[], object], *errors: type[Exception]) -> None:
    """Call `command`; one of `errors`, or an OSError, ends the process with its one line."""
    expected: tuple[type[Exception], ...] = (*errors, OSError)
    try:
        command()
    except expected as error:
        fail(error)


def call(app: Callable[..., object], name: str | None = None) -> NoReturn:
    """Run a Typer application, called `name`, and end the process.

    What is wrong with an option is one line as every other mistake, not the panel that Typer prints.
    """
    try:
        code = app(standalone_mode=False, prog_name=name)
    except Exception as error:
        usage: Any = error
        if not hasattr(usage, "format_message"):  # every error of Typer's own has it, and no class is public
            raise
        if type(usage).__name__ == "NoArgsIsHelpError":
            sys.exit(usage.exit_code)  # the help is printed
        said, context = usage.format_message(), getattr(usage, "ctx", None)
        stop = "" if said.endswith((".", "?")) else "."
        fail(f"{said}{stop} See {context.command_path} --help" if context else said)
    sys.exit(code if isinstance(code, int) else 0)


def fail(error: Exception | str) -> NoReturn:
    """End the process with one line, in red on a terminal."""
    line = f"error: {explain(error)}"
    coloured = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\x1b[31m{line}\x1b[0m" if coloured else line, file=sys.stderr)  # noqa: T201
    sys.exit(1)


def explain(error: Exception | str) -> str:
    """What is said of an error that ends a command, in one line; of an OSError its file and a remedy."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}: check the path, its permissions and the disk"
    return one_line(error)
