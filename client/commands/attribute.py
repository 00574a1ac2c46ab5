"""`client attribute`: which tiles drive a slide's score."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import h5py
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..attribution.attribute import Method, OccluderName, Settings
from ..attribution.explain import ExplainProgress, Explanation, explain
from ..attribution.methods.model_outputs import Score
from ..attribution.model.cache import ScoreCache
from ..attribution.model.embedded import read_bank, read_embedded
from ..attribution.model.served import ServedForward, served_tile_encoder
from ..attribution.tile import Encode, Fill
from ..files import make_folder
from ..outputs.layout import file_stem, find_features
from ..outputs.store import SingleFile, score_to
from ..scoring.embedding import Throughput
from ..scoring.score import SlideSource, TilingOptions
from ..slides.slide import Slide, open_slide
from ..triton.connection import Connection
from ..triton.contract import check_same, read_contract
from ..triton.endpoint import Endpoint
from . import options
from .view import tile_progress

TileScore = Literal["slide", "embedding"]


@options.shares(endpoint=options.endpoint, tiling=options.tiling, throughput=options.throughput)
def command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SLIDE_OR_H5_OR_FOLDER",
            help="A slide, its H5 file, or the --out folder of a batch (with --slide-id).",
            show_default=False,
        ),
    ],
    endpoint: Endpoint,
    tiling: TilingOptions,
    throughput: Throughput,
    slide_id: Annotated[str | None, typer.Option(help="The slide, where a folder is given.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the outputs [default: that of SOURCE, for a slide out].")
    ] = None,
    slide: Annotated[
        Path | None, typer.Option(help="The slide of an H5, to draw on; no tile of it is encoded.")
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="Microns per level-0 pixel, where the slide doesn't tell.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Class to explain; may be repeated [default: the predicted one].")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="Which question: see docs/attribution.md.")
    ] = "partition_shap",
    score: Annotated[Score, typer.Option(help="The number that is explained.")] = "log_odds",
    occluder: Annotated[OccluderName, typer.Option(help="What a left-out tile becomes.")] = "in_place",
    bank: Annotated[
        Path | None, typer.Option(help="H5 of benign tiles to draw replacements from, instead of --occluder.")
    ] = None,
    max_evals: Annotated[int, typer.Option(min=2, help="Masks that partition_shap may score.")] = 512,
    n_samples: Annotated[int, typer.Option(min=2, help="Pairs of orders of shapley_sampling.")] = 16,
    region: Annotated[int, typer.Option(min=1, help="Side of occlusion's windows, in tiles.")] = 4,
    stride: Annotated[int, typer.Option(min=1, help="Step of occlusion's windows, in tiles.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="For what is sampled.")] = 0,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Fix the colours' limit, to compare slides.")
    ] = None,
    checks: Annotated[bool, typer.Option(help="Measure how far the map can be trusted.")] = True,
    tile_maps: Annotated[
        int, typer.Option(min=0, help="Look inside this many of the strongest tiles (needs the slide).")
    ] = 0,
    tile_score: Annotated[
        TileScore,
        typer.Option(
            help="Inside a tile: the slide's score with the tile put back, or the tile's embedding."
        ),
    ] = "slide",
    fill: Annotated[Fill, typer.Option(help="What covers a patch inside a tile.")] = "blur",
) -> None:
    """Show which tiles drive a slide's score: a map, tiles for QuPath, arrays in the H5 file.

    Every scored mask is kept in OUT/SLIDE-masks.sqlite: started again, an interrupted run goes on there.

    Examples:

    `python -m client attribute out/CMU-1-Small-Region.h5 --slide CMU-1-Small-Region.svs`

    `python -m client attribute out --slide-id CMU-1-Small-Region` after `python -m client batch`
    """
    settings = Settings(
        method=method,
        occluder=read_bank(bank) if bank else occluder,
        sliding_window_shapes=region,
        strides=stride,
        max_evals=max_evals,
        n_samples=n_samples,
        seed=seed,
    )
    with ExitStack() as stack:
        connection = stack.enter_context(Connection(endpoint, in_flight=throughput.in_flight))
        contract = read_contract(connection)
        stored = source.is_dir() or h5py.is_hdf5(source)
        slide = slide if stored else source
        opened = stack.enter_context(open_slide(slide, mpp)) if slide else None
        if stored:
            h5 = find_features(source, slide_id)
            folder = out or (source if source.is_dir() else h5.parent)
        else:
            folder = out or Path("out")
            outputs = SingleFile(folder)
            h5 = outputs.paths(source.stem)[0]
            with tile_progress(source.name) as progress:
                to_score = SlideSource(source, source.stem, mpp)
                score_to(outputs, to_score, connection, contract, tiling, throughput, progress=progress)
        embedded = read_embedded(h5)
        forward = ServedForward(connection, contract)
        make_folder(folder)
        cache = stack.enter_context(ScoreCache(folder / f"{embedded.slide_id}-masks.sqlite"))
        targets: list[str | None] = [*target] if target else [None]
        for name in targets:
            with ForwardBar() as bar:
                explanation = explain(
                    embedded,
                    forward,
                    contract,
                    settings,
                    target=name,
                    score=score,
                    checks=checks,
                    cache=cache,
                    progress=bar.show,
                )
            check_same(connection, contract)
            written = _write(explanation, h5, folder, opened, limit)
            if opened:
                encode = served_tile_encoder(connection, contract)
                written += _tile_maps(explanation, folder, opened, encode, tile_maps, tile_score, fill)
            _report(explanation, forward, written)


class ForwardBar(Progress):
    """Masks done, of how many, and the time left from the measured cost of a forward."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("masks {task.fields[left]}"),
            console=options.console,
            transient=True,
        )
        self._task = self.add_task("first forward", total=None, left="")

    def show(self, progress: ExplainProgress) -> None:
        """Draw where an explanation stands."""
        left = ""
        if progress.seconds_left is not None and progress.seconds_per_forward is not None:
            minutes, seconds = divmod(round(progress.seconds_left), 60)
            left = f"at {progress.seconds_per_forward * 1000:.3g} ms, {minutes}:{seconds:02} left"
        self.update(
            self._task,
            description=progress.stage,
            completed=progress.done,
            total=progress.planned,
            left=left,
        )


