"""`python -m client`: every command, and how errors reach the user."""

from __future__ import annotations

import logging
import signal
import sys

import typer
from rich.logging import RichHandler

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
for name, module in COMMANDS.items():
    app.command(name)(module.command)


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
