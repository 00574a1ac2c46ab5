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

from ..files import check_folder
from ..outputs.hdf5 import read_features, stored_attributes
from ..outputs.layout import StoredSlide
from ..outputs.patch_tokens import check_patch_tokens, patch_token_bytes, write_patch_tokens
from ..outputs.records import SlideRecord
from ..outputs.store import SingleFile, check_free, note_maps, score_to
from ..scoring.embedding import Throughput
from ..scoring.score import SlideSource, TilingOptions, find_tissue, plan_slide
from ..scoring.timings import bottleneck
from ..slides.slide import open_slide
from ..triton.connection import Connection
from ..triton.contract import read_contract
from ..triton.endpoint import Endpoint
from . import options
from .display import say_served, tile_progress, warn, warn_missing, warn_untrained


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
    patch_tokens: Annotated[
        bool,
        typer.Option(
            "--patch-tokens",
            help="Store every patch's token too, in OUT/patch_tokens/SLIDE.h5: with ViT-g 0.6 MB per tile.",
        ),
    ] = False,
) -> None:
    """Score one slide: OUT/SLIDE.h5 and OUT/SLIDE-tiles.png; with a tile head also its map for each class.

    Example: `gigapath-client score CMU-1-Small-Region.svs --out out --url 127.0.0.1:8001`
    """
    check_folder(out)
    console, outputs, source = Console(), SingleFile(out), SlideSource(slide, slide.stem, mpp, mask)
    check_free(out, source)
    with Connection(endpoint, in_flight=throughput.in_flight) as connection:
        contract = read_contract(connection, warn_missing)
        say_served(contract)
        if patch_tokens:
            check_patch_tokens(contract)
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
        paths = outputs.paths(source.slide_id)
        if patch_tokens:
            paths.append(
                _patch_tokens(
                    paths[0], source, connection, contract, tiling, throughput, fresh=not record.reused
                )
            )
    if contract.tile_head:
        paths += _tile_maps(out, source, contract.tile_head.classes, fresh=not record.reused)
    _report(console, paths[0], contract, record)
    for path in paths:
        console.print(path, highlight=False, soft_wrap=True)


def _patch_tokens(
    h5: Path,
    source: SlideSource,
    connection: Connection,
    contract: Contract,
    tiling: TilingOptions,
    throughput: Throughput,
    *,
    fresh: bool,
) -> Path:
    """The file of patch tokens, written unless it is there and of the stored result."""
    path = h5.parent / "patch_tokens" / h5.name  # not beside it: every h5 file there is a slide's
    if fresh or not path.exists():
        with open_slide(source.path, source.mpp) as slide:
            plan = plan_slide(slide, source.slide_id, find_tissue(slide, source, tiling), contract, tiling)
        size = patch_token_bytes(len(plan), contract)
        options.console.print(f"patch tokens of {len(plan)} tiles: {size / 1e6:.3g} MB in float16")
        with tile_progress(f"{source.path.name}, patch tokens") as progress:
            write_patch_tokens(
                path, plan, connection, contract, throughput, stored_attributes(h5), progress=progress
            )
        note_maps(StoredSlide.in_one_file(h5), source.slide_id, [path])
    return path


def _tile_maps(out: Path, source: SlideSource, classes: tuple[str, ...], *, fresh: bool) -> list[Path]:
    """The maps of the tile head, written unless they are there and of the stored result."""
    # matplotlib takes long to import: not for exports without a tile head, nor other commands.
    from ..attribution.render.tile_head import tile_map_path, write_tile_maps

    paths = [tile_map_path(out, source.slide_id, name) for name in classes]
    if fresh or not all(path.exists() for path in paths):
        h5 = out / f"{source.slide_id}.h5"
        with open_slide(source.path, source.mpp) as slide:
            write_tile_maps(out, source.slide_id, read_features(h5), slide)
        note_maps(StoredSlide.in_one_file(h5), source.slide_id, paths)
    return paths


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
    for name, stage in record.stages.items():
        table.add_row(f"  {name}", f"{stage['seconds']:.2f}")
    console.print(table)
    console.print(bottleneck(record.stages))
