"""What a benchmark sends: requests of random content, in the shapes that the models are used with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from gigapath_contract.schema import Contract

from ..arrays import Array
from ..errors import ClientError


@dataclass(frozen=True)
class Load:
    """One kind of request: `items` (of `unit`: tiles, slides or masks) that `model` gets at once.

    `steps` are the models whose statistics count it: an ensemble's are those it runs; the first batches.
    """

    kind: str
    size: int
    model: str
    inputs: Mapping[str, Array] = field(repr=False)
    outputs: tuple[str, ...]
    items: int
    unit: str
    steps: tuple[str, ...]


def tiles_load(contract: Contract, chunk: int) -> Load:
    """`chunk` random tiles for the tile encoder."""
    inputs = {"TILES": _pixels(contract, chunk)}
    return Load("tiles", chunk, "tile_encoder", inputs, ("EMBEDDINGS",), chunk, "tiles", ("tile_encoder",))


def ensemble_load(contract: Contract, chunk: int) -> Load:
    """`chunk` random tiles through both encoders in one request."""
    inputs = {"TILES": _pixels(contract, chunk), "COORDS": _square(chunk)}
    # All outputs, for an ensemble can't leave out one that a later step reads (server#7482).
    outputs = ("EMBEDDINGS", "LAYERS", *_scores(contract))
    steps = ("tile_encoder", "slide_encoder")
    return Load("ensemble", chunk, "slide_pipeline", inputs, outputs, chunk, "tiles", steps)


def slides_load(contract: Contract, tiles: int) -> Load:
    """One slide of `tiles` random embeddings."""
    inputs = {"EMBEDDINGS": _embeddings(contract, tiles), "COORDS": _square(tiles)}
    steps = ("slide_encoder",)
    return Load("slides", tiles, "slide_encoder", inputs, _scores(contract), 1, "slides", steps)


def occlusion_load(contract: Contract, tiles: int) -> Load:
    """One slide of `tiles` random embeddings under as many masks as a request may hold, at most 64."""
    masks = min(64, contract.occlusion.max_mask_tokens // (tiles + 1))
    if not masks:
        raise ClientError(f"--slide-tiles {tiles}: the server takes no mask over so many tiles at once")
    inputs = {"EMBEDDINGS": _embeddings(contract, tiles), "COORDS": _square(tiles)}
    inputs["KEEP"] = np.random.default_rng(0).random((masks, tiles)) > 0.1
    steps = ("slide_occlusion",)
    return Load("occlusion", tiles, "slide_occlusion", inputs, _scores(contract), masks, "masks", steps)


LOADS: dict[str, Callable[[Contract, int], Load]] = {
    "tiles": tiles_load,
    "slides": slides_load,
    "ensemble": ensemble_load,
    "occlusion": occlusion_load,
}
"""The load of each kind, from the number of tiles in a request."""


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
