"""Score every slide of a work list into one output folder, with tables of the outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gigapath_contract.files import locked

from ..errors import ClientError, DiskFull
from ..files import make_folder, output_errors
from ..outputs.records import FAILED, Fault, SlideRecord
from .job import BatchJob
from .manifest import WorkList
from .pools import Pool
from .schedule import MOST_LOSSES, BatchReport, Watch, run
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
    _once_it_fits(job.layout.write_contract, watch)
    records = [SlideRecord(bad.slide_id, bad.path, FAILED, bad.reason) for bad in work_list.bad]
    for record in records:
        report.end(record)
    order = {slide.slide_id: number for number, slide in enumerate(work_list.slides)}

    def end(record: SlideRecord) -> None:
        records.append(record)
        report.end(record)

    def in_order() -> list[SlideRecord]:
        return sorted(records, key=lambda record: order.get(record.slide_id, -1))

    try:
        suspects = {slide.slide_id for slide in work_list.slides if job.begun(slide.slide_id).exists()}
        left = run(pool, work_list.slides, watch, report, end, suspects)
        if left.slides:
            report.give_up(len(left.slides), left.reason)
        records += [
            SlideRecord(slide.slide_id, str(slide.path), FAILED, f"not started: {left.reason}")
            for slide in left.slides
        ]
    except BaseException:
        write_status(job.layout.status, in_order())
        raise
    _once_it_fits(lambda: write_status(job.layout.status, in_order()), watch)
    _once_it_fits(lambda: write_scores(job.layout, in_order(), work_list.columns), watch)
    return in_order()


def _once_it_fits(write: Callable[[], object], watch: Watch) -> None:
    """Write small files; where the disk is full, again once there is space. Raises OutputError."""
    for _ in range(MOST_LOSSES):
        try:
            write()
            return
        except DiskFull as error:
            if watch.wait(Fault.DISK_FULL, str(error)):
                raise
    write()


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
