"""`client timings`: where the time of a run went."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ClientError
from ..outputs.records import read_records
from ..scoring.timings import STAGES, bottleneck, total


def command(
    out: Annotated[Path, typer.Argument(help="The --out folder of a score or a batch.")] = Path("out"),
    slide: Annotated[str | None, typer.Option(help="One slide's id; by default the sum of all.")] = None,
) -> None:
    """Show where the time of a run went, stage by stage, and its bottleneck.

    Example: `python -m client timings results/`
    """
    records = [record for record in read_records(out) if record.stages and slide in (None, record.slide_id)]
    if not records:
        raise ClientError(f"{out}: no finished slide{f' {slide}' if slide else ''}, so no timings")
    stages = total([record.stages for record in records])
    tiles = sum(record.tiles - record.resumed_tiles for record in records)
    table = Table("stage", "seconds", "MB", "calls", "what it is")
    for name, entry in stages.items():
        size = f"{entry['bytes'] / 1e6:.1f}" if entry["bytes"] else ""
        table.add_row(name, f"{entry['seconds']:.2f}", size, f"{entry['calls']:.0f}", STAGES[name])
    console = Console()
    console.print(table)
    console.print(
        f"{len(records)} slides, {tiles} tiles embedded, {sum(r.seconds for r in records):.1f} s in all"
    )
    console.print(bottleneck(stages), soft_wrap=True)
