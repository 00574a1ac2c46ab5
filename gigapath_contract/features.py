"""A slide's tile embeddings out of an HDF5 file that anyone may have made: checked before it is read.

Every room opens the file with h5py and hands it over, so that this package needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigapath_contract.coordinates import LevelZeroScale
from gigapath_contract.errors import ContractError, FeatureFileError, one_line
from gigapath_contract.positions import TilePositions, level0_positions

MOST_BYTES = 16 << 30
"""Of one dataset: ten times the largest slide that a contract allows, in float32."""
_MOST_CHUNK_BYTES = 1 << 30
_MOST_OBJECTS = 10_000
_DEEPEST = 16
# gzip shrinks 1,032 to 1 at best: a file with less in it doesn't hold what it claims.
_BEST_COMPRESSION = 1100
_SMALL = 64 << 20


@dataclass(frozen=True, eq=False)
class TileFeatures:
    """The contents of a feature file: N tiles with embeddings of width D.

    Attributes:
        embeddings: [N, D] float; finite in the rows of valid tiles.
        coords: [N, 2] level-0 pixels of the tiles' top-left corners.
        scale: the tiles' size and the mpp of level 0, as far as they are known.
        assumed: what the file does not say about `coords` and was assumed; empty where nothing was.
        valid: [N], False where the file marks a tile as not decoded.
        invalid_coords: [K, 2] corners of tiles that could not be decoded, which are not among the N.
        tissue: [N] fraction of each tile that is tissue; NaN where the file doesn't say.
        tile_scores: [N] probabilities by the tile head, by class; empty without one.
        coords_attributes, attributes: the HDF5 attributes of `coords` and of `features`.
    """

    embeddings: NDArray[Any]
    coords: NDArray[Any]
    scale: LevelZeroScale
    assumed: str
    valid: NDArray[np.bool_]
    invalid_coords: NDArray[Any]
    tissue: NDArray[np.float32]
    tile_scores: Mapping[str, NDArray[np.float32]]
    coords_attributes: Mapping[str, Any]
    attributes: Mapping[str, Any]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what h5py and NumPy raise over a damaged or hostile file into a FeatureFileError."""
    try:
        yield
    except ContractError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise FeatureFileError(f"not a readable HDF5 file ({one_line(error)})") from error


def read_tile_features(
    file: Any,
    *,
    tile_size: int | None = None,
    mpp: float | None = None,
    embeddings: bool = True,
    positions: bool = True,
) -> TileFeatures:
    """Check an open `h5py.File`, then read its tile embeddings.

    Files of ours, TRIDENT's, CLAM's and STAMP's (`feats`) are read, and arrays with a leading axis of 1.

    Args:
        tile_size, mpp: the tiles' side in level-0 px and the slide's mpp, where the file does not say.
        embeddings: False leaves them unread, [N, 0], which takes a thousandth of the memory.
        positions: False leaves `coords` as they are stored, in whatever unit, without a scale.

    Raises:
        FeatureFileError: `features` [N, D] or `coords` [N, 2] are missing or of another kind, a valid tile's
            embedding is not finite, the file claims more than it holds or refers to other files.
        CoordinateError: as `level0_positions` raises.
    """
    with one_line_errors():
        check_self_contained(file)
        name = "feats" if "feats" in file and "features" not in file else "features"
        if missing := [each for each in (name, "coords") if each not in file]:
            raise FeatureFileError(f"lacks {' and '.join(sorted(missing))}")
        features, coords = dataset(file, name, "f"), dataset(file, "coords", "iuf")
        shapes = [
            each.shape[1:] if each.ndim == 3 and each.shape[0] == 1 else each.shape
            for each in (features, coords)
        ]
        if len(shapes[0]) != 2 or shapes[1] != (shapes[0][0], 2):
            raise FeatureFileError(
                f"features {features.shape} and coords {coords.shape} are not [N, D] and [N, 2]"
            )
        tiles = int(shapes[0][0])
        valid = _per_tile(file, "valid", "biu", np.ones(tiles)).astype(np.bool_)
        tissue = _per_tile(file, "tissue", "f", np.full(tiles, np.nan)).astype(np.float32)
        scores = _tile_scores(file, tiles)
        read = features[:].reshape(shapes[0]) if embeddings else np.empty((tiles, 0), features.dtype)
        places = coords[:].reshape(shapes[1])
        wrong = valid & ~np.isfinite(read).all(axis=1)
        if wrong.any():
            raise FeatureFileError(f"tile {int(wrong.argmax())} has a NaN or infinite feature")
        invalid = np.empty((0, 2), np.int64)
        if "invalid_coords" in file:
            invalid = dataset(file, "invalid_coords", "iu")[:]
        if invalid.ndim != 2 or invalid.shape[1] != 2:
            raise FeatureFileError(f"invalid_coords {invalid.shape} are not [K, 2]")
        for corners in (places, invalid):
            if not np.isfinite(corners).all() or (np.abs(corners.astype(np.float64)) > 2**31).any():
                raise FeatureFileError("holds coordinates that no slide has")
        about, attributes = dict(coords.attrs), dict(features.attrs)
        if name == "feats":
            about = {**dict(file.attrs), **about}
    found = TilePositions(places, LevelZeroScale(), "")
    if positions:
        found = level0_positions(places, {**attributes, **about}, tile_size=tile_size, mpp=mpp)
    return TileFeatures(
        read, found.coords, found.scale, found.assumed, valid, invalid, tissue, scores, about, attributes
    )


