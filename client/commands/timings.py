"""`client timings`: where the time of a run went."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ClientError
from ..outputs.records import read_records
from ..scoring.timings import STAGES, bottleneck, shares, total


def command(
    out: Annotated[Path, typer.Argument(help="The --out folder of a score or a batch.")] = Path("out"),
    slide: Annotated[str | None, typer.Option(help="One slide's id; by default the sum of all.")] = None,
) -> None:
    """Show where the time of a run went, stage by stage, and its bottleneck.

    Example: `gigapath-client timings results/`
    """
    records = [record for record in read_records(out) if record.stages and slide in (None, record.slide_id)]
    if not records:
        raise ClientError(f"{out}: no finished slide{f' {slide}' if slide else ''}, so no timings")
    stages = total([record.stages for record in records])
    tiles = sum(record.tiles - record.resumed_tiles for record in records)
    seconds = sum(record.seconds for record in records)
    in_turn = shares(stages, seconds)
    table = Table("stage", "seconds", "share", "MB", "calls", "what it is")
    for name, (spent, share) in in_turn.items():
        table.add_row(name, f"{spent:.2f}", f"{share:.0%}", *_details(name, stages))
    table.add_section()
    for name in (name for name in stages if name not in in_turn):
        table.add_row(name, f"{stages[name]['seconds']:.2f}", "", *_details(name, stages))
    console = Console()
    console.print(table)
    console.print(
        f"{len(records)} slide{'s' * (len(records) > 1)}, {tiles} tiles embedded, {seconds:.1f} s in all: "
        "the stages above the line add up to it, those below run at the same time",
        soft_wrap=True,
    )
    console.print(bottleneck(stages, seconds if len(records) == 1 else 0.0), soft_wrap=True)


def _details(name: str, stages: dict[str, dict[str, float]]) -> tuple[str, str, str]:
    """MB, calls and meaning of a stage."""
    if name not in stages:
        return "", "", "records, checks of the export, and whatever else no stage measures"
    entry = stages[name]
    size = f"{entry['bytes'] / 1e6:.1f}" if entry["bytes"] else ""
    return size, f"{entry['calls']:.0f}", STAGES[name]
