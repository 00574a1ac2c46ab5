"""The contract: what a served model was exported from and how its inputs and outputs are meant.

The export writes it as JSON into the parameter `contract` of every served model's configuration, and Triton
hands it out with that. The client scores only what agrees with it and writes it into every output.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ClientError
from ..slides.tiling import TilePlan
from .connection import Connection

SCHEMA = 1
MODELS = ("tile_encoder", "slide_encoder", "slide_occlusion", "slide_pipeline")

T = TypeVar("T")


class ContractError(ClientError):
    """A server's contract is missing, unreadable, or not what the client's plan needs."""


@dataclass(frozen=True)
class TileEncoderContract:
    """The tile encoder's name, the digest of its weights and the width D of an embedding."""

    name: str
    weights_sha256: str
    embed_dim: int


@dataclass(frozen=True)
class SlideEncoderContract:
    """The slide encoder's name, digest, width E, depth L and dilated attention."""

    name: str
    weights_sha256: str
    embed_dim: int
    depth: int
    segment_lengths: tuple[int, ...]
    dilations: tuple[int, ...]


@dataclass(frozen=True)
class HeadContract:
    """The classification head: digest, class names in the order of LOGITS, what kind of classes they are."""

    weights_sha256: str
    classes: tuple[str, ...]
    kind: str

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Class probabilities [..., C] of logits [..., C]: softmax for `multiclass`, else a sigmoid each."""
        x = logits.astype(np.float64)
        if self.kind == "multiclass":
            x = np.exp(x - x.max(axis=-1, keepdims=True))
            x /= x.sum(axis=-1, keepdims=True)
        else:
            x = 1 / (1 + np.exp(-x))
        return np.asarray(x, np.float32)


@dataclass(frozen=True)
class TileContract:
    """A tile: `size_px` at `mpp`, of which the central `crop_px` are sent, at most `max_batch` a request."""

    size_px: int
    crop_px: int
    mpp: float
    max_batch: int


@dataclass(frozen=True)
class VariantContract:
    """Which of the field's slide embeddings SLIDE is."""

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
    """The most tiles of a slide and the side of the position grid."""

    max_tiles: int
    grid: int


