"""Tiles to embeddings: decoding, sending and computing overlap, in order, in constant memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np

from gigapath_contract.schema import Contract

from ..arrays import Bool, Float32
from ..reading.stream import TileBatch, read_tiles
from ..slides.tiling import TilePlan
from ..triton.connection import Connection
from ..triton.statistics import available_statistics
from .resume import EmbeddingCheckpoint
from .timings import StageTimer

Progress = Callable[[int, int], None]
"""Called with how many tiles are done, of how many."""


@dataclass(frozen=True)
class Throughput:
    """What makes a run fast or small: decoding threads, tiles a request, requests in flight."""

    workers: int = 2
    chunk: int = 64
    in_flight: int = 4


def embed_tiles(
    plan: TilePlan,
    connection: Connection,
    contract: Contract,
    throughput: Throughput,
    *,
    timer: StageTimer,
    checkpoint: EmbeddingCheckpoint | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Float32, Bool]:
    """Embeddings [N, D] of a plan's tiles and which are valid [N]; the row of an invalid tile is NaN.

    With `checkpoint`, the rows it holds are taken over and every answer is added to it.

    Raises:
        SlideError: the slide can't be opened.
        ServerUnavailable, RequestRefused, Cancelled, OutputError
    """
    model, version, dim = "tile_encoder", contract.version, contract.tile_encoder.embed_dim
    embeddings = np.full((len(plan), dim), np.nan, np.float32)
    valid = np.zeros(len(plan), np.bool_)
    start = done = len(checkpoint.valid) if checkpoint else 0
    if checkpoint:
        embeddings[:done], valid[:done] = checkpoint.embeddings, checkpoint.valid
    progress(done, len(plan))
    request_timer = StageTimer()

    def embed(batch: TileBatch) -> tuple[Float32, Bool]:
        rows = np.full((len(batch.valid), dim), np.nan, np.float32)
        if batch.valid.any():
            pixels = batch.pixels if batch.valid.all() else batch.pixels[batch.valid]
            with request_timer.time("send", pixels.nbytes):
                answer = connection.infer(model, {"TILES": pixels}, ["EMBEDDINGS"], version=version)
            rows[batch.valid] = answer["EMBEDDINGS"]
        return rows, batch.valid

    before, began = available_statistics(connection, model, version), time.perf_counter()
    tiles = read_tiles(plan, workers=throughput.workers, batch=chunk_size(throughput, contract), start=start)
    with contextlib.closing(_timed(tiles, request_timer)) as batches:
        for rows, good in connection.in_order(embed, batches):
            embeddings[done : done + len(good)], valid[done : done + len(good)] = rows, good
            done += len(good)
            if checkpoint:
                checkpoint.append(rows, good)
            progress(done, len(plan))
    elapsed = time.perf_counter() - began
    timer.merge(request_timer)
    timer.add("wait-server", elapsed - request_timer.seconds("wait-read"))
    sent = int(valid[start:].sum())
    if before and sent and (after := available_statistics(connection, model, version)):
        if (after - before).rows < sent:  # Triton counts an answer milliseconds after it is sent
            time.sleep(0.05)
            after = available_statistics(connection, model, version) or after
        served = after - before
        if served.rows >= sent:  # fewer: the server was restarted
            share = sent / served.rows  # of all it did meanwhile, for any client
            timer.add("queue", share * served.queue_s)
            timer.add("compute", share * served.execution_s)
            timer.add("send", -min(share * served.request_s, request_timer.seconds("send")))
    return embeddings, valid


def chunk_size(throughput: Throughput, contract: Contract) -> int:
    """Tiles a request: as many as wanted, at most what the model takes."""
    return min(throughput.chunk, contract.tile.max_batch)


def _timed(tiles: Iterator[TileBatch], timer: StageTimer) -> Generator[TileBatch]:
    while True:
        with timer.time("wait-read"):
            batch = next(tiles, None)
        if batch is None:
            return
        timer.add("read", batch.read_seconds, batch.pixels.nbytes)
        timer.add("resize", batch.resize_seconds)
        yield batch
