"""The contract: what is served, in the words that a client needs to score against it.

One JSON document, the same in all four models of one export. It travels as the config parameter `contract`,
so that a client reads it through Triton's own API; `client/triton/contract.py` holds a slide's plan to it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

SCHEMA = 1
MODELS = ("tile_encoder", "slide_encoder", "slide_occlusion", "slide_pipeline")


@dataclass(frozen=True)
class TileEncoderPart:
    """The tile encoder: its architecture's name, the digest of its weights, and D."""

    name: str
    weights_sha256: str
    embed_dim: int


@dataclass(frozen=True)
class SlideEncoderPart:
    """The slide encoder: name, digest, E, L, and the dilated attention's geometry in tokens."""

    name: str
    weights_sha256: str
    embed_dim: int
    depth: int
    segment_lengths: tuple[int, ...]
    dilations: tuple[int, ...]


@dataclass(frozen=True)
class HeadPart:
    """The classifier on the slide embedding; `kind` is multiclass, multilabel or binary."""

    weights_sha256: str
    classes: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class TilePart:
    """What a tile must be: cut at `size_px` and `mpp` (micrometres a pixel), its centre `crop_px` sent."""

    size_px: int = 256
    crop_px: int = 224
    mpp: float = 0.5
    max_batch: int = 64


@dataclass(frozen=True)
class VariantPart:
    """Which of the public "GigaPath slide embeddings" SLIDE is."""

    pooling: str
    layer: int
    norm: str
    coordinates: str
    order: str


@dataclass(frozen=True)
class OcclusionPart:
    """`slide_occlusion`: its precision, and how many mask-tokens M*(N+1) one request may hold."""

    precision: str
    max_mask_tokens: int


@dataclass(frozen=True)
class LimitsPart:
    """The most tiles of a slide, and the side of the position table in tiles."""

    max_tiles: int = 200_000
    grid: int = 1000


@dataclass(frozen=True)
class Contract:
    """See `docs/export.md` for every field in a sentence."""

    export_id: str
    version: int
    preset: str
    trained: bool
    tile_encoder: TileEncoderPart
    slide_encoder: SlideEncoderPart
    head: HeadPart | None
    variant: VariantPart
    precision: str
    occlusion: OcclusionPart
    versions: dict[str, str]
    tile: TilePart = TilePart()
    limits: LimitsPart = LimitsPart()
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, so that equal contracts are equal bytes."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def read_contract(text: str) -> dict[str, Any]:
    """A written contract as plain data."""
    contract: dict[str, Any] = json.loads(text)
    return contract
