"""The client's side of the attribution benchmark, for a process whose memory is measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import peak_bytes
from client.attribution.attribute import Settings
from client.attribution.explain import explain
from client.attribution.model.embedded import EmbeddedSlide
from client.attribution.model.served import ServedForward
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint

Mask = NDArray[np.bool_]
MASKS_PER_CALL = 64


@dataclass(frozen=True)
class Served:
    """Logits [M, C] and what they took; `peak_bytes` is this process's peak so far."""

    logits: NDArray[np.float32]
    seconds: float
    bytes_sent: int
    requests: int
    peak_bytes: int


@dataclass(frozen=True)
class DefaultMap:
    """The default method and budget on the same slide."""

    seconds: float
    masks: int
    forwards: int
    bytes_sent: int
    completeness_gap: float


def score_masks(url: str, slide: EmbeddedSlide, keep: Mask) -> Served:
    """All masks `keep` [M, N] through `slide_occlusion`, as the methods send them."""
    with Connection(Endpoint(url)) as connection:
        contract = read_contract(connection)
        forward = ServedForward(connection, contract)
        coords = slide.model_coords(contract)
        start = time.perf_counter()
        logits = [
            forward(slide.embeddings, coords, keep[first : first + MASKS_PER_CALL]).logits
            for first in range(0, len(keep), MASKS_PER_CALL)
        ]
        seconds = time.perf_counter() - start
    return Served(np.concatenate(logits), seconds, forward.bytes_sent, forward.requests, peak_bytes())


def default_map(url: str, slide: EmbeddedSlide, *, checks: bool) -> DefaultMap:
    """`client attribute` without its files."""
    with Connection(Endpoint(url)) as connection:
        contract = read_contract(connection)
        forward = ServedForward(connection, contract)
        start = time.perf_counter()
        found = explain(slide, forward, contract, Settings(), checks=checks)
        seconds = time.perf_counter() - start
    gap = float(found.attribution.completeness_gap.max())
    cost = found.masked_slide.cost
    return DefaultMap(seconds, found.attribution.evaluations, cost.forwards, forward.bytes_sent, gap)
