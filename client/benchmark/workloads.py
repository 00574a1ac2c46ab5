"""Workloads: requests of random content, in the shapes that the models are used with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from gigapath_contract.schema import Contract

from ..arrays import Array
from ..errors import ClientError


@dataclass(frozen=True)
class Workload:
    """One kind of request.

    Attributes:
        kind: its key in `WORKLOADS`.
        tiles_per_request: tiles, or embeddings of tiles, in one request.
        model, inputs, outputs: the request.
        items, unit: what one request counts as, such as 64 `tiles` or 1 of `slides`.
        steps: the models whose statistics count the request: those that an ensemble runs, in their order.
    """

    kind: str
    tiles_per_request: int
    model: str
    inputs: Mapping[str, Array] = field(repr=False)
    outputs: tuple[str, ...]
    items: int
    unit: str
    steps: tuple[str, ...]


def tiles_workload(contract: Contract, tiles: int) -> Workload:
    """Random tiles for the tile encoder."""
    inputs = {"TILES": _pixels(contract, tiles)}
    return Workload(
        "tiles", tiles, "tile_encoder", inputs, ("EMBEDDINGS",), tiles, "tiles", ("tile_encoder",)
    )


def ensemble_workload(contract: Contract, tiles: int) -> Workload:
    """Random tiles through both encoders in one request."""
    inputs = {"TILES": _pixels(contract, tiles), "COORDS": _square(tiles)}
    # All outputs, since an ensemble can't leave out one that a later step reads (server#7482).
    outputs = ("EMBEDDINGS", "LAYERS", *_scores(contract))
    steps = ("tile_encoder", "slide_encoder")
    return Workload("ensemble", tiles, "slide_pipeline", inputs, outputs, tiles, "tiles", steps)


def slides_workload(contract: Contract, tiles: int) -> Workload:
    """One slide of random embeddings."""
    inputs = {"EMBEDDINGS": _embeddings(contract, tiles), "COORDS": _square(tiles)}
    return Workload(
        "slides", tiles, "slide_encoder", inputs, _scores(contract), 1, "slides", ("slide_encoder",)
    )


def occlusion_workload(contract: Contract, tiles: int) -> Workload:
    """One slide of random embeddings under as many masks as a request may hold, at most 64."""
    masks = min(64, contract.occlusion.max_mask_tokens // (tiles + 1))
    if not masks:
        raise ClientError(
            f"--slide-tiles {tiles}: the server takes no mask over so large a slide: choose fewer tiles"
        )
    inputs = {"EMBEDDINGS": _embeddings(contract, tiles), "COORDS": _square(tiles)}
    inputs["KEEP"] = np.random.default_rng(0).random((masks, tiles)) > 0.1
    steps = ("slide_occlusion",)
    return Workload("occlusion", tiles, "slide_occlusion", inputs, _scores(contract), masks, "masks", steps)


WORKLOADS: dict[str, Callable[[Contract, int], Workload]] = {
    "tiles": tiles_workload,
    "slides": slides_workload,
    "ensemble": ensemble_workload,
    "occlusion": occlusion_workload,
}
"""The workload of each kind, from the number of tiles in a request.

Raise ClientError where the contract does not allow so many.
"""


def _pixels(contract: Contract, count: int) -> Array:
    if count > contract.tile.max_batch:
        raise ClientError(
            f"--chunk {count} is more than the {contract.tile.max_batch} tiles a request may hold"
        )
    px = contract.tile.crop_px
    return np.random.default_rng(0).integers(0, 256, (count, px, px, 3), np.uint8)


def _embeddings(contract: Contract, count: int) -> Array:
    return np.random.default_rng(0).standard_normal((count, contract.tile_encoder.embed_dim), np.float32)


def _square(count: int) -> Array:
    side = math.isqrt(count - 1) + 1
    return 256 * np.stack(np.divmod(np.arange(count), side)[::-1], axis=1)


def _scores(contract: Contract) -> tuple[str, ...]:
    return ("SLIDE", "LOGITS") if contract.head else ("SLIDE",)
