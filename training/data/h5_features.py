"""Read a slide's tile embeddings from HDF5 in the layout that our client, TRIDENT and Prov-GigaPath write."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from gigapath_contract.coordinates import CoordinateRule, grid_coordinates
from gigapath_contract.errors import CoordinateError, FeatureFileError
from gigapath_contract.features import TileFeatures, read_tile_features
from gigapath_contract.files import NO_SUCH, file_sha256
from training.errors import TrainingError

logger = logging.getLogger(__name__)


class Bag(NamedTuple):
    """A slide's tiles: `features` float32 [N, D] and `coords` int64 [N, 2] in the model's frame."""

    features: npt.NDArray[np.float32]
    coords: npt.NDArray[np.int64]


def read_bag(path: Path, rule: CoordinateRule = "level0/256") -> Bag:
    """Read `features` [N, D] and `coords` [N, 2] (level-0 px), without tiles that `valid` marks as unread.

    `rule` is the embedding variant's coordinate rule (`gigapath_contract.coordinates`). Tiles are returned
    row-major, as they are served, in whatever order the file has them.

    Raises:
        TrainingError: no such file, not HDF5, arrays of another shape, a value that is not finite, no tile,
            or coordinates that the rule cannot convert.
    """
    return _read(path, rule)[0]


def _read(path: Path, rule: CoordinateRule) -> tuple[Bag, TileFeatures]:
    """The bag, and all that the file says."""
    try:
        with h5py.File(path, "r") as file:
            stored = read_tile_features(file)
    except OSError as error:
        reason = "not a readable HDF5 file" if path.exists() else NO_SUCH
        raise TrainingError(f"{path}: {reason}; embed the slide, or take it out of the splits") from error
    except (FeatureFileError, CoordinateError) as error:
        raise TrainingError(f"{path}: {error}: embed the slide again") from error
    features, coords = stored.embeddings[stored.valid].astype(np.float32), stored.coords[stored.valid]
    if len(features) == 0:
        raise TrainingError(f"{path} holds no tile: take the slide out of the splits or check its tissue")
    row_major = np.lexsort((coords[:, 0], coords[:, 1]))
    features, coords = features[row_major], coords[row_major]
    try:
        return Bag(features, grid_coordinates(coords, rule, stored.scale)), stored
    except CoordinateError as error:
        raise TrainingError(f"{path}: {error}") from error


class Checked(NamedTuple):
    """What is known of files of bags, by name: SHA-256, what was assumed of their coordinates (if anything);
    and the digest of the tile encoder that they name, if they do."""

    digests: dict[str, str]
    assumed: dict[str, str]
    encoder: str | None


def check_bags(
    paths: Iterable[Path],
    width: int,
    rule: CoordinateRule,
    progress: Callable[[int], None] = lambda done: None,
) -> Checked:
    """Read every bag once, before training starts.

    Files that say what their coordinates are have nothing assumed; a warning counts the others.

    Raises:
        TrainingError: the first bag that `read_bag` refuses, or whose features aren't `width` wide or are
            another tile encoder's.
    """

    def check(path: Path) -> tuple[str, str, str, str]:
        bag, stored = _read(path, rule)
        found = bag.features.shape[1]
        if found != width:
            raise TrainingError(
                f"{path}: features are {found} wide and the slide encoder takes {width}: embed the slides "
                "with the preset's own tile encoder"
            )
        encoder = str(stored.attributes.get("encoder_sha256", ""))
        return path.name, file_sha256(path), stored.assumed, encoder

    digests, doubts, encoders = {}, {}, dict[str, str]()
    with ThreadPoolExecutor(4) as pool:
        for name, digest, assumed, encoder in pool.map(check, paths):
            digests[name] = digest
            if assumed:
                doubts[name] = assumed
            if encoder:
                encoders.setdefault(encoder, name)
            if len(encoders) > 1:
                (one, here), (other, there) = encoders.items()
                raise TrainingError(
                    f"{here} has embeddings of the tile encoder {one:.8}, {there} of {other:.8}: embed all "
                    "slides with one"
                )
            progress(len(digests))
    for assumed, files in Counter(doubts.values()).items():
        logger.warning("%d of %d feature files: %s", files, len(digests), assumed)
    return Checked(digests, doubts, next(iter(encoders), None))
