"""Execute a tile plan: a pool of decoding threads, batches in the plan's order, constant memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from client.errors import SlideError
from client.reader_openslide import OpenSlideReader
from client.slide import Pixels
from client.tiling import TilePlan


@dataclass(frozen=True, eq=False)
class TileBatch:
    """Tiles `start` to `start + len(pixels)` of a plan; where `valid` is False the pixels are zeros and mean nothing.

    `read_seconds` and `resize_seconds` are what one thread spent on this batch.
    """

    start: int
    pixels: Pixels  # [B, crop_px, crop_px, 3] RGB
    valid: npt.NDArray[np.bool_]  # [B]
    read_seconds: float
    resize_seconds: float


def read_tiles(plan: TilePlan, *, workers: int = 2, batch: int = 64, start: int = 0) -> Iterator[TileBatch]:
    """Yield the plan's tiles from index `start` on, in order, the same bytes for any number of `workers`.

    At most `2 * workers` batches are decoded ahead of what was taken. Closing the generator, or an exception such as
    Ctrl-C in the loop over it, stops the threads within one tile and closes the slide.

    Raises:
        SlideError: the slide cannot be opened. A tile that cannot be decoded raises nothing: it is not `valid`.
    """
    stop = threading.Event()
    reader = OpenSlideReader(plan)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
    starts = iter(range(start, len(plan), batch))
    pending: deque[Future[TileBatch]] = deque()

    def submit() -> None:
        if (first := next(starts, None)) is not None:
            pending.append(pool.submit(_read_batch, reader, plan, first, min(first + batch, len(plan)), stop))

    try:
        for _ in range(2 * workers):
            submit()
        while pending:
            done = pending.popleft().result()
            submit()
            yield done
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        reader.close()


def _read_batch(
    reader: OpenSlideReader, plan: TilePlan, start: int, end: int, stop: threading.Event
) -> TileBatch:
    crop = (plan.crop_px, plan.crop_px)
    pixels = np.zeros((end - start, *crop, 3), np.uint8)
    valid = np.zeros(end - start, np.bool_)
    began, resizing = time.perf_counter(), 0.0
    for row, index in enumerate(range(start, end)):
        if stop.is_set():
            break
        try:
            region = reader.read(index)
        except SlideError:
            continue
        if plan.resampled:
            tick = time.perf_counter()
            pixels[row] = resize(region, crop)
            resizing += time.perf_counter() - tick
        else:
            pixels[row] = region
        valid[row] = True
    return TileBatch(start, pixels, valid, time.perf_counter() - began - resizing, resizing)


def resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize RGB uint8 [h, w, 3] to `size` (w, h): area means where it shrinks, linear where it grows.

    Area averaging has no taps outside the region, so a tile's pixels never depend on what lies around it.
    """
    shrunk = (min(size[0], pixels.shape[1]), min(size[1], pixels.shape[0]))
    if shrunk != (pixels.shape[1], pixels.shape[0]):
        pixels = cv2.resize(pixels, shrunk, interpolation=cv2.INTER_AREA)
    if shrunk != size:
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    return pixels
