"""What a batch does with one slide, the same in a thread here and in a task on Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

from gigapath_contract.schema import Contract

from ..errors import Cancelled, ClientError, OutputError
from ..outputs.formats import export
from ..outputs.hdf5 import Provenance, write_features, write_patches, write_slide_features
from ..outputs.layout import Layout
from ..outputs.thumbnail import draw_tiles, write_picture
from ..scoring.embedding import Progress, Throughput, chunk_size
from ..scoring.resume import EmbeddingCheckpoint
from ..scoring.score import ScoredSlide, SlideSource, TilingOptions, score_slide
from ..scoring.timings import StageTimer
from ..slides.geojson import tissue_features
from ..slides.geojson import write_features as write_geojson
from ..slides.tiling import TilePlan
from ..triton.connection import Connection
from ..triton.contract import check_same
from ..triton.endpoint import Endpoint
from .records import (
    FAILED,
    SlideRecord,
    identify,
    read_record,
    record_path,
    slide_record,
    write_record,
)


@dataclass(frozen=True)
class BatchJob:
    """What is to be done with every slide of a batch; picklable, so that it can travel to a worker."""

    out: Path
    endpoint: Endpoint
    contract: Contract
    tiling: TilingOptions
    throughput: Throughput
    exports: frozenset[str] = frozenset()

    @property
    def layout(self) -> Layout:
        """Where the outputs lie."""
        return Layout(self.out, self.contract)


def process_slide(
    work: BatchJob,
    source: SlideSource,
    connection: Connection,
    progress: Progress = lambda done, total: None,
) -> SlideRecord:
    """Score a slide into the layout, or find that it is done; failures become the record's reason.

    Raises:
        Cancelled: the connection was cancelled; what was embedded so far is kept.
    """
    began = time.perf_counter()
    try:
        return _process(work, source, connection, progress, began)
    except Cancelled:
        raise
    except (ClientError, MemoryError) as error:
        record = SlideRecord(
            slide_id=source.slide_id,
            path=str(source.path),
            status=FAILED,
            reason=" ".join(str(error).split()) or "out of memory: score fewer slides at a time (--slides 1)",
            error=type(error).__name__,
            seconds=round(time.perf_counter() - began, 3),
        )
    with contextlib.suppress(OutputError):  # a full disk: the reason is told all the same
        write_record(work.out, record)
    return record


def _process(
    work: BatchJob, source: SlideSource, connection: Connection, progress: Progress, began: float
) -> SlideRecord:
    timer = StageTimer()
    known = read_record(work.out, source.slide_id)
    with timer.time("digest"):
        identity = identify(source, work.contract, work.tiling, known)
    outputs = work.layout.base(source.slide_id)
    if known and known.key == identity.key and all(path.exists() for path in outputs):
        export(work.layout, source.slide_id, work.exports, again=False)
        return dataclasses.replace(known, path=str(source.path), reused=True)

    def partial(plan: TilePlan) -> EmbeddingCheckpoint:
        rows = [identity.key, plan.fingerprint, chunk_size(work.throughput, work.contract)]
        path = work.out / ".partial" / f"{source.slide_id}.part"
        return EmbeddingCheckpoint(path, rows, work.contract.tile_encoder.embed_dim)

    scored = score_slide(
        source,
        connection,
        work.contract,
        work.tiling,
        work.throughput,
        timer=timer,
        partial=partial,
        progress=progress,
    )
    check_same(connection, work.contract)
    with timer.time("write"):
        # Without its record a slide counts as not done: a kill between two outputs leaves no mixture.
        record_path(work.out, source.slide_id).unlink(missing_ok=True)
        _write(work, source.slide_id, scored, Provenance(work.contract, identity.slide_sha256, identity.key))
    record = slide_record(source, identity, scored, timer, seconds=time.perf_counter() - began)
    write_record(work.out, record)
    (work.out / ".partial" / f"{source.slide_id}.part").unlink(missing_ok=True)
    return record


def _write(work: BatchJob, slide_id: str, scored: ScoredSlide, provenance: Provenance) -> None:
    layout = work.layout
    write_patches(layout.patches(slide_id), scored)
    write_features(layout.features(slide_id), scored, provenance)
    write_slide_features(layout.slide_features(slide_id), scored, provenance)
    write_picture(layout.picture(slide_id), draw_tiles(scored))
    tissue = tissue_features(scored.contours, slide_id, origin=scored.origin)
    write_geojson(layout.contours(slide_id), tissue)
    export(layout, slide_id, work.exports, again=True)
