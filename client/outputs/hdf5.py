"""HDF5 files that TRIDENT, CLAM, Patho-Bench and prov-gigapath read: arrays at the top, attributes on them.

The same results give the same bytes: a file holds no time, path or duration.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gigapath_contract.errors import CoordinateError, FeatureFileError, MppMissing
from gigapath_contract.features import TileFeatures, read_tile_features
from gigapath_contract.schema import Contract

from ..arrays import Array
from ..errors import ClientError
from ..files import atomic_path
from ..scoring.result_key import SlideKeys
from ..scoring.score import ScoredSlide
from ..slides.tiling import TilePlan
from ..version import __version__

_CHUNK_ROWS = 256
_MAGNIFICATIONS = (80, 40, 20, 10, 5)  # those that TRIDENT knows; nominal, never used to compute


@dataclass(frozen=True)
class Provenance:
    """What a result was computed from: the contract, and the keys of the slide's content and all options."""

    contract: Contract
    keys: SlideKeys

    def attributes(self, plan: TilePlan) -> dict[str, Any]:
        """Attributes that say how a result was computed, so that it can be reproduced."""
        contract = self.contract
        return {
            "encoder": contract.tile_encoder.name,
            "encoder_sha256": contract.tile_encoder.weights_sha256,
            "slide_encoder": contract.slide_encoder.name,
            "slide_encoder_sha256": contract.slide_encoder.weights_sha256,
            "engine": "triton",
            "precision": contract.precision,
            "trained": contract.trained,
            "export_id": contract.export_id,
            "contract": contract.to_json(),
            "slide_sha256": self.keys.content.sha256,
            "tile_key": self.keys.tiles,
            "mpp_level0_x": plan.mpp_level0[0],
            "mpp_level0_y": plan.mpp_level0[1],
            "mpp_target": plan.mpp_requested,
            "mpp_effective": plan.mpp_effective,
            "mpp_source": plan.mpp_source,
            "read_level": plan.level,
            "resample": plan.resample,
            "crop_px": plan.crop_px,
            "alpha_fill": "white",
            "tool_version": __version__,
        }


def write_slide_h5(path: Path, scored: ScoredSlide, provenance: Provenance) -> None:
    """All of a slide in one file: a TRIDENT feature file with further arrays."""
    with new_file(path) as file:
        _write_coords(file, scored, ".")
        _write_features(file, scored, provenance, ".")
        _write_slide_arrays(file, scored, provenance, "slide_features", ".")


def write_patches_h5(path: Path, scored: ScoredSlide, provenance: Provenance) -> None:
    """TRIDENT's `<slide>_patches.h5`: coordinates alone."""
    with new_file(path) as file:
        _write_coords(file, scored, path.parent.name)


def write_features_h5(path: Path, scored: ScoredSlide, provenance: Provenance) -> None:
    """TRIDENT's `features_<encoder>/<slide>.h5`: tile embeddings and coordinates.

    The contract in it is that of the export that embedded them; others with the same tile encoder use them.
    """
    with new_file(path) as file:
        _write_coords(file, scored, path.parent.name)
        _write_features(file, scored, provenance, path.parent.name)


def write_slide_features_h5(path: Path, scored: ScoredSlide, provenance: Provenance) -> None:
    """TRIDENT's `slide_features_<encoder>/<slide>.h5`: slide embedding, every layer, scores, coordinates."""
    with new_file(path) as file:
        _write_coords(file, scored, path.parent.name)
        _write_slide_arrays(file, scored, provenance, "features", path.parent.name)


StoredFeatures = TileFeatures


def read_features(
    path: Path, tile_size: int | None = None, mpp: float | None = None, *, positions: bool = True
) -> StoredFeatures:
    """Read a feature file; in one of another tool `tissue` is NaN.

    tile_size, mpp: the tiles' side in level-0 px and the slide's mpp, where the file does not say.
    positions: whether it matters where the tiles lie.

    Raises:
        ClientError: no such file, not HDF5, or not what `gigapath_contract.features` lets pass.
    """
    try:
        with h5py.File(path, "r") as file:
            return read_tile_features(file, tile_size=tile_size, mpp=mpp, positions=positions)
    except OSError as error:
        raise ClientError(f"{path}: cannot be read as HDF5 ({error})") from error
    except MppMissing as error:
        raise ClientError(f"{path}: {error} (--mpp)") from error
    except CoordinateError as error:
        raise ClientError(f"{path}: {error}") from error
    except FeatureFileError as error:
        raise ClientError(
            f"{path}: {error}: give a file of tile features, or a batch's folder with --slide-id; "
            "score the slide again if it is one"
        ) from error


def may_hold_features(path: Path) -> bool:
    """Whether a file has tile embeddings, or can't be read: then whoever reads it as a slide's says so."""
    try:
        return _may_hold_features(path, path.stat().st_mtime_ns)
    except OSError:
        return True


