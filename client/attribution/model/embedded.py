"""A slide's embeddings and where its tiles lie, from the HDF5 file that `client score` wrote."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gigapath_contract.coordinates import LevelZeroScale, read_scale
from gigapath_contract.errors import ContractError
from gigapath_contract.schema import Contract

from ...arrays import Float32, Int64
from ...errors import ClientError, ContractMismatch
from ...outputs.hdf5 import read_features
from ...scoring.conformance import grid_coordinates


@dataclass(frozen=True, eq=False)
class EmbeddedSlide:
    """The valid tiles of one slide in row-major order; pairs are (x, y).

    Attributes:
        rows: each tile's row in the file.
        total: number of rows in the file, those of invalid tiles included.
        tile_size, step: size of a tile and step of the grid, in level-0 px.
        dimensions: size of level 0, None if unknown.
    """

    slide_id: str
    embeddings: Float32  # [N, D]
    coords: Int64  # [N, 2]
    rows: Int64  # [N]
    total: int
    tile_size: tuple[int, int]
    step: tuple[int, int]
    mpp_level0: tuple[float, float] | None
    dimensions: tuple[int, int] | None
    encoder_sha256: str | None

    @property
    def digest(self) -> str:
        """The first 16 hex digits of the embeddings' SHA-256."""
        return hashlib.sha256(np.ascontiguousarray(self.embeddings).data).hexdigest()[:16]

    @property
    def cell_mm2(self) -> float | None:
        """The area of one cell of the tile grid in mm², None where the slide's mpp is unknown."""
        if self.mpp_level0 is None:
            return None
        return float(np.prod(self.step) * np.prod(self.mpp_level0) / 1e6)

    def model_coords(self, contract: Contract) -> Int64:
        """The tiles' coordinates [N, 2] by the contract's rule.

        Raises:
            ContractMismatch: the rule needs the slide's mpp, which the file lacks; a tile off the grid.
        """
        return grid_coordinates(contract, self.coords, LevelZeroScale(self.tile_size, self.mpp_level0))

    def check(self, contract: Contract) -> None:
        """Refuse embeddings that the served model's tile encoder did not make.

        Raises:
            ContractMismatch: their width or the encoder's weights are not the contract's.
        """
        width, wanted = self.embeddings.shape[1], contract.tile_encoder.embed_dim
        if width != wanted:
            raise ContractMismatch(
                f"{self.slide_id}: embeddings of width {width}; the served model takes {wanted}"
            )
        if self.encoder_sha256 not in (None, contract.tile_encoder.weights_sha256):
            raise ContractMismatch(
                f"{self.slide_id}: its embeddings come from other tile-encoder weights than the server's: "
                "score the slide again, or serve the model it was scored with"
            )


def read_bank(path: Path) -> Float32:
    """Embeddings [B, D] of an H5 file's valid tiles, to draw replacements from.

    Raises:
        ClientError: no such file, not HDF5, or no valid tile.
    """
    stored = read_features(path)
    valid = stored.valid & np.isfinite(stored.embeddings).all(axis=1)
    if not valid.any():
        raise ClientError(f"{path}: holds no valid tile to draw from")
    return stored.embeddings[valid].astype(np.float32)


def read_embedded(path: Path) -> EmbeddedSlide:
    """Read `path`; needs `features`, `coords` and the tile's size in level-0 px, and no slide.

    Raises:
        ClientError: no such file, not HDF5, no valid tile, or no size of the tiles.
    """
    stored = read_features(path)
    valid = stored.valid & np.isfinite(stored.embeddings).all(axis=1)
    rows = np.flatnonzero(valid)
    if not len(rows):
        raise ClientError(f"{path}: holds no valid tile, so there is nothing to explain")
    coords = stored.coords[rows].astype(np.int64)
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    about: dict[str, Any] = dict(stored.coords_attributes)
    try:
        scale = read_scale({**stored.attributes, **about})
    except ContractError as error:
        raise ClientError(f"{path}: {error}") from error
    if scale.tile_size is None:
        raise ClientError(f"{path}: `coords` has no attribute patch_size_level0, so tiles have no size")
    tile_size = scale.tile_size
    overlap = float(about.get("overlap", 0)) / float(about.get("patch_size", 1) or 1)
    features = stored.attributes
    return EmbeddedSlide(
        slide_id=str(about.get("name", path.stem)),
        embeddings=stored.embeddings[rows][order].astype(np.float32),
        coords=coords[order],
        rows=rows[order].astype(np.int64),
        total=len(stored.valid),
        tile_size=tile_size,
        step=(max(1, round(tile_size[0] * (1 - overlap))), max(1, round(tile_size[1] * (1 - overlap)))),
        mpp_level0=scale.mpp,
        dimensions=(
            (int(about["level0_width"]), int(about["level0_height"]))
            if "level0_width" in about and "level0_height" in about
            else None
        ),
        encoder_sha256=str(features["encoder_sha256"]) if "encoder_sha256" in features else None,
    )
