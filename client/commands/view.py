"""Progress bars of a slide and of a batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..outputs.records import FAILED, OK, SlideRecord
from ..scoring.embedding import Progress as Report
from ..scoring.score import SlideSource
from . import options

_COLOURS = {OK: "green", FAILED: "red"}


@contextmanager
def tile_progress(name: str) -> Iterator[Report]:
    """A bar of one slide's tiles with the time left; yields the callback that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tiles"))
    console = options.console
    hidden = not console.is_terminal  # else it would leave an empty line
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class BatchView(Progress):
    """A bar for the batch, by the slides' bytes and with the time left, and one for each slide begun."""

    def __init__(self, console: Console, slides: list[SlideSource]) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._sizes = {s.slide_id: s.path.stat().st_size if s.path.is_file() else 1 for s in slides}
        self._parts = dict.fromkeys(self._sizes, 0.0)
        self._ended = 0
        self._batch = self.add_task("batch", total=sum(self._sizes.values()), count=f"0/{len(slides)} slides")
        self._parts_lock = threading.Lock()

    def watch(self, source: SlideSource) -> Report:
        """The progress callback of a slide that begins."""
        task = self.add_task(source.slide_id, total=None, count="")

        def report(done: int, total: int) -> None:
            self.update(
                task, completed=done, total=total, count=f"{done}/{total} tiles", visible=done < total
            )
            self._move(source.slide_id, done / max(1, total))

        return report

    def ended(self, record: SlideRecord) -> None:
        """Say how a slide ended, in one line."""
        self._ended += 1
        if record.slide_id in self._parts:
            self._move(record.slide_id, 1.0)
        took = "was done" if record.reused else f"{record.tiles} tiles, {record.seconds:.1f} s"
        colour = _COLOURS.get(record.status, "yellow")
        line = f"[{colour}]{record.status:8}[/] {record.slide_id}"
        self.console.print(line, highlight=False, end="  ")
        self.console.print(record.reason or took, highlight=False, markup=False, soft_wrap=True)

    def _move(self, slide_id: str, part: float) -> None:
        with self._parts_lock:
            self._parts[slide_id] = part
            done = sum(self._sizes[name] * part for name, part in self._parts.items())
        self.update(self._batch, completed=done, count=f"{self._ended}/{len(self._sizes)} slides")
