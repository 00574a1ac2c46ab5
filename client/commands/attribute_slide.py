"""Attribute one slide: find or score it, explain the classes that are asked for, write and print it."""

from __future__ import annotations

import hashlib
import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
from rich.console import Console
from shapely.geometry.base import BaseGeometry

from gigapath_contract.schema import Contract

from ..attribution.attribute import Settings
from ..attribution.explain import Explanation, explain
from ..attribution.methods.model_outputs import Score
from ..attribution.model.cache import ScoreCache, open_cache
from ..attribution.model.embedded import EmbeddedSlide, own_copy, read_slide, results_folder
from ..attribution.model.other_slides import level_elsewhere
from ..attribution.model.served import ServedForward, served_tile_encoder
from ..attribution.render.evidence import evidence_lines
from ..attribution.render.outputs import check_attributions
from ..attribution.render.summary import SummaryRow, summary_row
from ..attribution.tile import Fill, TileScore
from ..outputs.layout import TENSOR_SUFFIXES, StoredSlide, find_slide
from ..outputs.store import SingleFile, check_free, note_maps, score_to
from ..scoring.embedding import Throughput
from ..scoring.score import SlideSource, TilingOptions
from ..slides.geojson import read_annotations
from ..slides.slide import Slide, open_slide
from ..triton.connection import Connection
from ..triton.contract import check_same
from . import options
from .display import tile_progress, warn
from .display_attribution import MaskProgress, explanation_line, explanation_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TileMaps:
    """How many tiles to look into, and how."""

    count: int
    score: TileScore
    fill: Fill


@dataclass(frozen=True)
class Request:
    """What is asked of every slide.

    Attributes:
        targets: the classes to explain; empty for the predicted one.
        limit: end of the colour scale, None for each map's own.
        tiling, throughput: how a slide is scored that has no embeddings yet.
        tile_size, mpp: the tiles' side in level-0 px and the slide's mpp, where its file does not say.
        annotations: areas to outline on the maps.
        out: folder for the outputs, None for that of each source.
    """

    settings: Settings
    maps: TileMaps
    score: Score
    targets: tuple[str, ...]
    limit: float | None
    look_groups: int
    checks: bool
    annotations: Path | None
    tiling: TilingOptions
    throughput: Throughput
    tile_size: int | None
    mpp: float | None
    out: Path | None
    overwrite: bool

    def decides(self) -> tuple[object, ...]:
        """What decides the results of a slide."""
        asked = self.maps, self.score, self.targets, self.limit, self.look_groups, self.checks
        outlines = self.annotations and (self.annotations, self.tiling.mask_frame)
        return settings_key(self.settings), *asked, outlines


@dataclass(frozen=True)
class _Explained:
    """A slide that is ready to be explained, and where its results go."""

    stored: StoredSlide
    embedded: EmbeddedSlide
    image: Slide | None
    outlines: BaseGeometry | None
    folder: Path
    cache: ScoreCache


def attribute_slide(
    request: Request,
    connection: Connection,
    contract: Contract,
    source: Path,
    slide_id: str | None,
    image: Path | None,
    key: str = "",
    number: str = "",
) -> list[SummaryRow]:
    """Attribute a slide, which is scored first where `source` is its image; returns a row per target.

    image: the slide's file to draw the maps on. key: of the rows. number: printed before the slide's name.

    Raises:
        ClientError: the slide or its embeddings can't be read, or don't fit the served model.
    """
    with ExitStack() as stack:
        from_image = is_image(source)
        image = source if from_image else image
        opened = stack.enter_context(open_slide(image, request.mpp)) if image else None
        outlines = _outlines(request, opened.bounds[:2]) if opened else None
        if from_image:
            source = _score(request, connection, contract, source)
        stored = find_slide(source, slide_id, contract)
        embedded = read_slide(stored, request.tile_size, request.mpp)
        if opened and not from_image:
            with options.console.status("comparing the slide with the one that was scored"):
                embedded.check_slide(opened)
        embedded = embedded.placed(opened)
        if opened is None:
            outlines = _outlines(request, embedded.bounds_origin or (0, 0))
        folder = request.out or results_folder(stored, embedded)
        stored = replace(stored, results=own_copy(stored.results, embedded, folder))
        if not request.overwrite:
            check_attributions(stored.results, contract)
        cache = stack.enter_context(open_cache(folder, embedded.slide_id))
        ready = _Explained(stored, embedded, opened, outlines, folder, cache)
        targets = request.targets or (None,)
        return [_explain(request, connection, contract, ready, target, key, number) for target in targets]