@dataclass(frozen=True)
class Contract:
    """Everything a client has to know about one export, the same in all its models."""

    schema: int
    export_id: str
    version: int
    preset: str
    trained: bool
    tile_encoder: TileEncoderContract
    slide_encoder: SlideEncoderContract
    head: HeadContract | None
    tile: TileContract
    variant: VariantContract
    precision: str
    occlusion: OcclusionContract
    limits: LimitsContract
    versions: dict[str, str]
    text: str = dataclasses.field(repr=False, compare=False, default="")

    @staticmethod
    def parse(text: str) -> Contract:
        """Read a contract from the JSON a server carries.

        Raises:
            ContractError: not JSON, another schema, a field missing or of another type.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ContractError(
                f"the server's contract is not JSON ({error}); export the model again"
            ) from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ContractError(
                f"the server's contract has schema {schema!r}, this client reads {SCHEMA}: "
                "export the model again, or use the client of that export"
            )
        return _read(Contract, {**data, "text": text}, "contract")

    def check_plan(self, plan: TilePlan) -> None:
        """Refuse a plan whose tiles are not what the model was made for.

        Raises:
            ContractError: another tile size, crop or scale, another order, or too many tiles.
        """
        tile = self.tile
        wanted = {"tile px": tile.size_px, "crop px": tile.crop_px, "mpp": tile.mpp}
        planned = {"tile px": plan.tile_px, "crop px": plan.crop_px, "mpp": plan.mpp_requested}
        wrong = [
            f"{name} {planned[name]:g} instead of {wanted[name]:g}"
            for name in wanted
            if planned[name] != wanted[name]
        ]
        if wrong:
            raise ContractError(
                f"{plan.path}: planned with {', '.join(wrong)}: plan as the served model's contract says"
            )
        if self.variant.order != "row-major":
            raise ContractError(
                f"the model wants tiles in {self.variant.order} order, this client sends row-major"
            )
        if len(plan) > self.limits.max_tiles:
            raise ContractError(
                f"{plan.path}: {len(plan)} tiles are more than the {self.limits.max_tiles} the model takes: "
                "raise --min-tissue or give a --mask"
            )

    def grid_coordinates(
        self, coords: NDArray[np.int64], *, tile_size_level0: tuple[int, int], mpp_level0: tuple[float, float]
    ) -> NDArray[np.int64]:
        """Level-0 pixels [N, 2] in the frame that COORDS is meant in, where a grid index is COORDS // 256.

        Rules: `level0/256` leaves them as they are, `level0/patch_size_level0` gives
        floor(x·256/patch_size_level0), `target-mpp/256` floor(x·mpp_level0/mpp); pairs are (x, y).

        Raises:
            ContractError: the rule is unknown, or a tile lies outside the position grid; the first is named.
        """
        size, rule = self.tile.size_px, self.variant.coordinates
        if rule == "level0/256":
            frame = coords
        elif rule == "level0/patch_size_level0":
            frame = coords * size // np.array(tile_size_level0)
        elif rule == "target-mpp/256":
            frame = np.floor(coords * (np.array(mpp_level0) / self.tile.mpp)).astype(np.int64)
        else:
            raise ContractError(
                f"the contract's coordinate rule {rule!r} is unknown to this client: update it"
            )
        outside = ((frame < 0) | (frame // 256 >= self.limits.grid)).any(axis=1)
        if outside.any():
            i = int(outside.argmax())
            raise ContractError(
                f"tile {i} at level-0 ({coords[i, 0]}, {coords[i, 1]}) lies outside the model's position "
                f"grid of {self.limits.grid}x{self.limits.grid} (rule {rule}): score a smaller region"
            )
        return frame.astype(np.int64)


def read_contract(connection: Connection) -> Contract:
    """The contract that all servers and all their models carry.

    Raises:
        ContractError: a model has none, or two of them differ.
        ServerUnavailable, RequestRefused: a server can't be asked.
    """
    found: dict[str, tuple[Contract, str]] = {}
    for model in MODELS:
        for server, config in connection.model_configs(model).items():
            contract = _contract_in(config, f"{model} at {server}")
            found.setdefault(contract.export_id, (contract, f"{model} at {server}"))
    if len(found) > 1:
        (one, here), (two, there) = list(found.values())[:2]
        raise ContractError(
            f"{here} serves export {one.export_id}, {there} {two.export_id}: serve one export everywhere"
        )
    return next(iter(found.values()))[0]


def check_same(connection: Connection, contract: Contract) -> None:
    """Raise a ContractError where a server no longer serves the export that the work began with."""
    for _ in connection.endpoint.servers:
        now = _contract_in(connection.model_config("tile_encoder"), "tile_encoder")
        if now.export_id != contract.export_id:
            raise ContractError(
                f"the server changed from export {contract.export_id} to {now.export_id} meanwhile: run again"
            )


def _contract_in(config: Any, where: str) -> Contract:
    if "contract" not in config.parameters:
        raise ContractError(
            f"{where} carries no contract, so nobody knows what it computes: "
            "export it with `python -m export` and start the server again"
        )
    return Contract.parse(config.parameters["contract"].string_value)


def _read(kind: type[T], value: Any, where: str) -> T:
    """`value` (parsed JSON) as `kind`: a dataclass, tuple[x, ...], dict[str, x], x | None or a plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    result: Any = value
    if dataclasses.is_dataclass(kind):
        _expect(isinstance(value, dict), where, "an object", value)
        hints = typing.get_type_hints(kind)
        missing = hints.keys() - value.keys()
        _expect(not missing, where, f"the field(s) {', '.join(sorted(missing))}", value)
        return kind(**{name: _read(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin in (typing.Union, types.UnionType):
        return typing.cast(T, None if value is None else _read(arguments[0], value, where))
    if origin is tuple:
        _expect(isinstance(value, list), where, "a list", value)
        result = tuple(_read(arguments[0], item, where) for item in value)
    elif origin is dict:
        _expect(isinstance(value, dict), where, "an object", value)
        result = {str(name): _read(arguments[1], item, where) for name, item in value.items()}
    elif kind is float:
        _expect(isinstance(value, int | float) and not isinstance(value, bool), where, "a number", value)
        result = float(value)
    else:
        _expect(type(value) is kind, where, f"a {kind.__name__}", value)
    return typing.cast(T, result)


def _expect(holds: bool, where: str, what: str, value: Any) -> None:
    if not holds:
        raise ContractError(
            f"the server's {where} should be or have {what}, not {value!r:.80}; export the model again"
        )