def _write(
    explanation: Explanation, h5: Path, folder: Path, slide: Slide | None, limit: float | None
) -> list[Path]:
    # matplotlib takes longer to import than everything else: not for `--help` and the other commands.
    from ..attribution.render.figures import canvas_for, write_map, write_strongest
    from ..attribution.render.outputs import PLAIN_GEOJSON_TILES, write_arrays, write_geojson

    stem = _stem(explanation)
    suffix = ".geojson" if len(explanation.slide.coords) <= PLAIN_GEOJSON_TILES else ".geojson.gz"
    picture, tiles, sheet = (folder / f"{stem}{end}" for end in (".png", suffix, "-strongest.png"))
    write_arrays(h5, explanation)
    write_map(picture, explanation, canvas_for(explanation, slide), limit)
    write_geojson(tiles, explanation, slide.bounds[:2] if slide else (0, 0))
    if slide is None:
        return [h5, picture, tiles]
    write_strongest(sheet, explanation, slide)
    return [h5, picture, tiles, sheet]


def _tile_maps(
    explanation: Explanation,
    folder: Path,
    slide: Slide,
    encode: Encode,
    count: int,
    score: TileScore,
    fill: Fill,
) -> list[Path]:
    """Look inside the `count` tiles of the largest absolute value."""
    from ..attribution.render.figures import write_tile_map

    values = explanation.attribution.values[:, explanation.target_index]
    written = []
    for tile in np.argsort(-np.abs(values), kind="stable")[:count].tolist():
        x, y = explanation.slide.coords[tile].tolist()
        path = folder / f"{_stem(explanation)}-tile-{x}-{y}.png"
        with options.console.status(f"inside the tile at ({x}, {y})"):
            write_tile_map(path, explanation, slide, tile, encode, of_slide=score == "slide", fill=fill)
        written.append(path)
    return written


def _stem(explanation: Explanation) -> str:
    target = file_stem(explanation.target_class)
    return f"{explanation.slide.slide_id}-{explanation.attribution.method}-{target}"


def _report(explanation: Explanation, forward: ServedForward, written: list[Path]) -> None:
    """The short table at the end."""
    console, result, trust = Console(), explanation.attribution, explanation.reliability
    target_index = explanation.target_index
    if not explanation.contract.trained:
        console.print(
            f"[yellow]The weights of the served preset {explanation.contract.preset!r} are untrained."
        )
    table = Table(show_header=False, box=None)
    table.add_row("explained", f"{explanation.score} of {explanation.target_class}, {result.method}")
    table.add_row("full slide", f"{result.full[target_index]:+.4g}")
    table.add_row("empty slide", f"{result.base[target_index]:+.4g}")
    if result.additive:
        table.add_row("completeness gap", f"{result.completeness_gap[target_index]:.1e}")
    if trust is not None:
        table.add_row("SRG", f"{trust.curves.srg:+.4g}, random up to {max(map(abs, trust.random_srg)):.4g}")
        table.add_row(
            "positional noise", f"slide {trust.position_sensitivity:.2g}, tile {trust.noise_floor:.2g}"
        )
        table.add_row(f"agreement with {trust.other_occluder}", f"{trust.agreement:+.2f}")
        table.add_row("redundancy", f"{trust.redundancy:.2f}")
    cost, dropped = explanation.masked_slide.cost, explanation.masked_slide.dropped_cost
    rate = f"{1000 * cost.per_forward:.3g} ms each" if cost.per_forward else "all kept"
    alone = f", {dropped.forwards} of one tile" if dropped.forwards else ""
    table.add_row("forwards", f"{cost.forwards}, {rate}{alone}, {forward.bytes_sent / 1e6:.1f} MB sent")
    console.print(table)
    for warning in trust.warnings() if trust else []:
        console.print(
            f"this map {warning}" if warning.startswith("does") else warning, style="yellow", markup=False
        )
    for path in written:
        console.print(str(path), highlight=False, soft_wrap=True, markup=False)
