"""What commands show: progress bars of slides and batches, what is served, and what usually follows."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from gigapath_contract.schema import Contract

from ..errors import ClientError
from ..outputs.layout import export_name
from ..outputs.records import FAILED, OK, SlideRecord
from ..scoring.embedding import Progress as Report
from ..scoring.score import SlideSource
from ..scoring.timings import duration
from ..triton.endpoint import DEFAULT_URL, Endpoint
from . import options

_COLOURS = {OK: "green", FAILED: "red"}


def warn_missing(server: str, error: ClientError) -> None:
    """Print that a server can't be reached, where others may do its work."""
    warn(options.console, f"{error}; nothing is sent to {server} until it answers")


def say_served(contract: Contract) -> None:
    """Print which export is served: an earlier one may still be."""
    classes = f"classes {', '.join(contract.head.classes)}" if contract.head else "no classes"
    typer.echo(f"served: export {export_name(contract)}, {classes}")


def warn_untrained(console: Console, contract: Contract) -> None:
    """Print a warning where the served weights are not trained."""
    if not contract.trained:
        console.print(f"[yellow]The weights of the served preset {contract.preset!r} are untrained.")


def warn(console: Console, text: str) -> None:
    """Print a warning, if there is one."""
    if text:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def say_next(*command: object, endpoint: Endpoint | None = None) -> None:
    """Print the command that usually follows, as it is typed: with the server if this one named it."""
    named = endpoint is not None and endpoint.url != DEFAULT_URL and "TRITON_URL" not in os.environ
    words = ["gigapath-client", *map(str, command), *(["--url", endpoint.url] if endpoint and named else [])]
    typer.echo(f"next: {shlex.join(words)}")


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
    """A bar for the batch, by the slides' bytes, with the time left; and one for each slide in progress."""

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
            disable=not console.is_terminal,  # else every slide that begins draws it for nobody
        )
        self._sizes = {s.slide_id: s.path.stat().st_size if s.path.is_file() else 1 for s in slides}
        self._parts = dict.fromkeys(self._sizes, 0.0)
        self._done, self._ended = 0.0, 0  # bytes, slides
        self._batch = self.add_task("batch", total=sum(self._sizes.values()), count=f"0/{len(slides)} slides")
        self._parts_lock = threading.Lock()
        self._bars: dict[str, TaskID] = {}

    def progress_for(self, source: SlideSource) -> Report:
        """The progress callback of a slide that is started."""
        self._hide(source.slide_id)
        task = self._bars[source.slide_id] = self.add_task(source.slide_id, total=None, count="")

        def report(done: int, total: int) -> None:
            self.update(
                task, completed=done, total=total, count=f"{done}/{total} tiles", visible=done < total
            )
            self._move(source.slide_id, done / max(1, total))

        return report

    def end(self, record: SlideRecord) -> None:
        """Print the outcome of a slide, in one line."""
        self._ended += 1
        self._hide(record.slide_id)
        if record.slide_id in self._parts:
            self._move(record.slide_id, 1.0)
        took = "was done" if record.reused else f"{record.tiles} tiles, {record.seconds:.1f} s"
        colour = _COLOURS.get(record.status, "yellow")
        self._print(colour, record.status, f"{record.slide_id}  {record.reason or took}")
        for note in record.notes:
            self._print("yellow", "note", f"{record.slide_id}  {note}")

    def late(self, record: SlideRecord) -> None:
        """Print that a slide is tried again later."""
        self._hide(record.slide_id)
        self._move(record.slide_id, 0.0)
        self._print(
            "yellow", "later", f"{record.slide_id}  tried again alone after the others: {record.reason}"
        )

    def wait(self, what: str, reason: str, seconds: float) -> None:
        """Print that the batch waits, and show it in the bar."""
        self.update(self._batch, description="waiting")
        self._print("yellow", "waiting", f"for {what}, {duration(seconds)} at most (--wait-for): {reason}")

    def back(self, what: str) -> None:
        """Print that the wait is over."""
        self.update(self._batch, description="batch")
        self._print("green", "back", f"there is {what} again")

    def give_up(self, slides: int, reason: str) -> None:
        """Print once why the slides left are not started."""
        self._print("red", "stopped", f"{slides} slides not started: {reason}")

    def _hide(self, slide_id: str) -> None:
        """Take the bar of a slide away, where it has one."""
        if slide_id in self._bars:
            self.update(self._bars.pop(slide_id), visible=False)

    def _print(self, colour: str, word: str, text: str) -> None:
        line = Text.assemble((f"{word:8}", colour), " ", text)
        self.console.print(line, highlight=False, soft_wrap=True)

    def _move(self, slide_id: str, part: float) -> None:
        with self._parts_lock:
            self._done += self._sizes[slide_id] * (part - self._parts[slide_id])
            self._parts[slide_id] = part
        self.update(self._batch, completed=self._done, count=f"{self._ended}/{len(self._sizes)} slides")
