"""Refuse a request whose lengths contradict each other or that is beyond the contract's limits.

The contract is the parameter `contract` of the served configuration (`gigapath_contract.schema`). Our client
keeps to it; this is for all others. A refusal is a ValueError of one line, which the backend turns into
INVALID_ARGUMENT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CELL = 256
"""Side of a position cell in COORDS (`gigapath_contract.coordinates`, which a container doesn't have)."""
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Limits:
    """The most tiles N of a slide, the most tokens M * (N + 1) of a request, the grid's side in cells."""

    tiles: int
    mask_tokens: int
    grid: int


def read_limits(config: Mapping[str, Any]) -> Limits | None:
    """The limits that a model configuration's contract sets; None without a contract.

    Raises ValueError or KeyError where the contract can't be read: the model must not load then.
    """
    parameter = config.get("parameters", {}).get("contract")
    if parameter is None:
        return None
    contract = json.loads(parameter["string_value"])
    limits = contract["limits"]
    return Limits(limits["max_tiles"], contract["occlusion"]["max_mask_tokens"], limits["grid"])


def check_lengths(arrays: Arrays, shapes: Mapping[str, Sequence[int | str]]) -> None:
    """Raise ValueError unless a dimension that the graph gives one name has one length in all inputs.

    `shapes` are the graph's, by input: ONNX Runtime itself compares only dimensions that are numbers.
    """
    lengths: dict[str, tuple[str, int]] = {}
    for name, array in arrays.items():
        for dim, length in zip(shapes[name], array.shape, strict=True):
            if isinstance(dim, int):
                continue
            first, expected = lengths.setdefault(dim, (name, length))
            if length != expected:
                raise ValueError(f"dimension mismatch: {dim} is {expected} in {first}, {length} in {name}")


def check_limits(arrays: Arrays, limits: Limits) -> None:
    """Raise ValueError unless a slide's inputs keep to `limits`; other inputs pass.

    Sizes come first, so that what is too large is refused without being read.
    """
    embeddings, coords = arrays.get("EMBEDDINGS"), arrays.get("COORDS")
    if embeddings is not None:
        check_sizes(len(embeddings), len(arrays.get("KEEP", ())), limits)
        if "KEEP" in arrays and not len(arrays["KEEP"]):
            raise ValueError("KEEP has no mask: send one at least")
    if coords is not None:
        end = limits.grid * CELL
        outside = ((coords < 0) | (coords >= end)).any(axis=1)
        if outside.any():
            tile = int(outside.argmax())
            raise ValueError(
                f"COORDS of tile {tile} are {tuple(coords[tile].tolist())}, out of data bounds: "
                f"the grid goes from 0 to {end - 1}"
            )
    if embeddings is not None:
        wrong = ~np.isfinite(embeddings.sum(axis=1, dtype=np.float64))  # no sum of floats overflows there
        if "KEEP" in arrays and wrong.any():
            wrong &= arrays["KEEP"].any(axis=0)  # a tile that no mask keeps is not read
        if wrong.any():
            raise ValueError(f"EMBEDDINGS of tile {int(wrong.argmax())} are not finite")


def check_sizes(tiles: int, masks: int, limits: Limits) -> None:
    """Raise ValueError unless a slide has neither too many tiles nor, for a request, too many masks."""
    if not 1 <= tiles <= limits.tiles:
        raise ValueError(f"a slide of {tiles} tiles: this export takes 1 to {limits.tiles}")
    tokens = masks * (tiles + 1)
    if tokens > limits.mask_tokens:
        raise ValueError(
            f"{masks} masks of {tiles} tiles are {tokens} tokens, this export takes {limits.mask_tokens} "
            "per request: send fewer masks at a time"
        )
