"""`client counterfactual`: how a slide's score changes when annotated areas are changed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import shapely
import typer
from rich.console import Console
from rich.table import Table
from shapely.geometry.base import BaseGeometry

from ..attribution.counterfactual import Change, Effect, counterfactual, tiles_inside
from ..attribution.explain import choose_outputs
from ..attribution.methods.model_outputs import Score
from ..attribution.model.cache import open_cache
from ..attribution.model.embedded import read_bank, read_slide, results_folder
from ..attribution.model.masked_slide import MaskedSlide
from ..attribution.model.served import ServedForward
from ..files import check_folder, write_csv
from ..outputs.layout import find_slide
from ..slides.geojson import Frame, frame_doubt, read_annotations
from ..slides.slide import open_slide
from ..triton.connection import Connection
from ..triton.contract import check_same, read_contract
from ..triton.endpoint import Endpoint
from . import options
from .display import say_served, warn, warn_missing, warn_untrained


@options.shares(endpoint=options.endpoint)
def command(
    source: Annotated[
        Path,
        typer.Argument(
            callback=options.existing,
            metavar="H5_OR_FOLDER",
            help="The slide's H5 file (ours, TRIDENT's, CLAM's, STAMP's), or the --out folder of a batch "
            "(with --slide-id).",
            show_default=False,
        ),
    ],
    annotations: Annotated[
        Path,
        typer.Argument(callback=options.existing, help="Areas: GeoJSON from QuPath.", show_default=False),
    ],
    endpoint: Endpoint,
    slide_id: Annotated[str | None, typer.Option(help="The slide, where a folder is given.")] = None,
    area: Annotated[
        list[str] | None, typer.Option(help="Class of areas; may be repeated [default: all areas as one].")
    ] = None,
    change: Annotated[Change, typer.Option(help="What happens to the tiles inside.")] = "remove",
    bank: Annotated[
        Path | None,
        typer.Option(
            callback=options.existing,
            help="H5 file of a benign slide, whose tiles replace them (--change replace).",
        ),
    ] = None,
    n_samples: Annotated[int, typer.Option(min=2, help="Number of draws from the bank.")] = 16,
    score: Annotated[Score, typer.Option(help="The model output that changes.")] = "log_odds",
    slide: Annotated[
        Path | None,
        typer.Option(
            callback=options.existing_slide,
            help="The slide, for formats that QuPath crops to their bounds (MRXS and others).",
        ),
    ] = None,
    mask_frame: options.MaskFrame = "qupath",
    tile_size: options.TileSize = None,
    mpp: options.Mpp = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the table [default: the H5 file's, EXPORT/attribution in a batch's; for another "
            "tool's file out]."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
) -> None:
    """Measure how a slide's score changes when areas are removed, kept alone or replaced by benign tiles.

    A tile belongs to an area that holds its centre. Writes OUT/SLIDE-counterfactual-CHANGE.csv.

    Example: `gigapath-client counterfactual out/S.h5 S.geojson --area tumour --change remove`
    """
    if out:
        check_folder(out)
    with ExitStack() as stack:
        connection = stack.enter_context(Connection(endpoint))
        contract = read_contract(connection, warn_missing)
        say_served(contract)
        stored = find_slide(source, slide_id, contract)
        opened = stack.enter_context(open_slide(slide, mpp)) if slide else None
        embedded = read_slide(stored, tile_size, mpp)
        if opened:
            embedded.check_slide(opened)
        if opened or mask_frame == "qupath":
            embedded = embedded.placed(opened)
        areas = _areas(annotations, area, embedded.bounds_origin or (0, 0), mask_frame)
        all_areas = shapely.union_all([*areas.values()])
        shifted = frame_doubt(annotations, all_areas, opened.bounds, mask_frame) if opened else ""
        regions = {
            name: tiles_inside(each, embedded.coords, embedded.tile_size) for name, each in areas.items()
        }
        folder = out or results_folder(stored, embedded)
        cache = stack.enter_context(open_cache(folder, embedded.slide_id))
        masked_slide = MaskedSlide.from_embedded(
            embedded, ServedForward(connection, contract), contract, cache
        )
        outputs, _ = choose_outputs(masked_slide, contract, None, score)
        replacements, unknown = read_bank(bank, contract) if bank else (None, "")
        doubt = "; ".join(filter(None, (embedded.doubt(contract), unknown, shifted)))
        with options.console.status("scoring changed slides"):
            effects = counterfactual(
                masked_slide,
                outputs,
                regions,
                change=change,
                bank=replacements,
                n_samples=n_samples,
                seed=seed,
            )
        check_same(connection, contract)
    rows = [row for effect in effects for row in _rows(effect, outputs.names)]
    path = folder / f"{embedded.slide_id}-counterfactual-{change}.csv"
    columns = ["area", "change", "tiles", "class", score, "stderr"]
    doubted = [[*row, doubt] for row in rows]
    write_csv(path, [*columns, "embeddings_doubt"] if doubt else columns, doubted if doubt else rows)
    console, table = Console(), Table("area", "tiles", "class", f"change of {score}", "stderr", box=None)
    for name, _, tiles, label, mean, stderr in rows:
        table.add_row(name, tiles, label, f"{float(mean):+.4g}", f"{float(stderr):.2g}" if stderr else "")
    console.print(table)
    warn_untrained(console, contract)
    warn(console, doubt)
    console.print(str(path), highlight=False, soft_wrap=True, markup=False)


def _areas(
    annotations: Path, classes: list[str] | None, origin: tuple[int, int], frame: Frame
) -> dict[str, BaseGeometry]:
    """The areas in level-0 px of each wanted class, or all as one."""
    wanted = {name: frozenset([name]) for name in classes} if classes else {"all areas": None}
    return {
        name: read_annotations(annotations, origin=origin, frame=frame, classes=each)
        for name, each in wanted.items()
    }


def _rows(effect: Effect, classes: tuple[str, ...]) -> list[tuple[str, str, str, str, str, str]]:
    errors = effect.stderr
    return [
        (
            effect.name,
            effect.change,
            str(effect.tiles),
            label,
            repr(float(mean)),
            "" if errors is None else repr(float(errors[column])),
        )
        for column, (label, mean) in enumerate(zip(classes, effect.mean, strict=True))
    ]
