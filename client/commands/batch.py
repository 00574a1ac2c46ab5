"""`client batch`: score a folder or a manifest of slides."""

from __future__ import annotations

import collections
import functools
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from ..batch.job import BatchJob
from ..batch.manifest import read_work_list
from ..batch.pools import LocalPool, Pool, RayPool
from ..batch.run import exclusive_output, run_batch
from ..batch.tile_extras import PATCH_TOKENS, TILE_HEAD_MAPS, check_tile_extras
from ..errors import ClientError
from ..files import check_folder
from ..outputs.formats import check_dependencies
from ..outputs.layout import Layout, stored_layouts
from ..outputs.records import FAILED
from ..scoring.embedding import Throughput
from ..scoring.score import TilingOptions
from ..scoring.timings import WORTH_ADVICE_S, bottleneck, total
from ..triton.connection import Connection
from ..triton.contract import read_contract
from ..triton.endpoint import Endpoint
from . import options
from .display import BatchView, say_next, say_served, warn_missing, warn_untrained


@options.shares(
    endpoint=functools.partial(options.endpoint, retry_for=300.0),
    tiling=options.tiling,
    throughput=options.throughput,
)
def command(
    source: Annotated[
        Path,
        typer.Argument(
            callback=options.existing_slide,
            help="A folder of slides, or a CSV or TSV that lists them.",
            show_default=False,
        ),
    ],
    endpoint: Endpoint,
    tiling: TilingOptions,
    throughput: Throughput,
    out: Annotated[Path, typer.Option(help="Folder for the outputs; run again to resume.")] = Path("out"),
    wsi_dir: options.WsiDir = None,
    layout: Annotated[
        str, typer.Option(help="`trident`, or `clam` for CLAM's files in addition.")
    ] = "trident",
    pt: Annotated[bool, typer.Option("--pt", help="Write embeddings as .pt too (needs PyTorch).")] = False,
    geojson: Annotated[
        bool, typer.Option("--geojson", help="Write tiles as GeoJSON for QuPath too.")
    ] = False,
    patch_tokens: options.PatchTokens = False,
    tile_head_maps: Annotated[
        bool, typer.Option("--tile-head-maps", help="Draw what a tile head says of every tile.")
    ] = False,
    slides: Annotated[
        int | None,
        typer.Option(min=1, help="Slides at a time [default: 8; on Ray as many as its cores allow]."),
    ] = None,
    wait_for: Annotated[
        float,
        typer.Option(
            min=0,
            callback=options.finite,
            help="Seconds to wait for lost servers or a full disk; then slides fail.",
        ),
    ] = 8 * 3600.0,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: auto, host:port or local."),
    ] = None,
) -> None:
    """Score many slides into TRIDENT's layout, with status.csv and scores.csv. Run it again to resume.

    Example: `gigapath-client batch cohort.csv --wsi-dir slides/ --out results/`

    Columns: slide_id (or sample_id, image_id, wsi …) and/or path; mpp and mask_path where needed. Every other
    column is copied into the scores. The exit code is 1 where a slide failed; the others are finished.
    """
    if layout not in ("trident", "clam"):
        raise ClientError(f"--layout {layout} is not known: trident or clam")
    wanted = {
        "clam": layout == "clam",
        "pt": pt,
        "geojson": geojson,
        PATCH_TOKENS: patch_tokens,
        TILE_HEAD_MAPS: tile_head_maps,
    }
    kinds = frozenset(kind for kind, on in wanted.items() if on)
    check_dependencies(kinds)
    work_list = read_work_list(source, wsi_dir)
    check_folder(out)
    with Connection(endpoint) as connection:
        contract = read_contract(connection, warn_missing)
    say_served(contract)
    check_tile_extras(kinds, contract)
    console = options.console
    warn_untrained(console, contract)
    if omission := work_list.omission():
        console.print(f"left out: {omission}", markup=False, highlight=False, soft_wrap=True)
    job = BatchJob(out.resolve(), endpoint, contract, tiling, throughput, kinds)
    shown = Layout(out, contract)
    if others := [stored.export.name for stored in stored_layouts(out) if stored.export != shown.export]:
        console.print(
            f"{out} holds results of {', '.join(others)} too; this run leaves them and writes to "
            f"{shown.export.name}",
            markup=False,
            highlight=False,
        )
    began = time.monotonic()
    with exclusive_output(out), BatchView(console, work_list.slides) as view:
        pool: Pool = RayPool(job, slides, ray) if ray else LocalPool(job, slides or 8, view.progress_for)
        try:
            records = run_batch(work_list, job, pool, view, wait_for=wait_for)
        except KeyboardInterrupt:
            console.print(f"interrupted; the same command resumes ({shown.status})")
            raise
    counts = collections.Counter(record.status for record in records)
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()), highlight=False)
    measured = total([record.stages for record in records if not record.reused])
    if advice := bottleneck(measured, time.monotonic() - began, at_least=WORTH_ADVICE_S):
        console.print(advice, soft_wrap=True)
    typer.echo(shown.status)
    if contract.head is not None:
        typer.echo(shown.scores)
        if any(work_list.columns.values()) and not shown.patients.exists():
            typer.echo("no patients.csv: no column has a name of patients (pat_id, case_id, patient …)")
    if counts[FAILED] < len(records):
        if contract.head is not None:
            say_next("attribute", out, "--all", endpoint=endpoint)
        labels = source if source.is_file() else "LABELS.csv"
        train = ("python", "-m", "training", "init-recipe", str(labels), "--features", str(out))
        typer.echo(f"to train on them, in a checkout: {shlex.join(train)}")
    if counts[FAILED]:
        raise typer.Exit(1)
