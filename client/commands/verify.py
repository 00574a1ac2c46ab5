"""`client verify`: compare a running server with the export's reference."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..files import make_folder, write_text
from ..triton.connection import Connection
from ..triton.contract import read_contract
from ..triton.endpoint import Endpoint
from ..triton.parity import TF32, load_reference, looks_like_tf32, verify
from . import options


@options.shares(endpoint=options.endpoint)
def command(
    endpoint: Endpoint,
    reference: Annotated[
        Path | None,
        typer.Option(
            callback=options.existing,
            help="The export's reference.npz.",
            show_default="model_repository/slide_pipeline/<version served>/reference.npz",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the rows as JSON too.", show_default=False)
    ] = None,
) -> None:
    """Compare a running server with the PyTorch float32 reference stored with the export; exit 1 where it
    differs.

    Example: `gigapath-client verify --url triton:8001 --reference reference.npz`
    """
    if report:
        make_folder(report.parent)
    console = Console(highlight=False)
    columns = ("model", "input", "output", "max-abs", "relative", "min cosine", "")
    table = Table(*columns, title="Parity with PyTorch float32")
    rows = []
    with Connection(endpoint) as connection, options.console.status("verifying"):
        contract = read_contract(connection)
        default = Path("model_repository", "slide_pipeline", str(contract.version), "reference.npz")
        stored, gates = load_reference(reference or default, contract)
        for row in verify(connection, stored, gates, contract):
            rows.append(row)
            verdict = "[green]ok" if row.passed else "[red]FAILED"
            numbers = f"{row.max_abs:.1e}", f"{row.max_relative:.1e}", f"{row.min_cosine:.7f}"
            table.add_row(row.model, row.case, row.output, *numbers, verdict)
    console.print(table)
    if report:
        write_text(report, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    failed = sum(not row.passed for row in rows)
    console.print(f"export {contract.export_id}, version {contract.version}: ", end="")
    console.print(f"[red]{failed} of {len(rows)} failed" if failed else f"[green]all {len(rows)} pass")
    if looks_like_tf32(rows, contract):
        console.print(f"[red]{TF32}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)
