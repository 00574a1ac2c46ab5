"""A slide's embeddings and where its tiles lie, from the HDF5 file that `client score` wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gigapath_contract.coordinates import LevelZeroScale
from gigapath_contract.errors import ContractError
from gigapath_contract.schema import Contract
from gigapath_contract.slides import is_file_name

from ...arrays import Float32, Int64
from ...errors import ClientError, ContractMismatch
from ...outputs.hdf5 import new_file, read_features, stored_attributes
from ...outputs.layout import StoredSlide
from ...scoring.conformance import grid_coordinates
from ...slides.fingerprint import slide_sha256
from ...slides.slide import Slide


@dataclass(frozen=True, eq=False)
class EmbeddedSlide:
    """The valid tiles of one slide in row-major order; pairs are (x, y).

    Attributes:
        rows: each tile's row in the file.
        total: number of rows in the file, those of invalid tiles included.
        tile_size, step: size of a tile and step of the grid, in level-0 px.
        dimensions: size of level 0, None if unknown.
        encoder_sha256: digest of the tile encoder's weights, None if unknown.
        origin: the contract of the export that embedded the slide, None if unknown.
        slide_sha256: digest of the slide (see `slides.fingerprint`), None if unknown.
        bounds_origin: where the slide's bounds begin, QuPath's (0, 0), in level-0 px; None if unknown.
        assumed: what was assumed about the coordinates; empty where the file says all.
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
    origin: Contract | None = None
    slide_sha256: str | None = None
    bounds_origin: tuple[int, int] | None = None
    assumed: str = ""

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
            ContractMismatch: their width, the encoder's weights, or the tiles' size, crop or mpp are not the
                contract's.
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
        if self.origin is not None and self.origin.tile != replace(
            contract.tile, max_batch=self.origin.tile.max_batch
        ):
            raise ContractMismatch(
                f"{self.slide_id}: embedded from {_tile(self.origin)}, the served model takes "
                f"{_tile(contract)}: score the slide again"
            )

    def check_slide(self, slide: Slide) -> None:
        """Refuse another slide than the one that was embedded, by its size and by its content.

        Raises:
            ClientError: it is another one.
        """
        size = "x".join(str(side) for side in slide.dimensions)
        if self.dimensions not in (None, slide.dimensions) or (self.coords >= slide.dimensions).any():
            own = "x".join(str(side) for side in self.dimensions or self.coords.max(axis=0))
            raise ClientError(
                f"{slide.path}: has {size} px, but the tiles of {self.slide_id} lie on {own} px: give the "
                "slide that was scored"
            )
        if self.slide_sha256 not in (None, slide_sha256(slide.path)):
            raise ClientError(
                f"{slide.path}: is not the slide that {self.slide_id} was scored on, or was changed since "
                "(its SHA-256 differs): give that one, or score this one"
            )

    def placed(self, slide: Slide | None) -> EmbeddedSlide:
        """With the mpp and QuPath's (0, 0) of the slide, as it was opened, where the file lacks them.

        `assumed` then says what is odd about the slide, such as a given mpp that contradicts it, for another
        tool's file; and without the slide that an unknown (0, 0) is taken for level 0's.
        """
        if slide is not None:
            odd = slide.notes if self.origin is None else []
            found = replace(self, mpp_level0=self.mpp_level0 or slide.mpp, bounds_origin=slide.bounds[:2])
        elif self.bounds_origin is None:
            odd = ["QuPath's (0, 0) is taken for level 0's: give --slide if the slide has bounds"]
            found = replace(self, bounds_origin=(0, 0))
        else:
            return self
        return replace(found, assumed="; ".join(filter(None, (self.assumed, *odd))))

    def doubt(self, contract: Contract) -> str:
        """What is uncertain about embeddings that pass `check`, as one line; empty where nothing is."""
        return "; ".join(filter(None, (self._doubt_of_encoder(contract), self.assumed)))

    def _doubt_of_encoder(self, contract: Contract) -> str:
        if self.encoder_sha256 is None:
            return (
                "the file does not say which tile encoder made its embeddings: this holds only if it was the "
                "server's"
            )
        if self.origin is None or self.origin.export_id == contract.export_id:
            return ""
        precision = (
            f" in {self.origin.precision}, not {contract.precision}"
            if self.origin.precision != contract.precision
            else ""
        )
        return (
            f"embedded by export {self.origin.export_id} with the same tile encoder{precision}, explained by "
            f"export {contract.export_id}: scores stored earlier may differ"
        )


