"""Where a slide's time went: seconds and bytes by stage, and the bottleneck."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

STAGES = {
    "hash": "hash the slide's content",
    "open": "open the slide",
    "tissue": "find the tissue and plan the tiles",
    "read": "decode tiles (sum over the decoding threads)",
    "resize": "resample tiles (sum over the decoding threads)",
    "wait-read": "wait for decoded tiles, nothing to send",
    "wait-server": "wait for the server's answers, nothing to do",
    "send": "serialise and carry requests and answers (sum over the requests)",
    "queue": "requests waiting in Triton's queue (sum over requests)",
    "compute": "the tile encoder's executions on the server",
    "slide": "the slide encoder, as the client sees it",
    "write": "write the outputs",
}
# Stages that follow one another; the others run at the same time as these. `REST` is what is in none.
REST = "rest"
SERIAL = ("hash", "open", "tissue", "wait-read", "wait-server", "slide", "write")


@dataclass
class Stage:
    """Sums over all calls of one stage."""

    seconds: float = 0.0
    bytes: int = 0
    calls: int = 0


class StageTimer:
    """Adds up seconds and bytes by stage; any thread may add."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float, size: int = 0) -> None:
        """Add seconds and bytes to a stage of `STAGES`."""
        assert stage in STAGES, stage
        with self._lock:
            entry = self.stages.setdefault(stage, Stage())
            entry.seconds += seconds
            entry.bytes += size
            entry.calls += 1

    def seconds(self, stage: str) -> float:
        """Seconds of a stage so far."""
        return self.stages[stage].seconds if stage in self.stages else 0.0

    def merge(self, other: StageTimer) -> None:
        """Add another timer's stages to this one."""
        with self._lock:
            for name, theirs in other.stages.items():
                mine = self.stages.setdefault(name, Stage())
                mine.seconds += theirs.seconds
                mine.bytes += theirs.bytes
                mine.calls += theirs.calls

    @contextmanager
    def time(self, stage: str, size: int = 0) -> Iterator[None]:
        """Add the time that the block takes, also where it fails."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began, size)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """JSON-able: {stage: {seconds, bytes, calls}} in the order of `STAGES`."""
        found = {name: asdict(self.stages[name]) for name in STAGES if name in self.stages}
        return {name: {**stage, "seconds": round(stage["seconds"], 4)} for name, stage in found.items()}


def total(timings: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The sum of several `as_dict`s."""
    summed: dict[str, dict[str, float]] = {}
    for name in STAGES:
        found = [stages[name] for stages in timings if name in stages]
        if found:
            keys = ("seconds", "bytes", "calls")
            summed[name] = {key: sum(entry.get(key, 0.0) for entry in found) for key in keys}
    return summed


def shares(stages: dict[str, dict[str, float]], seconds: float) -> dict[str, tuple[float, float]]:
    """Seconds, and the share of all `seconds`, of the stages that follow one another; they add up to it.

    What is in none of them is `REST`: records and checks of the export.
    """
    serial = {name: stages[name]["seconds"] for name in SERIAL if name in stages}
    serial[REST] = max(0.0, seconds - sum(serial.values()))
    return {name: (spent, spent / max(seconds, 1e-9)) for name, spent in serial.items()}


WORTH_ADVICE_S = 10.0
"""Seconds of all slides together, below which score and batch name no bottleneck."""


def bottleneck(stages: dict[str, dict[str, float]], elapsed: float = 0.0, *, at_least: float = 0.0) -> str:
    """One sentence: the stage that took most of the time, and what would help; `stages` as by `as_dict`.

    `elapsed` are the seconds of the clock in which all of it was done, of slides side by side less than their
    sum; 0 where they are not known, and then it is not said how busy the encoder was.
    Empty where the stages that follow one another took less than `at_least` seconds, as by `WORTH_ADVICE_S`.
    """

    def seconds(name: str) -> float:
        return stages.get(name, {}).get("seconds", 0.0)

    serial = {name: seconds(name) for name in SERIAL}
    everything = sum(serial.values())
    if everything < at_least:
        return ""
    worst = max(serial, key=lambda name: serial[name])
    share = f"{serial[worst] / max(everything, 1e-9):.0%} of the time"
    if worst != "wait-server":
        return f"bottleneck: {_ADVICE[worst][0]} ({share}): {_ADVICE[worst][1]}"
    if "compute" not in stages:
        return f"bottleneck: the server ({share}); its statistics are not readable, so the cause is unknown"
    # Requests overlap, so their sums do not compare with elapsed time; the encoder's executions do.
    busy = min(1.0, seconds("compute") / elapsed) if elapsed else 0.0
    part = "compute" if busy >= 0.7 or seconds("compute") >= seconds("send") else "send"
    share += f", encoder busy {busy:.0%}" if elapsed else ""
    return f"bottleneck: {_ADVICE[part][0]} ({share}): {_ADVICE[part][1]}"


_ADVICE = {
    "hash": ("hashing the slides", "copy the slides to faster storage"),
    "open": ("opening the slides", "copy the slides to faster storage"),
    "tissue": (
        "finding tissue",
        "in a batch more slides at a time (--slides); masks where there are none (--mask or mask_path)",
    ),
    "wait-read": ("reading tiles", "more --workers, faster storage, or tiled JPEG TIFFs without resampling"),
    "slide": ("the slide encoder", "it runs once per slide; in a batch more --slides at a time hide it"),
    "write": ("writing outputs", "an --out on a faster disk"),
    "compute": (
        "the tile encoder on the server",
        "a faster GPU, fp16, or more servers (--url a:8001,b:8001)",
    ),
    "send": ("carrying requests", "a nearer server, --shared-memory on the same host, or more --in-flight"),
}


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever reads best: 8 h, 5 min, 20 s."""
    size, unit = next(((s, u) for s, u in ((3600, "h"), (60, "min")) if seconds >= s), (1, "s"))
    return f"{seconds / size:.3g} {unit}"
