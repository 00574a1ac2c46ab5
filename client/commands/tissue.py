"""`client tissue`: where the tissue of a cohort is, before anything is sent to a server."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Annotated

import typer

from ..batch.manifest import read_work_list
from ..batch.tissue import TissueRow, find_cohort_tissue, write_manifest
from ..files import check_folder
from ..outputs.records import FAILED
from ..scoring.score import TilingOptions
from . import options
from .display import say_next


def command(
    source: Annotated[
        Path,
        typer.Argument(
            callback=options.existing_slide,
            help="A slide, a folder or a manifest, as for batch.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the outputs.")] = Path("tissue"),
    wsi_dir: options.WsiDir = None,
    min_tissue: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of a tile that must be tissue, for the count.")
    ] = 0.1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Find the tissue again where outlines exist.")
    ] = False,
) -> None:
    """Find every slide's tissue: outlines, masks, thumbnails, and tissue.csv, a manifest for batch.

    Needs no server. Correct OUT/tissue_geojson/SLIDE.geojson in QuPath (draw, export, replace the file), or
    name a mask image in the column mask_path; then run `batch OUT/tissue.csv`. Outlines that exist are kept.

    Example: `gigapath-client tissue slides/ --out tissue`
    """
    work_list = read_work_list(source, wsi_dir)
    check_folder(out)
    rows = [
        TissueRow(bad.slide_id, bad.path, tissue_status=FAILED, notes=bad.reason) for bad in work_list.bad
    ]
    for row in rows:
        typer.echo(f"{row.tissue_status:8} {row.slide_id}  {row.notes}")
    for row in find_cohort_tissue(
        work_list.slides, out, TilingOptions(min_tissue=min_tissue), overwrite=overwrite
    ):
        rows.append(row)
        found = f"{float(row.tissue):.0%} tissue, {row.tiles} tiles" if row.tissue else ""
        typer.echo(f"{row.tissue_status:8} {row.slide_id}  {'; '.join(filter(None, [found, row.notes]))}")
    counts = collections.Counter(row.tissue_status for row in rows)
    manifest = write_manifest(out, rows, work_list.columns)
    typer.echo(", ".join(f"{count} {status}" for status, count in counts.items()))
    typer.echo(manifest)
    if counts[FAILED] < len(rows):
        typer.echo(f"look at {out}/thumbnails")
        say_next("batch", manifest, "--out", out.parent / "results")
    if counts[FAILED]:
        raise typer.Exit(1)
