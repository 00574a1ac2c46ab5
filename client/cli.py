"""`gigapath-client`: every command, and how errors reach the user."""

from __future__ import annotations

import importlib
import logging
import signal
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gigapath_contract.command_line import call, fail
from gigapath_contract.errors import ContractError

from .commands.options import console
from .errors import ClientError
from .version import __version__

logger = logging.getLogger(__name__)
COMMANDS = (
    *("convert", "tissue", "score", "batch", "attribute", "counterfactual", "timings", "doctor"),
    *("benchmark", "verify", "view"),
)
"""Modules of `commands`, in the order of the help."""
PROGRAM = "gigapath-client"
"""What a user types, in a checkout (`make setup`) as where the wheel is installed."""


class Commands(TyperGroup):
    """Imports a command's module when the command is asked for: none waits for the modules of the others."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        for name in [cmd_name] if cmd_name in COMMANDS else COMMANDS:  # all: one of them may have been meant
            if name not in self.commands:
                function = importlib.import_module(f".commands.{name}", __package__).command
                single = typer.Typer(add_completion=False, rich_markup_mode=self.rich_markup_mode)
                single.command(name, help=function.__doc__)(function)
                self.commands[name] = typer.main.get_command(single)
        return self.commands.get(cmd_name)


app = typer.Typer(
    name="client",
    cls=Commands,
    help="Whole slides in, tile embeddings, slide embeddings, scores and occlusion maps out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            show_default=False,
            help="Log retries and how slides are read, and print every figure of `attribute`; twice, also "
            "the traceback of an error.",
        ),
    ] = 0,
) -> None:
    """Options of the program itself, given before the command."""
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    logging.getLogger(__package__).setLevel(level)


class _OneLine(logging.Handler):
    """A line per record, not wrapped, above the progress bars of the console."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else ""
        console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 1, Ctrl-C is 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped pod cleans up as Ctrl-C does
    line = "{asctime} {levelname} {message}"
    logging.basicConfig(format=line, datefmt="%Y-%m-%d %H:%M:%S", style="{", handlers=[_OneLine()])
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # our line says what is wrong
    try:
        call(app, PROGRAM)
    except (ClientError, ContractError, OSError) as error:
        logger.debug("traceback of the error", exc_info=error)
        fail(error)
