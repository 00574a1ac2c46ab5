"""Score every slide of a work list into one output folder, with tables of the outcomes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gigapath_contract.files import locked

from ..errors import ClientError, DiskFull
from ..files import make_folder, output_errors
from ..outputs.records import FAILED, Fault, SlideRecord
from .job import BatchJob
from .manifest import WorkList
from .pools import Pool
from .schedule import BatchReport, Watch, run
from .tables import write_scores, write_status


def run_batch(
    work_list: WorkList, job: BatchJob, pool: Pool, report: BatchReport, *, wait_for: float = 0.0
) -> list[SlideRecord]:
    """Run a job on a list, and wait up to `wait_for` seconds for servers that are lost on the way.

    `status.csv` is written even if the batch is interrupted, the score tables only if it is not; all of them
    list the slides of this run. Returns the records in the list's order.

    Raises:
        Cancelled: the pool was cancelled. KeyboardInterrupt passes through.
    """
    watch = Watch(job, wait_for, report)
    _begin(job, watch)
    records = [SlideRecord(bad.slide_id, bad.path, FAILED, bad.reason) for bad in work_list.bad]
    for record in records:
        report.end(record)
    order = {slide.slide_id: number for number, slide in enumerate(work_list.slides)}

    def end(record: SlideRecord) -> None:
        records.append(record)
        report.end(record)

    try:
        suspects = {slide.slide_id for slide in work_list.slides if job.begun(slide.slide_id).exists()}
        left = run(pool, work_list.slides, watch, report, end, suspects)
        if left.slides:
            report.give_up(len(left.slides), left.reason)
        records += [
            SlideRecord(slide.slide_id, str(slide.path), FAILED, f"not started: {left.reason}")
            for slide in left.slides
        ]
    finally:
        records.sort(key=lambda record: order.get(record.slide_id, -1))
        write_status(job.layout.status, records)
    write_scores(job.layout, records, work_list.columns)
    return records


def _begin(job: BatchJob, watch: Watch) -> None:
    """Write the contract, once there is space for it. Raises OutputError."""
    while True:
        try:
            return job.layout.write_contract()
        except DiskFull as error:
            if watch.wait(Fault.DISK_FULL, str(error)):
                raise


@contextmanager
def exclusive_output(out: Path) -> Iterator[None]:
    """Lock an output folder: two batches at a time would overwrite each other's files.

    Raises:
        ClientError: another batch has locked it.
        OutputError: the folder can't be written to.
    """
    make_folder(out)
    busy = ClientError(f"another batch is writing to {out}: wait for it, or choose another --out")
    with ExitStack() as held:
        with output_errors(out):
            held.enter_context(locked(out / ".lock", busy))
        yield
