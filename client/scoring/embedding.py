"""Tiles to embeddings, in order and in constant memory; decoding, sending and computing overlap."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gigapath_contract.schema import Contract

from ..arrays import Bool, Float32
from ..errors import NonFiniteAnswer
from ..reading.stream import TileBatch, read_tiles
from ..slides.tiling import TilePlan
from ..triton.connection import Connection, result_of
from ..triton.contract import ExportGuard
from ..triton.joined_requests import Answer
from ..triton.statistics import ModelStatistics, available_statistics, wait_for_rows
from .resume import EmbeddingCheckpoint
from .timings import StageTimer

Progress = Callable[[int, int], None]
"""Called with the number of tiles done and their total."""


@dataclass(frozen=True)
class Throughput:
    """Decoding threads per slide, tiles per request, and requests in flight per server.

    More of each is faster up to a point, and needs more memory; none of them changes a result. Without
    `chunk` a request has as many tiles as the contract allows.
    """

    workers: int = 2
    chunk: int | None = None
    in_flight: int = 4


class Embedded(NamedTuple):
    """What the tile encoder returned: embeddings [N, D], which tiles are valid [N], and the tile head's
    logits [N, C], None without one. The rows of an invalid tile are NaN."""

    embeddings: Float32
    valid: Bool
    tile_logits: Float32 | None


def embed_tiles(
    plan: TilePlan,
    connection: Connection,
    contract: Contract,
    throughput: Throughput,
    *,
    timer: StageTimer,
    checkpoint: EmbeddingCheckpoint | None = None,
    progress: Progress = lambda done, total: None,
) -> Embedded:
    """Send a plan's tiles through the tile encoder.

    Args:
        plan: the tiles.
        connection: to servers of the contract's export.
        contract: gives the model's version, width and batch size.
        throughput: threads, tiles per request.
        timer: gets the stages' times.
        checkpoint: the rows it holds, `row_width` wide, are taken over, and every answer is added to it.
        progress: called after each answer.

    Raises:
        SlideError: the slide can't be opened.
        ServerUnavailable, DeadlineExceeded, RequestRefused: see `Connection.infer`.
        ExportChanged: a server was away meanwhile and now serves another export.
        NonFiniteAnswer: a tile's embedding is not finite; the tile is named.
        Cancelled: the connection was cancelled.
        OutputError: the checkpoint can't be written.
    """
    model, version, dim = "tile_encoder", contract.version, contract.tile_encoder.embed_dim
    outputs, width = row_outputs(contract), row_width(contract)
    found = np.full((len(plan), width), np.nan, np.float32)
    valid = np.zeros(len(plan), np.bool_)
    start = done = len(checkpoint.valid) if checkpoint else 0
    if checkpoint:
        found[:done], valid[:done] = checkpoint.embeddings, checkpoint.valid
    progress(done, len(plan))
    request_timer, guard = StageTimer(), ExportGuard(connection, contract)
    most_rows = chunk_size(throughput, contract)

    def send(batch: TileBatch) -> Future[Answer]:
        pixels = batch.pixels if batch.valid.all() else batch.pixels[batch.valid]
        return connection.infer_rows(model, "TILES", pixels, outputs, version=version, most_rows=most_rows)

    before, began = available_statistics(connection, model, version), time.perf_counter()
    interruptions = connection.interruptions
    with (
        connection.room(math.ceil((len(plan) - start) / most_rows)),
        # Closed here: an error keeps this frame, and the reader's threads, until the interpreter ends.
        contextlib.closing(
            read_tiles(plan, workers=throughput.workers, batch=most_rows, start=start)
        ) as tiles,
        contextlib.closing(_timed(tiles, request_timer)) as batches,
        contextlib.closing(connection.in_order((batch, send(batch)) for batch in batches)) as in_flight,
    ):
        for batch, future in in_flight:
            end = done + len(batch.valid)
            if batch.valid.any():
                try:
                    answer = result_of(future)
                except NonFiniteAnswer as error:
                    tile = batch.start + np.flatnonzero(batch.valid)[error.rows[0]]
                    x, y = plan.coords[tile].tolist()
                    raise error.at(f"{plan.path}, tile at x={x}, y={y}") from error
                request_timer.add("send", answer.seconds, batch.pixels.nbytes)
                rows = np.concatenate([answer.outputs[name] for name in outputs], axis=1)
                found[done:end][batch.valid] = rows
            guard.check()
            valid[done:end] = batch.valid
            if checkpoint:
                checkpoint.append(found[done:end], batch.valid)
            done = end
            progress(done, len(plan))
    elapsed = time.perf_counter() - began
    request_timer.add("wait-server", elapsed - request_timer.seconds("wait-read"))
    if before and (sent := int(valid[start:].sum())):
        # Triton counts an answer milliseconds after it is sent; one that was started again has counted fewer.
        expected = before.rows + sent if connection.interruptions == interruptions else 0
        if after := wait_for_rows(connection, model, version, expected):
            _add_server_times(request_timer, after - before, sent)
    timer.merge(request_timer)
    return Embedded(found[:, :dim], valid, found[:, dim:] if contract.tile_head else None)


def _add_server_times(timer: StageTimer, served: ModelStatistics, sent: int) -> None:
    """Add what the server did for the `sent` rows, and take it from the time of sending."""
    if served.rows >= sent:
        share = sent / served.rows  # of all it did meanwhile, for any client
        timer.add("queue", share * served.queue_s)
        timer.add("compute", share * served.execution_s)
        timer.add("send", -min(share * served.request_s, timer.seconds("send")))


def row_outputs(contract: Contract) -> list[str]:
    """The outputs of `tile_encoder` that make a tile's row: the embedding and, with a tile head, logits."""
    return [name for name in contract.tile_outputs if name != "PATCH_TOKENS"]


def row_width(contract: Contract) -> int:
    """Numbers in a tile's row."""
    return sum(contract.tile_outputs[name][0] for name in row_outputs(contract))


def chunk_size(throughput: Throughput, contract: Contract) -> int:
    """Tiles per request: `throughput.chunk`, at most (and by default) the model's batch size."""
    return min(throughput.chunk or contract.tile.max_batch, contract.tile.max_batch)


def _timed(tiles: Iterator[TileBatch], timer: StageTimer) -> Generator[TileBatch]:
    while True:
        with timer.time("wait-read"):
            batch = next(tiles, None)
        if batch is None:
            return
        timer.add("read", batch.read_seconds, batch.pixels.nbytes)
        timer.add("resize", batch.resize_seconds)
        yield batch