def check_self_contained(file: Any) -> None:
    """Refuse an open file that reaches into others: by links, external storage or virtual datasets.

    Raises:
        FeatureFileError: it does, or has more objects or deeper groups than a feature file needs.
    """
    with one_line_errors():
        waiting, seen = [(file, "", 0)], 0
        while waiting:
            group, path, depth = waiting.pop()
            for name in group:
                seen += 1
                if seen > _MOST_OBJECTS or depth > _DEEPEST:
                    raise FeatureFileError("holds more objects than a feature file has")
                if type(group.get(name, getlink=True)).__name__ != "HardLink":
                    raise FeatureFileError(f"{path}{name} is a link to elsewhere")
                found = group[name]
                if hasattr(found, "shape"):
                    _check_storage(found, f"{path}{name}")
                elif hasattr(found, "keys"):
                    waiting.append((found, f"{path}{name}/", depth + 1))


def dataset(file: Any, name: str, kinds: str) -> Any:
    """The dataset `name` of an open file, unread, if its values are of one of NumPy's `kinds`.

    Raises:
        FeatureFileError: it is missing, a group, of another kind, or claims more than the file holds.
    """
    with one_line_errors():
        found = file[name]
        if not hasattr(found, "shape") or found.shape is None:
            raise FeatureFileError(f"{name} is no array")
        if found.dtype.kind not in kinds or found.dtype.itemsize > 8:
            raise FeatureFileError(f"{name} holds {found.dtype}, not numbers as expected")
        _check_storage(found, name)
        return found


def _check_storage(found: Any, name: str) -> None:
    """Refuse an array whose values lie in another file, or which is larger than what the file holds."""
    if found.external or found.is_virtual:
        raise FeatureFileError(f"{name} takes its values from another file")
    if found.shape is None:
        return
    size = prod(map(int, found.shape)) * found.dtype.itemsize
    chunk = prod(map(int, found.chunks)) * found.dtype.itemsize if found.chunks else 0
    stored = found.id.get_storage_size() * (_BEST_COMPRESSION if found.chunks else 1)
    if size > MOST_BYTES or chunk > _MOST_CHUNK_BYTES or size > max(stored, _SMALL):
        raise FeatureFileError(f"{name} claims {found.shape} values, more than the file can hold")


def _tile_scores(file: Any, tiles: int) -> dict[str, NDArray[np.float32]]:
    if "tile_scores" not in file:
        return {}
    found = dataset(file, "tile_scores", "f")
    classes = [str(name) for name in np.atleast_1d(found.attrs["classes"])]
    if found.shape != (tiles, len(classes)):
        raise FeatureFileError(
            f"tile_scores {found.shape} are not those of {tiles} tiles, {len(classes)} classes"
        )
    return dict(zip(classes, found[:].T, strict=True))


def _per_tile(file: Any, name: str, kinds: str, default: NDArray[Any]) -> NDArray[Any]:
    if name not in file:
        return default
    found = dataset(file, name, kinds)
    if found.shape != default.shape:
        raise FeatureFileError(f"{name} {found.shape} has not one value per tile ({len(default)})")
    values: NDArray[Any] = found[:]
    return values