def read_bank(path: Path, contract: Contract) -> tuple[Float32, str]:
    """Embeddings [B, D] of an H5 file's valid tiles, to draw from, and what is uncertain of them.

    Raises:
        ClientError: no such file, not HDF5, or no valid tile.
        ContractMismatch: another tile encoder than the contract's made them.
    """
    stored = read_features(path, positions=False)
    if not stored.valid.any():
        raise ClientError(f"{path}: holds no valid tile to draw from")
    encoder = stored.attributes.get("encoder_sha256")
    if encoder not in (None, contract.tile_encoder.weights_sha256):
        raise ContractMismatch(
            f"{path}: its embeddings come from other tile-encoder weights than the server's: score the slide "
            "again, or take another bank"
        )
    unknown = f"{path.name} does not say which tile encoder made the embeddings that replace others"
    return stored.embeddings[stored.valid].astype(np.float32), "" if encoder else unknown


def read_embedded(path: Path, tile_size: int | None = None, mpp: float | None = None) -> EmbeddedSlide:
    """Read `path`, a file of ours, TRIDENT's, CLAM's or STAMP's; the slide is not needed.

    tile_size, mpp: the tiles' side in level-0 px and the slide's mpp, where the file does not say.

    Raises:
        ClientError: no such file, not HDF5, no valid tile, no size of the tiles, or an unreadable contract.
    """
    stored = read_features(path, tile_size, mpp)
    rows = np.flatnonzero(stored.valid)
    if not len(rows):
        raise ClientError(f"{path}: holds no valid tile, so there is nothing to explain")
    coords = stored.coords[rows].astype(np.int64)
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    about: dict[str, Any] = dict(stored.coords_attributes)
    if stored.scale.tile_size is None:
        raise ClientError(
            f"{path}: does not say how large its tiles are (`coords` has no patch_size_level0): give their "
            "side in level-0 px by --tile-size"
        )
    tile_size_level0 = stored.scale.tile_size
    try:
        overlap = float(about.get("overlap", 0)) / float(about.get("patch_size", 1) or 1)
        width, height = (int(about.get(f"level0_{side}", 0)) for side in ("width", "height"))
        left, top = (int(start) for start in about.get("bounds_origin", (-1, -1)))
    except (TypeError, ValueError, OverflowError) as error:
        raise ClientError(f"{path}: the attributes of `coords` make no sense ({error})") from error
    if not 0 <= overlap < 1:
        raise ClientError(f"{path}: the tiles overlap by {overlap:g} of their size, which no tiles do")
    slide_id = str(about.get("name", path.stem))
    if not is_file_name(slide_id):
        raise ClientError(f"{path}: its name {slide_id[:50]!r} can't name files: correct it in `coords`")
    features = stored.attributes
    encoder, origin = features.get("encoder_sha256"), _origin(path, features)
    if origin is not None and str(encoder) != origin.tile_encoder.weights_sha256:
        raise ClientError(f"{path}: names another tile encoder than its contract does: score the slide again")
    return EmbeddedSlide(
        slide_id=slide_id,
        embeddings=stored.embeddings[rows][order].astype(np.float32),
        coords=coords[order],
        rows=rows[order].astype(np.int64),
        total=len(stored.valid),
        tile_size=tile_size_level0,
        step=(
            max(1, round(tile_size_level0[0] * (1 - overlap))),
            max(1, round(tile_size_level0[1] * (1 - overlap))),
        ),
        mpp_level0=stored.scale.mpp,
        dimensions=(width, height) if width > 0 and height > 0 else None,
        encoder_sha256=None if encoder is None else str(encoder),
        origin=origin,
        slide_sha256=str(features["slide_sha256"]) if "slide_sha256" in features else None,
        bounds_origin=(left, top) if min(left, top) >= 0 else None,
        assumed=stored.assumed,
    )


