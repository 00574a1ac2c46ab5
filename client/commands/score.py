"""`client score`: one slide."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gigapath_contract.schema import Contract

from ..batch.records import SlideRecord, identify, slide_record, write_record
from ..outputs.hdf5 import Provenance, write_slide
from ..outputs.thumbnail import draw_tiles, write_picture
from ..scoring.embedding import Throughput
from ..scoring.score import ScoredSlide, SlideSource, TilingOptions, score_slide
from ..scoring.timings import StageTimer, bottleneck
from ..triton.connection import Connection
from ..triton.contract import check_same, read_contract
from ..triton.endpoint import Endpoint
from . import options


@options.shares(endpoint=options.endpoint, tiling=options.tiling, throughput=options.throughput)
def command(
    slide: Annotated[Path, typer.Argument(help="A slide in any format OpenSlide reads.", show_default=False)],
    endpoint: Endpoint,
    tiling: TilingOptions,
    throughput: Throughput,
    out: Annotated[Path, typer.Option(help="Folder for the outputs.")] = Path("out"),
    mpp: Annotated[
        float | None, typer.Option(help="Microns per level-0 pixel, where the file doesn't tell.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Tissue: a mask image or QuPath GeoJSON annotations.")
    ] = None,
) -> None:
    """Score one slide: OUT/SLIDE.h5 and OUT/SLIDE-tiles.png.

    Example: `python -m client score CMU-1-Small-Region.svs --out out --url 127.0.0.1:8001`
    """
    console, timer, began = Console(), StageTimer(), time.perf_counter()
    source = SlideSource(slide, slide.stem, mpp, mask)
    h5, png = out / f"{source.slide_id}.h5", out / f"{source.slide_id}-tiles.png"
    with Connection(endpoint, in_flight=throughput.in_flight) as connection, progress_bar(console) as bar:
        contract = read_contract(connection)
        with timer.time("digest"):
            identity = identify(source, contract, tiling)
        task = bar.add_task(slide.name, total=None)
        scored = score_slide(
            source,
            connection,
            contract,
            tiling,
            throughput,
            timer=timer,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        check_same(connection, contract)
    with timer.time("write"):
        write_slide(h5, scored, Provenance(contract, identity.slide_sha256, identity.key))
        write_picture(png, draw_tiles(scored))
    record = slide_record(source, identity, scored, timer, seconds=time.perf_counter() - began)
    write_record(out, record)
    _report(console, scored, contract, record)
    console.print(f"\n{h5}\n{png}", highlight=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """Tiles done, of how many, and how long it will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tiles"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _report(console: Console, scored: ScoredSlide, contract: Contract, record: SlideRecord) -> None:
    """The short table at the end."""
    if not contract.trained:
        console.print(f"[yellow]The weights of the served preset {contract.preset!r} are untrained.")
    if record.reason:
        console.print(f"degraded: {record.reason}", style="yellow", markup=False)
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