def is_image(source: Path) -> bool:
    """Whether a path or address is that of a slide, and neither of a folder nor of embeddings."""
    return not (source.is_dir() or source.suffix in TENSOR_SUFFIXES or h5py.is_hdf5(source))


def _outlines(request: Request, origin: tuple[int, int]) -> BaseGeometry | None:
    """The areas to outline, in level-0 px; `origin`: QuPath's (0, 0)."""
    if request.annotations is None:
        return None
    return read_annotations(request.annotations, origin=origin, frame=request.tiling.mask_frame)


def _score(request: Request, connection: Connection, contract: Contract, image: Path) -> Path:
    """Score a slide; returns its HDF5 file."""
    outputs, source = SingleFile(request.out or Path("out")), SlideSource(image, mpp=request.mpp)
    check_free(outputs.out, source)
    with tile_progress(image.name) as progress:
        score_to(outputs, source, connection, contract, request.tiling, request.throughput, progress=progress)
    return outputs.paths(source.slide_id)[0]


def _explain(
    request: Request,
    connection: Connection,
    contract: Contract,
    slide: _Explained,
    target: str | None,
    key: str,
    number: str,
) -> SummaryRow:
    """Explain one class of a slide; writes and prints the results."""
    # matplotlib takes long to import: not for `--help`, errors and other commands.
    from ..attribution.render.files import write_explanation, write_tile_maps

    embedded, maps = slide.embedded, request.maps
    forward, encode = ServedForward(connection, contract), served_tile_encoder(connection, contract)
    with MaskProgress() as bar:
        explanation = explain(
            embedded,
            forward,
            contract,
            request.settings,
            target=target,
            score=request.score,
            checks=request.checks,
            look_groups=request.look_groups,
            elsewhere=lambda target, full: level_elsewhere(
                slide.stored.export / "scores.csv", embedded.slide_id, target, request.score, full
            ),
            cache=slide.cache,
            progress=bar.show,
        )
    check_same(connection, contract)
    written = write_explanation(
        explanation, slide.stored.results, slide.folder, slide.image, request.limit, slide.outlines
    )
    if slide.image:
        with options.console.status("mapping the strongest tiles"):
            written += write_tile_maps(
                explanation, slide.folder, slide.image, encode, maps.count, maps.score, maps.fill
            )
    note_maps(slide.stored, embedded.slide_id, written)
    picture = next(path for path in written if path.suffix == ".png")
    _print(number, explanation, forward.bytes_sent, written, picture)
    return summary_row(explanation, picture, key)


def _print(
    number: str, explanation: Explanation, bytes_sent: int, written: list[Path], picture: Path
) -> None:
    """Print what was found in two or three lines; with `gigapath-client -v` every figure and file."""
    results = Console(soft_wrap=True, highlight=False, markup=False)
    warnings = [explanation.doubt, *(explanation.reliability.warnings() if explanation.reliability else [])]
    detailed = logger.isEnabledFor(logging.INFO)
    results.print(number + explanation_line(explanation))
    if detailed:
        results.print(explanation_table(explanation, bytes_sent))
    for line in evidence_lines(explanation) if detailed else []:
        results.print(line)
    for line in explanation.look_groups.lines() if explanation.look_groups else []:
        results.print(line)
    warn(results, ("\n" if detailed else "; ").join(filter(None, warnings)))
    results.print(*(written if detailed else [f"{picture} (and {len(written) - 1} more files)"]), sep="\n")


def settings_key(settings: Settings) -> tuple[object, ...]:
    """The settings, with a bank's digest for its values: of a large array `repr` shows the ends alone."""
    values = vars(settings)
    if not isinstance(settings.occluder, str):
        values = values | {"occluder": hashlib.sha256(settings.occluder.tobytes()).hexdigest()}
    return tuple(values.items())
