"""The tiles that look most like one, by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from gigapath_contract.errors import ContractError

from ..arrays import Float32
from ..errors import ClientError
from ..outputs.hdf5 import StoredFeatures, read_features
from .library import Entry, Library

COUNT = 8


class Near(NamedTuple):
    """A tile by its slide, row and level-0 corner and size (x, y), and the cosine to the one asked about."""

    similarity: float
    entry: Entry
    row: int
    corner: tuple[int, ...]
    size: tuple[int, int]


def nearest(library: Library, entry: Entry, row: int, among: Iterable[Entry]) -> list[dict[str, Any]]:
    """The `COUNT` nearest of the valid tiles of some slides to a tile, itself left out.

    One slide's embeddings are in memory at a time. Slides of another tile encoder are passed over, and so are
    those that cannot be read.

    Raises:
        ClientError: the tile's own file cannot be read, or it has no such valid tile.
    """
    own = _read(entry)
    if not (0 <= row < len(own.valid) and own.valid[row]):
        raise ClientError(f"{entry.slide_id}: tile {row} has no embedding: choose another")
    wanted, encoder = _unit(own.embeddings[[row]])[0], own.attributes.get("encoder_sha256")
    found: list[Near] = []
    for other in among:
        try:
            stored = _read(other)
        except (ClientError, ContractError):
            continue  # its own page says what is wrong
        if stored.embeddings.shape[1] != len(wanted) or stored.attributes.get("encoder_sha256") != encoder:
            continue
        rows = np.flatnonzero(stored.valid)
        alike = _unit(stored.embeddings[rows]) @ wanted
        size = stored.scale.tile_size or (1, 1)
        for i in np.argsort(-alike, kind="stable")[: COUNT + 1].tolist():
            if (other.key, rows[i]) != (entry.key, row):
                corner = tuple(map(int, stored.coords[rows[i]]))
                found.append(Near(float(alike[i]), other, int(rows[i]), corner, size))
        found = sorted(found, key=lambda near: -near.similarity)[:COUNT]
    return [_shown(library, near) for near in found]


def _read(entry: Entry) -> StoredFeatures:
    if entry.stored is None:
        raise ClientError(f"{entry.slide_id}: has no embeddings: score it first")
    return read_features(entry.stored.features)


def _unit(embeddings: Float32) -> Float32:
    wide = np.asarray(embeddings, np.float32)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30))


def _shown(library: Library, near: Near) -> dict[str, Any]:
    """A neighbour for the page, with what it needs to draw it; no picture where the slide is not there."""
    slide: dict[str, Any] = {"key": near.entry.key, "slide_id": near.entry.slide_id, "deep_zoom": None}
    try:
        tiles = library.open(near.entry)
        slide |= {
            "deep_zoom": {"tile": tiles.tile, "levels": tiles.levels},
            "dimensions": tiles.slide.dimensions,
        }
    except ClientError:
        pass  # named on the slide's own page
    found = {name: getattr(near, name) for name in ("row", "corner", "size", "similarity")}
    return {"slide": slide, **found}