def results_folder(stored: StoredSlide, embedded: EmbeddedSlide) -> Path:
    """Where results lie by default: with the stored ones, or in `out` for another tool's file."""
    return Path("out") if embedded.origin is None else stored.folder


def own_copy(source: Path, embedded: EmbeddedSlide, folder: Path) -> Path:
    """The file that results are added to: `source` if it is ours, else a copy FOLDER/attribution/SLIDE.h5.

    Other tools' files are never changed. The copy holds what was read of one, in our layout.

    Raises:
        OutputError: the copy can't be written.
    """
    if embedded.origin is not None:
        return source
    target = folder / "attribution" / f"{embedded.slide_id}.h5"
    if target.exists() and _same_tiles(read_embedded(target), embedded):
        return target  # with the results of earlier runs
    with new_file(target) as file:
        features = np.full((embedded.total, embedded.embeddings.shape[1]), np.nan, np.float32)
        coords = np.zeros((embedded.total, 2), np.int64)
        features[embedded.rows], coords[embedded.rows] = embedded.embeddings, embedded.coords
        file["features"], file["coords"] = features, coords
        file["valid"] = np.isin(np.arange(embedded.total), embedded.rows)
        file["features"].attrs.update({"name": embedded.slide_id, "copied_from": source.name})
        about = file["coords"].attrs
        about.update({"name": embedded.slide_id, "tile_size_level0": embedded.tile_size})
        about.update(
            {"patch_size": embedded.tile_size[0], "overlap": embedded.tile_size[0] - embedded.step[0]}
        )
        if embedded.mpp_level0:
            about.update({"mpp_level0_x": embedded.mpp_level0[0], "mpp_level0_y": embedded.mpp_level0[1]})
        if embedded.dimensions:
            about.update({"level0_width": embedded.dimensions[0], "level0_height": embedded.dimensions[1]})
        if embedded.bounds_origin:
            about["bounds_origin"] = embedded.bounds_origin
        if embedded.assumed:
            about["assumed"] = embedded.assumed
    return target


def _same_tiles(one: EmbeddedSlide, other: EmbeddedSlide) -> bool:
    first, second = (
        (each.digest, each.tile_size, each.mpp_level0, each.bounds_origin, each.assumed)
        for each in (one, other)
    )
    return first == second and np.array_equal(one.coords, other.coords)


def read_slide(stored: StoredSlide, tile_size: int | None = None, mpp: float | None = None) -> EmbeddedSlide:
    """The slide's embeddings; in a batch's folder `origin` is the export that scored the slide from them.

    Raises:
        ClientError: as `read_embedded` does.
    """
    slide = read_embedded(stored.features, tile_size, mpp)
    if stored.results == stored.features:
        return slide
    return replace(slide, origin=_origin(stored.results, stored_attributes(stored.results)))


def _origin(path: Path, attributes: Mapping[str, Any]) -> Contract | None:
    """The contract in a file's attributes, None where it has none."""
    if "contract" not in attributes:
        return None
    try:
        return Contract.parse(str(attributes["contract"]))
    except ContractError as error:
        raise ClientError(f"{path}: its contract can't be read ({error}): score the slide again") from error


def _tile(contract: Contract) -> str:
    tile = contract.tile
    return f"tiles of {tile.size_px} px ({tile.crop_px} px sent) at {tile.mpp:g} mpp"
