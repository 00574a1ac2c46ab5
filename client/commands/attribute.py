"""`client attribute`: which tiles drive a slide's score."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..attribution.attribute import Group, Method, OccluderName, Settings
from ..attribution.look_groups import MOST_GROUPS
from ..attribution.methods.model_outputs import Score
from ..attribution.model.embedded import read_bank
from ..attribution.render.summary import SummaryRow, read_summary, write_sheet, write_summary
from ..attribution.tile import Fill, TileScore
from ..batch.manifest import read_work_list
from ..errors import Cancelled, ClientError, ExportChanged, OutputError, ServerUnavailable
from ..files import check_folder
from ..outputs.hdf5 import is_ours
from ..outputs.layout import Layout, find_features
from ..outputs.records import FAILED, read_record
from ..scoring.embedding import Throughput
from ..scoring.score import TilingOptions
from ..slides.address import RemotePath, slide_path
from ..triton.connection import Connection
from ..triton.contract import read_contract
from ..triton.endpoint import Endpoint
from . import options
from .attribute_slide import Request, TileMaps, attribute_slide, is_image
from .display import say_next, say_served, warn, warn_missing, warn_untrained

_method, _inside = (
    functools.partial(typer.Option, rich_help_panel=panel)
    for panel in ("Method", "Inside tiles (needs the slide)")
)


def method_settings(
    method: Annotated[
        Method,
        _method(
            help="Attribution method: Owen values (partition_shap), what the score needs (occlusion), each "
            "tile alone (keep_one), Shapley values of at most 300 tiles or groups, with standard errors "
            "(shapley_regression)."
        ),
    ] = "partition_shap",
    occluder: Annotated[
        OccluderName,
        _method(help="How occluded tiles are replaced: masked in place, mean or medoid embedding."),
    ] = "in_place",
    group: Annotated[
        Group,
        _method(help="Group tiles by look (embedding) or by place; auto: as explains the score better."),
    ] = "auto",
    max_evals: Annotated[
        int, _method(min=2, help="Largest number of masks for partition_shap and shapley_regression.")
    ] = 512,
    region: Annotated[int, _method(min=1, help="Side of occlusion's windows, in tiles.")] = 4,
    stride: Annotated[int, _method(min=1, help="Step of occlusion's windows, in tiles.")] = 2,
    seed: Annotated[int, _method(min=0, help="Random seed.")] = 0,
) -> Settings:
    """Build the Settings from the command line."""
    return Settings(
        method=method,
        occluder=occluder,
        sliding_window_shapes=region,
        strides=stride,
        group=group,
        max_evals=max_evals,
        seed=seed,
    )


def tile_map_options(
    tile_maps: Annotated[int, _inside(min=0, help="Map this many of the strongest tiles.")] = 0,
    tile_score: Annotated[
        TileScore,
        _inside(help="Explain the slide's score with the tile in its place, or the tile's embedding."),
    ] = "slide",
    fill: Annotated[Fill, _inside(help="Fill used to occlude patches within a tile.")] = "blur",
) -> TileMaps:
    """Build the TileMaps from the command line."""
    return TileMaps(tile_maps, tile_score, fill)


@options.shares(
    settings=method_settings,
    maps=tile_map_options,
    endpoint=options.endpoint,
    tiling=options.tiling,
    throughput=options.throughput,
)
def command(
    source: Annotated[
        Path,
        typer.Argument(
            callback=options.existing_slide,
            metavar="SLIDE_OR_H5_OR_FOLDER",
            help="A slide, its H5 file (ours, TRIDENT's, CLAM's, STAMP's), or the --out folder of a batch "
            "(with --slide-id).",
            show_default=False,
        ),
    ],
    settings: Settings,
    maps: TileMaps,
    endpoint: Endpoint,
    tiling: TilingOptions,
    throughput: Throughput,
    bank: Annotated[
        Path | None,
        _method(
            callback=options.existing,
            help="H5 of benign tiles to draw replacements from, instead of --occluder.",
        ),
    ] = None,
    slide_id: Annotated[str | None, typer.Option(help="The slide, where a folder is given.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the outputs [default: the H5 file's; in a batch EXPORT/attribution; for a slide "
            "or another tool's file out]."
        ),
    ] = None,
    slide: Annotated[
        Path | None,
        typer.Option(
            callback=options.existing_slide,
            help="Slide image to draw the map on; its tiles are not re-encoded.",
        ),
    ] = None,
    tile_size: options.TileSize = None,
    mpp: options.Mpp = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Class to explain; may be repeated [default: the predicted one].")
    ] = None,
    score: Annotated[Score, typer.Option(help="The model output to explain.")] = "log_odds",
    limit: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=options.finite,
            help="Fix the colour scale at +-LIMIT so that maps are comparable.",
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(callback=options.existing, help="Areas to outline on the maps: GeoJSON from QuPath."),
    ] = None,
    look_groups: Annotated[
        int,
        typer.Option(min=0, max=MOST_GROUPS, help="Value this many groups of tiles that look alike, too."),
    ] = 0,
    checks: Annotated[bool, typer.Option(help="Measure the reliability of the map.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace attributions of another export in the H5 file.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Every slide of a batch's folder.")] = False,
    manifest: Annotated[
        Path | None,
        typer.Option(
            callback=options.existing, help="The slides of a manifest or a folder of slides, as for batch."
        ),
    ] = None,
    wsi_dir: options.WsiDir = None,
) -> None:
    """Show which tiles drive a slide's score: a map, tiles for QuPath, arrays in the H5 file.

    Other tools' files are not changed: the arrays go to OUT/attribution/SLIDE.h5.

    Mask scores are stored in OUT/SLIDE-masks.sqlite, from which an interrupted run resumes. With many slides,
    attributions.csv lists what the maps say and attributions.pdf shows them; slides that are in it are passed
    over when the command runs again. `gigapath-client -v attribute …` prints every figure and file.

    Examples:

    `gigapath-client attribute out/CMU-1-Small-Region.h5 --slide CMU-1-Small-Region.svs`

    `gigapath-client attribute out --slide-id CMU-1-Small-Region` after `gigapath-client batch`

    `gigapath-client attribute out --all` for every slide of a batch
    """
    check_folder(out or Path("out"))
    with Connection(endpoint, in_flight=throughput.in_flight) as connection:
        contract = read_contract(connection, warn_missing)
        say_served(contract)
        warn_untrained(options.console, contract)
        if bank:
            replacements, unknown = read_bank(bank, contract)
            settings = replace(settings, occluder=replacements)
            warn(Console(), unknown)
        request = Request(
            settings=settings,
            maps=maps,
            score=score,
            targets=tuple(target or ()),
            limit=limit,
            look_groups=look_groups,
            checks=checks,
            annotations=annotations,
            tiling=tiling,
            throughput=throughput,
            tile_size=tile_size,
            mpp=mpp,
            out=out,
            overwrite=overwrite,
        )
        attribute_one = functools.partial(attribute_slide, request, connection, contract)
        if not (every or manifest):
            attribute_one(source, slide_id, slide)
            foreign = not (is_image(source) or is_ours(find_features(source, slide_id, contract)))
            say_next("view", _viewed(source, out, foreign), endpoint=endpoint)
            return
        if slide_id or slide or not source.is_dir():
            raise ClientError(
                "--all and --manifest take a batch's folder, and neither --slide-id nor --slide"
            )
        layout = Layout(source, contract)
        slides: dict[str, Path | None]
        if manifest:
            slides = {work.slide_id: work.path for work in read_work_list(manifest, wsi_dir).slides}
        else:
            ids = sorted(path.stem for path in layout.slide_features("any").parent.glob("*.h5"))
            slides = {name: _recorded(layout, name, wsi_dir) for name in ids}
        folder = out or layout.attribution
        failed = _attribute_many(
            slides, layout, folder, request.decides(), functools.partial(attribute_one, source)
        )
    say_next("view", source, endpoint=endpoint)
    if failed:
        raise typer.Exit(1)


def _viewed(source: Path, out: Path | None, foreign: bool = False) -> Path:
    """The folder in which `view` finds a slide that was attributed; `foreign`: from another tool's file."""
    if foreign:
        return out or Path("out")
    if source.is_dir():
        return source
    if source.parent.name.startswith(("features_", "slide_features_")):  # of a batch
        return source.absolute().parents[2]
    return out or (source.parent if source.suffix == ".h5" else Path("out"))


