"""`client doctor`: checks before a long run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..batch.doctor import BAD, GOOD, check_all
from ..scoring.score import TilingOptions
from ..triton.endpoint import Endpoint
from . import options
from .display import say_next

_MARKS = {GOOD: "[green]ok  [/]", BAD: "[red]FAIL[/]"}


@options.shares(endpoint=functools.partial(options.endpoint, retry_for=0.0), tiling=options.tiling)
def command(
    endpoint: Endpoint,
    tiling: TilingOptions,
    source: Annotated[
        Path | None,
        typer.Argument(
            callback=options.address,
            help="A slide, a folder or a manifest, as for batch.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder to check for free space.")] = Path("out"),
    wsi_dir: options.WsiDir = None,
) -> None:
    """Check server, contract, versions and disk, and plan every slide as batch will; exit 1 if one fails.

    The time is what the server needs at the rate that it is measured at.

    Example: `gigapath-client doctor cohort.csv --wsi-dir slides/ --url triton:8001`
    """
    console, failed = Console(), False
    for check in check_all(endpoint, out, source, wsi_dir, tiling):
        failed |= check.state == BAD
        console.print(f"{_MARKS.get(check.state, '[yellow]warn[/]')} {check.name}:", end=" ", highlight=False)
        console.print(check.detail, highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)
    if source:
        say_next(
            "batch", source, *(("--wsi-dir", wsi_dir) if wsi_dir else ()), "--out", out, endpoint=endpoint
        )
