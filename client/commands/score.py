"""`client score`: one slide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from gigapath_contract.schema import Contract

from ..batch.tile_extras import PATCH_TOKENS, TILE_HEAD_MAPS, check_tile_extras, write_tile_extras
from ..files import check_folder
from ..outputs.patch_tokens import patch_token_bytes
from ..outputs.records import SlideRecord
from ..outputs.store import SingleFile, check_free, score_to
from ..scoring.embedding import Throughput
from ..scoring.score import SlideSource, TilingOptions
from ..scoring.timings import WORTH_ADVICE_S, bottleneck
from ..triton.connection import Connection
from ..triton.contract import read_contract
from ..triton.endpoint import Endpoint
from . import options
from .display import say_next, say_served, tile_progress, warn, warn_missing, warn_untrained


@options.shares(endpoint=options.endpoint, tiling=options.tiling, throughput=options.throughput)
def command(
    slide: Annotated[
        Path,
        typer.Argument(
            callback=options.existing_slide,
            help="A slide in any format OpenSlide reads, or its https:// or s3:// address.",
            show_default=False,
        ),
    ],
    endpoint: Endpoint,
    tiling: TilingOptions,
    throughput: Throughput,
    out: Annotated[Path, typer.Option(help="Folder for the outputs.")] = Path("out"),
    mpp: Annotated[
        float | None,
        typer.Option(callback=options.finite, help="Microns per level-0 pixel, if the file has none."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(callback=options.existing, help="Tissue: a mask image or QuPath GeoJSON annotations."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Score again, also over another export's result.")
    ] = False,
    patch_tokens: options.PatchTokens = False,
) -> None:
    """Score one slide: OUT/SLIDE.h5 and OUT/SLIDE-tiles.png; with a tile head also its map for each class.

    Example: `gigapath-client score CMU-1-Small-Region.svs --out out --url 127.0.0.1:8001`
    """
    check_folder(out)
    console, outputs, source = Console(), SingleFile(out), SlideSource(slide, mpp=mpp, mask=mask)
    check_free(out, source)
    with Connection(endpoint, in_flight=throughput.in_flight) as connection:
        contract = read_contract(connection, warn_missing)
        say_served(contract)
        kinds = frozenset([PATCH_TOKENS] if patch_tokens else [])
        check_tile_extras(kinds, contract)
        kinds |= {TILE_HEAD_MAPS} if contract.tile_head else set()
        with tile_progress(slide.name) as progress:
            record, _ = score_to(
                outputs,
                source,
                connection,
                contract,
                tiling,
                throughput,
                overwrite=overwrite,
                progress=progress,
            )
        if patch_tokens:
            size = patch_token_bytes(record.tiles, contract)
            options.console.print(f"patch tokens of {record.tiles} tiles: {size / 1e6:.3g} MB in float16")
        with tile_progress(f"{slide.name}, patch tokens") as progress:
            extras = write_tile_extras(
                kinds, outputs, source, connection, contract, tiling, throughput, progress=progress
            )
    paths = [*outputs.paths(source.slide_id), *extras]
    _report(console, paths[0], contract, record)
    for path in paths:
        console.print(path, highlight=False, soft_wrap=True)
    if contract.head:
        say_next("attribute", paths[0], "--slide", slide, endpoint=endpoint)


def _report(console: Console, h5: Path, contract: Contract, record: SlideRecord) -> None:
    """The short table at the end."""
    warn_untrained(console, contract)
    if record.reused:
        console.print("was done, with the same export and options: --overwrite scores it again")
    if record.reason:
        console.print(f"degraded: {record.reason}", style="yellow", markup=False)
    for note in record.notes:
        warn(console, note)
    with h5py.File(h5) as file:
        tile_px, about = file["coords"].attrs["patch_size"], dict(file["features"].attrs)
        scores = file["scores"][:] if contract.head else np.empty(0)
    mpp, effective = [about["mpp_level0_x"], about["mpp_level0_y"]], about["mpp_effective"][0]
    table = Table(show_header=False, box=None)
    table.add_row("tiles", f"{record.tiles} of {tile_px} px at {effective:.4g} mpp")
    table.add_row("mpp", f"{mpp[0]:.4g} x {mpp[1]:.4g} ({about['mpp_source']})")
    for name, score in zip(contract.head.classes if contract.head else (), scores, strict=False):
        table.add_row(name, f"{score:.4f}")
    table.add_row("seconds", f"{record.seconds:.2f}")
    console.print(table)
    if advice := bottleneck(record.stages, record.seconds, at_least=WORTH_ADVICE_S):
        console.print(advice, soft_wrap=True)
