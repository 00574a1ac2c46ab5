"""The client's side of `make bench-attribution`, in a process of its own so that its memory can be told."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.attribution.attribute import Settings
from client.attribution.explain import explain
from client.attribution.model.embedded import EmbeddedSlide
from client.attribution.model.served import ServedForward
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint

Mask = NDArray[np.bool_]
MASKS_A_CALL = 64


@dataclass(frozen=True)
class Served:
    """What a call to the server gave and took; `peak_bytes` is this process's own peak so far."""

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
        began = time.perf_counter()
        logits = [
            forward(slide.embeddings, coords, keep[start : start + MASKS_A_CALL]).logits
            for start in range(0, len(keep), MASKS_A_CALL)
        ]
        seconds = time.perf_counter() - began
    return Served(
        np.concatenate(logits), seconds, forward.bytes_sent, forward.requests, peak_bytes(os.getpid())
    )


def peak_bytes(pid: int) -> int:
    """A process's peak resident bytes, without its parent's as `getrusage` has them (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def default_map(url: str, slide: EmbeddedSlide, *, checks: bool) -> DefaultMap:
    """`client attribute` without its files."""
    with Connection(Endpoint(url)) as connection:
        contract = read_contract(connection)
        forward = ServedForward(connection, contract)
        began = time.perf_counter()
        found = explain(slide, forward, contract, Settings(), checks=checks)
        seconds = time.perf_counter() - began
    gap = float(found.attribution.completeness_gap.max())
    cost = found.masked_slide.cost
    return DefaultMap(seconds, found.attribution.evaluations, cost.forwards, forward.bytes_sent, gap)
