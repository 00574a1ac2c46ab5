"""Read the tiles of a plan: decoding threads, batches in the plan's order, constant memory."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import cv2
import numpy as np

from ..arrays import Bool, Pixels
from ..slides.tiling import TilePlan
from .tile_reader import TileReader, open_reader

TILES_PER_TASK = 16  # tiles that a thread takes at once; few enough that a small slide keeps all threads busy


@dataclass(frozen=True, eq=False)
class TileBatch:
    """Tiles `start` to `start + len(pixels)` of a plan, in its order."""

    start: int
    pixels: Pixels  # [B, crop_px, crop_px, 3] RGB; zeros where not valid
    valid: Bool  # [B] False: the tile could not be decoded
    read_seconds: float  # summed over threads
    resize_seconds: float
    reader: str  # `TileReader.name`


def read_tiles(plan: TilePlan, *, workers: int = 2, batch: int = 64, start: int = 0) -> Generator[TileBatch]:
    """Yield a plan's tiles in its order, in batches.

    A few batches are decoded ahead of what was taken. Closing the generator, or an exception such as Ctrl-C
    in the loop over it, stops the threads within one tile and closes the slide.

    Args:
        plan: the tiles.
        workers: decoding threads; any number gives the same bytes.
        batch: tiles per batch; the last one may be smaller.
        start: index of the first tile.

    Raises:
        SlideError: the slide cannot be opened. A tile that cannot be decoded raises nothing; it is not
            `valid`.

    Example::

        for batch in read_tiles(plan, workers=4):
            embed(batch.pixels[batch.valid])
    """
    stop = threading.Event()
    with closing(open_reader(plan, start)) as reader:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
        begun = _begin(plan, reader, pool, range(start, len(plan), batch), stop)
        try:
            pending = deque(itertools.islice(begun, 2 + math.ceil(workers * TILES_PER_TASK / batch)))
            while pending:
                first, pixels, valid, jobs = pending.popleft()
                spent = [job.result() for job in jobs]
                pending.extend(itertools.islice(begun, 1))
                read, resized = (sum(seconds) for seconds in zip(*spent, strict=True))
                yield TileBatch(first, pixels, valid, read, resized, reader.name)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(
    plan: TilePlan, reader: TileReader, pool: ThreadPoolExecutor, starts: range, stop: threading.Event
) -> Iterator[tuple[int, Pixels, Bool, list[Future[tuple[float, float]]]]]:
    """Begin a batch when it is taken: its first tile, its arrays, and the jobs that fill them."""
    for first in starts:
        count = min(starts.step, len(plan) - first)
        pixels = np.empty((count, plan.crop_px, plan.crop_px, 3), np.uint8)
        valid = np.zeros(count, np.bool_)
        parts = [slice(low, low + TILES_PER_TASK) for low in range(0, count, TILES_PER_TASK)]
        jobs = [
            pool.submit(_read, reader, plan, first + part.start, pixels[part], valid[part], stop)
            for part in parts
        ]
        yield first, pixels, valid, jobs


def _read(
    reader: TileReader,
    plan: TilePlan,
    start: int,
    pixels: Pixels,
    valid: Bool,
    stop: threading.Event,
) -> tuple[float, float]:
    """Read consecutive tiles into `pixels` and `valid`; returns seconds of reading and of resizing."""
    region = np.empty((*plan.read_size[::-1], 3), np.uint8) if plan.resampled else None
    began, resizing = time.perf_counter(), 0.0
    for row, out in enumerate(pixels):
        if stop.is_set():
            break
        valid[row] = reader.read(start + row, out if region is None else region)
        if not valid[row]:
            out[:] = 0
        elif region is not None:
            tick = time.perf_counter()
            out[:] = resize(region, (plan.crop_px, plan.crop_px))
            resizing += time.perf_counter() - tick
    return time.perf_counter() - began - resizing, resizing


def resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize RGB uint8 [h, w, 3] to `size` (w, h): area means where it shrinks, linear where it grows.

    Area means have no taps outside the region, so a tile's pixels never depend on what lies around it.
    """
    shrunk = (min(size[0], pixels.shape[1]), min(size[1], pixels.shape[0]))
    if shrunk != (pixels.shape[1], pixels.shape[0]):
        pixels = np.asarray(cv2.resize(pixels, shrunk, interpolation=cv2.INTER_AREA), np.uint8)
    if shrunk != size:
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR), np.uint8)
    return pixels