def _recorded(layout: Layout, slide_id: str, wsi_dir: Path | None) -> Path | None:
    """Where a slide's file is: in `wsi_dir`, or where it was scored; None where it is no more."""
    record = read_record(layout.export, slide_id)
    if record is None:
        return None
    path = slide_path(record.path)
    places = (wsi_dir or path.parent) / path.name, path
    return next((place for place in places if isinstance(place, RemotePath) or place.exists()), None)


def _attribute_many(
    slides: dict[str, Path | None],
    layout: Layout,
    folder: Path,
    decides: tuple[object, ...],
    one: Callable[[str, Path | None, str, str], list[SummaryRow]],
) -> int:
    """Attribute slides one after the other, with table and sheet; returns how many failed."""
    done: dict[str, list[SummaryRow]] = {}
    for row in read_summary(folder):
        done.setdefault(row.slide_id, []).append(row)
    failed = 0
    for number, (name, path) in enumerate(slides.items(), 1):
        record = read_record(layout.export, name)
        key = hashlib.sha256(repr((record and record.result_key, path, decides)).encode()).hexdigest()[:16]
        earlier = done.get(name, [])
        if earlier and all(row.key == key and (folder / row.map).exists() for row in earlier):
            options.console.print(f"{number}/{len(slides)} {name}: was done", markup=False, highlight=False)
            continue
        try:
            done[name] = one(name, path, key, f"{number}/{len(slides)} ")
        except (ServerUnavailable, ExportChanged, OutputError, Cancelled):
            raise  # of no use to try the next
        except ClientError as error:
            failed += 1
            done[name] = [SummaryRow(name, FAILED, warnings=str(error))]
            warn(options.console, f"{name}: {error}")
        write_summary(folder, [row for rows in done.values() for row in rows])
    rows = [row for rows in done.values() for row in rows]
    for written in (write_summary(folder, rows), write_sheet(folder, rows)):
        typer.echo(written)
    return failed
