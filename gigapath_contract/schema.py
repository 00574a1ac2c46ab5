"""The contract: what a served model was exported from and how its inputs and outputs are meant.

One JSON document, the same in all four models of one export. The export writes it into the parameter
`contract` of every model's configuration, where the client reads it through Triton's own API.
`docs/export.md` explains every field.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from gigapath_contract.coordinates import LevelZeroScale, grid_coordinates
from gigapath_contract.errors import ContractError
from gigapath_contract.files import parse_json
from gigapath_contract.probabilities import HeadKind, probabilities

SCHEMA = 1
GRAPHS = ("tile_encoder", "slide_encoder", "slide_occlusion")
MODELS = (*GRAPHS, "slide_pipeline")  # an ensemble, without a graph

T = TypeVar("T")


@dataclass(frozen=True)
class TileEncoderContract:
    """The tile encoder's name, the digest of its weights and the width D of an embedding."""

    name: str
    weights_sha256: str
    embed_dim: int


@dataclass(frozen=True)
class SlideEncoderContract:
    """The slide encoder's name, digest, width E, depth L, and segment lengths and dilations in tokens."""

    name: str
    weights_sha256: str
    embed_dim: int
    depth: int
    segment_lengths: tuple[int, ...]
    dilations: tuple[int, ...]


@dataclass(frozen=True)
class HeadContract:
    """A classification head; `classes` are in the order of its logits."""

    weights_sha256: str
    classes: tuple[str, ...]
    kind: HeadKind

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Class probabilities float32 [..., C] of logits [..., C]."""
        return probabilities(logits, self.kind).astype(np.float32)


@dataclass(frozen=True)
class TileContract:
    """A tile: `size_px` at `mpp` (µm per pixel); the central `crop_px` are sent, `max_batch` per request."""

    size_px: int = 256
    crop_px: int = 224
    mpp: float = 0.5
    max_batch: int = 64


@dataclass(frozen=True)
class VariantContract:
    """Which of the public "GigaPath slide embeddings" SLIDE is."""

    pooling: str
    layer: int
    norm: str
    coordinates: str
    order: str


@dataclass(frozen=True)
class OcclusionContract:
    """Precision of `slide_occlusion` and how many tokens, M·(N+1), one request may hold."""

    precision: str
    max_mask_tokens: int


@dataclass(frozen=True)
class LimitsContract:
    """The most tiles of a slide, and the side of the position grid in tiles."""

    max_tiles: int = 200_000
    grid: int = 1000


@dataclass(frozen=True)
class Contract:
    """Everything a client has to know about one export.

    `head` is that on the slide embedding, `tile_head` that on a tile's; `patch_tokens` is the number of
    tokens of a tile, class token included, where they are an output. Where None, the last two are absent in
    JSON.
    """

    export_id: str
    version: int
    preset: str
    trained: bool
    tile_encoder: TileEncoderContract
    slide_encoder: SlideEncoderContract
    head: HeadContract | None
    variant: VariantContract
    precision: str
    occlusion: OcclusionContract
    versions: dict[str, str]
    tile: TileContract = TileContract()
    limits: LimitsContract = LimitsContract()
    schema: int = SCHEMA
    tile_head: HeadContract | None = None
    patch_tokens: int | None = None

    @property
    def tile_outputs(self) -> dict[str, tuple[int, ...]]:
        """The outputs of `tile_encoder` by name, with their dims for one tile."""
        dim = self.tile_encoder.embed_dim
        outputs: dict[str, tuple[int, ...]] = {"EMBEDDINGS": (dim,)}
        if self.tile_head is not None:
            outputs["TILE_LOGITS"] = (len(self.tile_head.classes),)
        if self.patch_tokens is not None:
            outputs["PATCH_TOKENS"] = (self.patch_tokens, dim)
        return outputs

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, so that equal contracts are equal bytes."""
        fields = dataclasses.asdict(self)
        absent = {name for name in _may_be_absent(Contract) if fields[name] is None}
        return json.dumps({name: fields[name] for name in fields.keys() - absent}, sort_keys=True)

    @staticmethod
    def parse(text: str) -> Contract:
        """Read a contract from JSON; every field must be there and of its type, others are ignored.

        Raises:
            ContractError: not JSON, another schema, a field missing, of another type or out of range.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ContractError(f"the contract is not JSON ({error})") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ContractError(f"the contract has schema {schema!r}, this release reads {SCHEMA}")
        contract = _read(Contract, data, "contract")
        tile, limits = contract.tile, contract.limits
        _expect(0 < tile.crop_px <= tile.size_px, "contract.tile", "0 < crop_px <= size_px", tile)
        tokens = 1 if contract.patch_tokens is None else contract.patch_tokens
        least = min(tile.max_batch, limits.max_tiles, limits.grid, contract.tile_encoder.embed_dim, tokens)
        _expect(least > 0, "contract", "positive sizes and limits", least)
        return contract

    def grid_coordinates(self, coords: NDArray[Any], scale: LevelZeroScale) -> NDArray[np.int64]:
        """Level-0 pixels [N, 2] as COORDS [N, 2], by the variant's coordinate rule; pairs are (x, y).

        Raises:
            CoordinateError: see `gigapath_contract.coordinates.grid_coordinates`.
        """
        rule, mpp, grid = self.variant.coordinates, self.tile.mpp, self.limits.grid
        return grid_coordinates(coords, rule, scale, target_mpp=mpp, grid=grid)


def _read(kind: type[T], value: Any, where: str) -> T:
    """Parsed JSON as `kind`: a dataclass, tuple[x, ...], dict[str, x], x | None, Literal or a plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    result: Any = value
    if dataclasses.is_dataclass(kind):
        _expect(isinstance(value, dict), where, "an object", value)
        hints = typing.get_type_hints(kind)
        missing = hints.keys() - value.keys() - _may_be_absent(kind)
        _expect(not missing, where, f"the field(s) {', '.join(sorted(missing))}", value)
        found = {name: _read(hint, value.get(name), f"{where}.{name}") for name, hint in hints.items()}
        return kind(**found)
    if origin in (typing.Union, types.UnionType):
        return typing.cast(T, None if value is None else _read(arguments[0], value, where))
    if origin is tuple:
        _expect(isinstance(value, list), where, "a list", value)
        result = tuple(_read(arguments[0], item, where) for item in value)
    elif origin is dict:
        _expect(isinstance(value, dict), where, "an object", value)
        result = {str(name): _read(arguments[1], item, where) for name, item in value.items()}
    elif origin is Literal:
        _expect(value in arguments, where, f"one of {', '.join(arguments)}", value)
    elif kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect(number and 0 < value < 1e300, where, "a positive number", value)
        result = float(value)
    else:
        _expect(type(value) is kind, where, f"a {kind.__name__}", value)
        _expect(kind is not int or 0 <= value < 2**63, where, "a count", value)
    return typing.cast(T, result)


def _may_be_absent(kind: Any) -> set[str]:
    """The fields of a dataclass that are left out of its JSON where they are None."""
    return {field.name for field in dataclasses.fields(kind) if field.default is None}


def _expect(holds: bool, where: str, what: str, value: Any) -> None:
    if not holds:
        raise ContractError(f"{where} should be or have {what}, not {value!r:.80}")