@lru_cache(100_000)
def _may_hold_features(path: Path, changed: int) -> bool:
    """The same; `changed` is the file's time."""
    with h5py.File(path, "r") as file:
        return "features" in file or "feats" in file


def is_ours(path: Path) -> bool:
    """Whether `score` or `batch` wrote a file of embeddings: then it holds their contract."""
    with h5py.File(path, "r") as file:
        return "features" in file and "contract" in file["features"].attrs


def stored_attributes(path: Path) -> dict[str, Any]:
    """The attributes of `features` in a file of `score` or `batch`, unread otherwise.

    Raises:
        ClientError: not HDF5, or without `features`.
    """
    try:
        with h5py.File(path, "r") as file:
            return dict(file["features"].attrs)
    except (OSError, KeyError) as error:
        raise ClientError(f"{path}: cannot be read as HDF5 ({error}): score the slide again") from error


@contextmanager
def new_file(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to fill; it is written to `path` when the block ends without an error.

    It is built in memory and written by Python: HDF5 itself crashes the process when the disk is full.
    """
    image = io.BytesIO()
    with h5py.File(image, "w", libver=("earliest", "v110")) as file:
        yield file
    with atomic_path(path) as part:
        part.write_bytes(image.getbuffer())


def _write_coords(file: h5py.File, scored: ScoredSlide, folder: str) -> None:
    plan = scored.plan
    data = _rows(file, "coords", plan.coords[scored.valid])
    if not scored.valid.all():  # apart: other tools would take a row for a tile
        file["invalid_coords"] = plan.coords[~scored.valid]
    level0 = min(_MAGNIFICATIONS, key=lambda m: abs(np.log(m * plan.mpp_level0[0] / 10)))
    target = round(10 / plan.mpp_requested)
    data.attrs.update(
        {
            "patch_size": plan.tile_px,
            "patch_size_level0": plan.patch_size_level0,
            "tile_size_level0": plan.tile_size_level0,
            "bounds_origin": scored.origin,
            "level0_magnification": level0,
            "target_magnification": target,
            # What TRIDENT would read, which computes it from the two rounded magnifications.
            "patch_size_level0_trident": round(plan.tile_px * level0 / target),
            "overlap": 0,
            "name": plan.slide_id,
            "savetodir": folder,
            "level0_width": plan.dimensions[0],
            "level0_height": plan.dimensions[1],
        }
    )


def _write_features(file: h5py.File, scored: ScoredSlide, provenance: Provenance, folder: str) -> None:
    data = _rows(file, "features", scored.embeddings[scored.valid])
    data.attrs.update({"name": scored.plan.slide_id, "savetodir": folder})
    data.attrs.update(provenance.attributes(scored.plan))
    _rows(file, "tissue", scored.plan.tissue[scored.valid])
    head = provenance.contract.tile_head
    if head and scored.tile_logits is not None:
        logits = scored.tile_logits[scored.valid]
        about = {"classes": head.classes, "kind": head.kind, "tile_head_sha256": head.weights_sha256}
        for name, values in (("tile_logits", logits), ("tile_scores", head.probabilities(logits))):
            _rows(file, name, values).attrs.update(about)


def _write_slide_arrays(
    file: h5py.File, scored: ScoredSlide, provenance: Provenance, name: str, folder: str
) -> None:
    """The slide embedding as `name`; a slide without a valid tile has arrays of length 0 instead."""
    variant, head = provenance.contract.variant, provenance.contract.head
    width = provenance.contract.slide_encoder.embed_dim
    nothing = np.empty((0, width), np.float32)
    embedding = file.create_dataset(
        name, data=nothing if scored.slide_embedding is None else scored.slide_embedding
    )
    embedding.attrs.update({"name": scored.plan.slide_id, "savetodir": folder})
    embedding.attrs.update(provenance.attributes(scored.plan))
    embedding.attrs.update(
        {
            "result_key": provenance.keys.result,
            "pooling": variant.pooling,
            "layer": variant.layer,
            "norm": variant.norm,
            "coord_rule": variant.coordinates,
        }
    )
    for index, pooling in enumerate(("cls", "mean")):
        layers = nothing if scored.layers is None else scored.layers[:, index]
        file.create_dataset(f"layer_features_{pooling}", data=layers).attrs["pooling"] = pooling
    if head:
        logits = np.empty(0, np.float32) if scored.logits is None else scored.logits
        scores = head.probabilities(logits) if logits.size else logits
        for key, values in (("logits", logits), ("scores", scores)):
            file.create_dataset(key, data=values).attrs.update({"classes": head.classes, "kind": head.kind})


def _rows(file: h5py.File, name: str, values: Array) -> h5py.Dataset:
    """A dataset of one row per tile that can grow, in chunks of many rows."""
    shape = values.shape
    return file.create_dataset(
        name, data=values, chunks=(_CHUNK_ROWS, *shape[1:]), maxshape=(None, *shape[1:])
    )
