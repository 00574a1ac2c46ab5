"""`python -m client`: every command, and how errors reach the user."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Annotated

import typer
from rich.logging import RichHandler

from . import __version__
from .commands import attribute, batch, benchmark, counterfactual, doctor, explain, score, verify
from .commands.options import console
from .errors import ClientError

app = typer.Typer(
    name="client",
    help="Whole slides in, tile embeddings, slide embeddings, scores and occlusion maps out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
COMMANDS = {
    "score": score,
    "batch": batch,
    "attribute": attribute,
    "counterfactual": counterfactual,
    "explain": explain,
    "doctor": doctor,
    "benchmark": benchmark,
    "verify": verify,
}
PROGRAM = "python -m client" if __package__ == "client" else "gigapath-client"
"""What a user types: the first in a checkout, the second where the wheel is installed."""

for name, module in COMMANDS.items():
    app.command(name, help=(module.command.__doc__ or "").replace("python -m client", PROGRAM))(
        module.command
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gigapath-client {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log retries and other details.")] = False,
) -> None:
    """Options of the program itself, given before the command."""
    if verbose:
        logging.getLogger(__package__).setLevel(logging.INFO)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 1, Ctrl-C is 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what Ctrl-C cleans up, a stopped pod does too
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    try:
        app(standalone_mode=True)
    except ClientError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
