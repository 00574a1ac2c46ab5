"""Score a slide and store the result, unless the output folder already holds it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gigapath_contract.schema import Contract

from ..errors import ExportChanged, OutputError, RequestRefused
from ..files import check_folder
from ..scoring.embedding import Progress, Throughput, chunk_size
from ..scoring.result_key import find_result_key
from ..scoring.resume import EmbeddingCheckpoint
from ..scoring.score import (
    DEFAULT_THROUGHPUT,
    DEFAULT_TILING,
    ScoredSlide,
    SlideSource,
    TilingOptions,
    score_slide,
)
from ..scoring.timings import StageTimer
from ..slides.fingerprint import slide_sha256
from ..slides.geojson import tissue_features, write_feature_collection
from ..slides.tiling import TilePlan
from ..triton.connection import Connection
from ..triton.contract import check_same
from .formats import write_formats
from .hdf5 import (
    Provenance,
    write_features_h5,
    write_patches_h5,
    write_slide_features_h5,
    write_slide_h5,
)
from .layout import Layout
from .records import SlideRecord, read_record, record_path, slide_record, write_record
from .thumbnail import draw_tiles, write_picture


class Outputs(Protocol):
    """The files of a scored slide below the folder `out`."""

    @property
    def out(self) -> Path:
        """The folder; records lie in `out/records`."""

    def paths(self, slide_id: str) -> list[Path]:
        """The files that every scored slide has."""

    def checkpoint(self, slide_id: str) -> Path | None:
        """Where embeddings are kept until the slide is done, so that a killed run resumes; None: nowhere."""

    def write(self, slide_id: str, scored: ScoredSlide, provenance: Provenance) -> None:
        """Write the files."""


@dataclass(frozen=True)
class SingleFile:
    """`client score`: everything in OUT/SLIDE.h5, and OUT/SLIDE-tiles.png."""

    out: Path

    def paths(self, slide_id: str) -> list[Path]:
        """The HDF5 file and the picture."""
        return [self.out / f"{slide_id}.h5", self.out / f"{slide_id}-tiles.png"]

    def checkpoint(self, slide_id: str) -> Path | None:
        """None: one slide is scored in one go."""
        return None

    def write(self, slide_id: str, scored: ScoredSlide, provenance: Provenance) -> None:
        """Write the HDF5 file and the picture."""
        h5, picture = self.paths(slide_id)
        write_slide_h5(h5, scored, provenance)
        write_picture(picture, draw_tiles(scored))


@dataclass(frozen=True)
class TridentFiles:
    """`client batch`: TRIDENT's layout, and the further `formats` (keys of `formats.FORMATS`)."""

    layout: Layout
    formats: frozenset[str] = frozenset()

    @property
    def out(self) -> Path:
        """The layout's folder."""
        return self.layout.out

    def paths(self, slide_id: str) -> list[Path]:
        """The layout's files; further formats are made from these."""
        return self.layout.base(slide_id)

    def checkpoint(self, slide_id: str) -> Path | None:
        """OUT/.partial/SLIDE.part."""
        return self.out / ".partial" / f"{slide_id}.part"

    def write(self, slide_id: str, scored: ScoredSlide, provenance: Provenance) -> None:
        """Write the layout's files and the further formats."""
        layout = self.layout
        write_patches_h5(layout.patches(slide_id), scored)
        write_features_h5(layout.features(slide_id), scored, provenance)
        write_slide_features_h5(layout.slide_features(slide_id), scored, provenance)
        write_picture(layout.picture(slide_id), draw_tiles(scored))
        tissue = tissue_features(scored.contours, slide_id, origin=scored.origin)
        write_feature_collection(layout.contours(slide_id), tissue)
        write_formats(layout, slide_id, self.formats, overwrite=True)


def check_free(out: Path, source: SlideSource) -> None:
    """Check that `out` does not hold the result of another slide by the same id, from another file.

    Raises:
        OutputError: it does.
        SlideError: the slide cannot be read.
    """
    previous = read_record(out, source.slide_id)
    if (
        previous is not None
        and previous.slide_sha256
        and Path(previous.path).resolve() != source.path.resolve()
        and previous.slide_sha256 != slide_sha256(source.path)
    ):
        raise OutputError(
            f"{out} holds the result of another slide called {source.slide_id} ({previous.path}): choose "
            "another --out, or rename one of them"
        )


def score_to(
    outputs: Outputs,
    source: SlideSource,
    connection: Connection,
    contract: Contract,
    tiling: TilingOptions = DEFAULT_TILING,
    throughput: Throughput = DEFAULT_THROUGHPUT,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> tuple[SlideRecord, ScoredSlide | None]:
    """Score a slide into `outputs` with its record; None for the result where it was there already.

    It is there when the record has the same result key and all files exist.

    Args:
        outputs: the files to write, `SingleFile(out)` or `TridentFiles(Layout(out, contract))`.
        source, connection, contract, tiling, throughput, progress: as for `score_slide`.
        overwrite: score also what is there already.

    Raises:
        OutputError: the files cannot be written.
        ExportChanged: a server serves another export than `contract` was read from.
        ClientError: as `score_slide` raises.

    Example::

        record, scored = score_to(SingleFile(Path("out")), SlideSource(path), connection, contract)
    """
    began, timer, slide_id = time.perf_counter(), StageTimer(), source.slide_id
    check_folder(outputs.out)
    previous = read_record(outputs.out, slide_id)
    with timer.time("hash"):
        key = find_result_key(source, contract, tiling, previous.key if previous else None)
    paths = outputs.paths(slide_id)
    names = [path.relative_to(outputs.out).as_posix() for path in paths]
    done = previous and (previous.result_key, previous.outputs) == (key.value, names)
    if previous and done and not overwrite and all(path.exists() for path in paths):
        return dataclasses.replace(previous, path=str(source.path), reused=True), None
    unfinished = outputs.checkpoint(slide_id)

    def open_checkpoint(plan: TilePlan) -> EmbeddingCheckpoint | None:
        fingerprint = [key.value, plan.fingerprint, chunk_size(throughput, contract)]
        dim = contract.tile_encoder.embed_dim
        return EmbeddingCheckpoint(unfinished, fingerprint, dim) if unfinished else None

    check_same(connection, contract)
    try:
        with _naming_a_change(connection, contract):
            scored = score_slide(
                source,
                connection,
                contract,
                tiling,
                throughput,
                timer=timer,
                open_checkpoint=open_checkpoint,
                progress=progress,
            )
        check_same(connection, contract)
    except ExportChanged:
        if unfinished:  # some of its rows may be the other export's
            unfinished.unlink(missing_ok=True)
        raise
    with timer.time("write"):
        # The record goes first: without it a slide counts as not done if this is killed between two outputs.
        record_path(outputs.out, slide_id).unlink(missing_ok=True)
        outputs.write(slide_id, scored, Provenance(contract, key.slide_sha256, key.value))
    record = slide_record(source, key, scored, names, timer, seconds=time.perf_counter() - began)
    write_record(outputs.out, record)
    if unfinished:
        unfinished.unlink(missing_ok=True)
    return record, scored


@contextmanager
def _naming_a_change(connection: Connection, contract: Contract) -> Iterator[None]:
    """Name as the cause of a refused request that a server now serves another export, where it does."""
    try:
        yield
    except RequestRefused:
        check_same(connection, contract)
        raise
