"""`client score`: one slide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gigapath_contract.schema import Contract

from ..files import check_folder
from ..outputs.records import SlideRecord
from ..outputs.store import SingleFile, check_free, score_to
from ..scoring.embedding import Throughput
from ..scoring.score import ScoredSlide, SlideSource, TilingOptions
from ..scoring.timings import bottleneck
from ..triton.connection import Connection
from ..triton.contract import read_contract
from ..triton.endpoint import Endpoint
from . import options
from .display import tile_progress, warn, warn_missing, warn_untrained


@options.shares(endpoint=options.endpoint, tiling=options.tiling, throughput=options.throughput)
def command(
    slide: Annotated[Path, typer.Argument(help="A slide in any format OpenSlide reads.", show_default=False)],
    endpoint: Endpoint,
    tiling: TilingOptions,
    throughput: Throughput,
    out: Annotated[Path, typer.Option(help="Folder for the outputs.")] = Path("out"),
    mpp: Annotated[
        float | None, typer.Option(help="Microns per level-0 pixel, if the file has none.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Tissue: a mask image or QuPath GeoJSON annotations.")
    ] = None,
) -> None:
    """Score one slide: OUT/SLIDE.h5 and OUT/SLIDE-tiles.png.

    Example: `python -m client score CMU-1-Small-Region.svs --out out --url 127.0.0.1:8001`
    """
    check_folder(out)
    console, outputs, source = Console(), SingleFile(out), SlideSource(slide, slide.stem, mpp, mask)
    check_free(out, source)
    with Connection(endpoint, in_flight=throughput.in_flight) as connection:
        contract = read_contract(connection, warn_missing)
        with tile_progress(slide.name) as progress:
            record, scored = score_to(
                outputs,
                source,
                connection,
                contract,
                tiling,
                throughput,
                overwrite=True,
                progress=progress,
            )
    assert scored is not None  # with overwrite
    _report(console, scored, contract, record)
    for path in outputs.paths(source.slide_id):
        console.print(path, highlight=False, soft_wrap=True)


def _report(console: Console, scored: ScoredSlide, contract: Contract, record: SlideRecord) -> None:
    """The short table at the end."""
    warn_untrained(console, contract)
    if record.reason:
        console.print(f"degraded: {record.reason}", style="yellow", markup=False)
    for note in record.notes:
        warn(console, note)
    plan = scored.plan
    table = Table(show_header=False, box=None)
    table.add_row("tiles", f"{len(plan)} of {plan.tile_px} px at {plan.mpp_effective[0]:.4g} mpp")
    table.add_row("mpp", f"{plan.mpp_level0[0]:.4g} x {plan.mpp_level0[1]:.4g} ({plan.mpp_source})")
    if contract.head and scored.logits is not None:
        for name, score in zip(
            contract.head.classes, contract.head.probabilities(scored.logits), strict=True
        ):
            table.add_row(name, f"{score:.4f}")
    table.add_row("seconds", f"{record.seconds:.2f}")
    for name, stage in record.stages.items():
        table.add_row(f"  {name}", f"{stage['seconds']:.2f}")
    console.print(table)
    console.print(bottleneck(record.stages))
