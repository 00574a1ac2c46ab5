"""What a batch does with one slide, the same in a local thread and in a Ray task."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from gigapath_contract.schema import Contract

from ..errors import (
    Cancelled,
    ClientError,
    DeadlineExceeded,
    DiskFull,
    ExportChanged,
    OutputError,
    ServerUnavailable,
)
from ..outputs.formats import FORMATS, write_formats
from ..outputs.layout import Layout
from ..outputs.records import FAILED, Fault, SlideRecord, write_record
from ..outputs.store import TridentFiles, score_to
from ..scoring.embedding import Progress, Throughput
from ..scoring.score import SlideSource, TilingOptions
from ..triton.connection import Connection
from ..triton.endpoint import Endpoint
from .tile_extras import write_tile_extras

_FAULTS = {
    ServerUnavailable: Fault.SERVER_LOST,
    DeadlineExceeded: Fault.DEADLINE,
    ExportChanged: Fault.EXPORT_CHANGED,
    DiskFull: Fault.DISK_FULL,
}


@dataclass(frozen=True)
class BatchJob:
    """How every slide of a batch is scored and stored; picklable, so that it can travel to a worker.

    `formats` are what is made of it on request: keys of `FORMATS`, and kinds of `tile_extras`.
    """

    out: Path
    endpoint: Endpoint
    contract: Contract
    tiling: TilingOptions
    throughput: Throughput
    formats: frozenset[str] = frozenset()

    @property
    def layout(self) -> Layout:
        """Where the outputs lie."""
        return Layout(self.out, self.contract)

    def begun(self, slide_id: str) -> Path:
        """What exists while a slide is processed, and stays where the process dies of it."""
        return self.out / ".begun" / slide_id


def process_slide(
    job: BatchJob,
    source: SlideSource,
    connection: Connection,
    progress: Progress = lambda done, total: None,
) -> SlideRecord:
    """Score a slide into the layout, or find that it is done; failures become the record's reason.

    Raises:
        Cancelled: the connection was cancelled; what was embedded so far is kept.
    """
    began = time.perf_counter()
    mark = job.begun(source.slide_id)
    try:
        with contextlib.suppress(OSError):  # a full disk is reported by what needs more of it
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        outputs = TridentFiles(job.layout)
        record, _ = score_to(
            outputs, source, connection, job.contract, job.tiling, job.throughput, progress=progress
        )
        if formats := job.formats & FORMATS.keys():
            write_formats(job.layout, source.slide_id, formats)
        write_tile_extras(
            job.formats,
            outputs,
            source,
            connection,
            job.contract,
            job.tiling,
            job.throughput,
            progress=progress,
        )
        return record
    except Cancelled:
        raise
    except (ClientError, MemoryError) as error:
        failed = SlideRecord(
            slide_id=source.slide_id,
            path=str(source.path),
            status=FAILED,
            reason=" ".join(str(error).split()) or "out of memory: score fewer slides at a time (--slides 1)",
            fault=next((fault for kind, fault in _FAULTS.items() if isinstance(error, kind)), Fault.NONE),
            seconds=round(time.perf_counter() - began, 3),
        )
    finally:
        mark.unlink(missing_ok=True)
    with contextlib.suppress(OutputError):  # on a full disk, report the reason without keeping the record
        write_record(job.layout.export, failed)
    return failed
