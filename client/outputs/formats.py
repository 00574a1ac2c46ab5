"""Further output formats (CLAM, .pt, QuPath), all made from a stored feature file."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from ..errors import ClientError
from ..files import atomic_path
from ..slides.geojson import tile_features, write_feature_collection
from .file_keys import FileKeys
from .hdf5 import StoredFeatures, new_file, read_features
from .layout import Layout


def write_formats(layout: Layout, slide_id: str, kinds: frozenset[str]) -> None:
    """Write those of `kinds` (keys of `FORMATS`) that are missing or were made from other features.

    Raises:
        ClientError: one can't be written, or needs a package that isn't there.
    """
    noted = FileKeys(layout.out, slide_id)
    writers: dict[Path, Writer] = {}
    keys: dict[Path, str] = {}
    for kind in sorted(kinds):
        # Where the tiles lie is the same for every tile encoder, what its head says of them is not.
        places_alone = kind == "geojson" and layout.contract.tile_head is None
        made_from = layout.patches(slide_id) if places_alone else layout.features(slide_id)
        for path, write in FORMATS[kind](layout, slide_id).items():
            writers[path], keys[path] = write, noted.of(made_from) or ""
    if missing := noted.stale(keys):
        stored = read_features(layout.features(slide_id))
        if not len(stored.coords):  # CLAM stops at a slide without tiles
            missing = [path for path in missing if path not in FORMATS["clam"](layout, slide_id)]
        with noted.writing({path: keys[path] for path in missing}):
            for path in missing:
                writers[path](path, stored)


def write_clam_features(path: Path, stored: StoredFeatures) -> None:
    """CLAM's `h5_files/<slide>.h5`: features and coordinates."""
    with new_file(path) as file:
        _clam_coords(file, stored, path)
        file.create_dataset("features", data=stored.embeddings)


def write_clam_patches(path: Path, stored: StoredFeatures) -> None:
    """CLAM's `patches/<slide>.h5`; its patch size means pixels at `patch_level`, so here level 0."""
    with new_file(path) as file:
        _clam_coords(file, stored, path)


def write_pt(path: Path, stored: StoredFeatures) -> None:
    """The embeddings as one torch tensor [N, D]; the client's only use of PyTorch."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(stored.embeddings), buffer)
    with atomic_path(path) as part:
        part.write_bytes(buffer.getvalue())


def write_tiles_geojson(path: Path, stored: StoredFeatures) -> None:
    """The tiles as QuPath's tile objects, with the fraction of tissue and the tile head's scores of each."""
    attributes = stored.coords_attributes
    width, height = (int(side) for side in attributes["tile_size_level0"])
    x, y = (int(start) for start in attributes["bounds_origin"])
    columns = {"tissue": stored.tissue, **{f"tile:{name}": p for name, p in stored.tile_scores.items()}}
    features = tile_features(
        stored.coords,
        (width, height),
        str(attributes["name"]),
        measurements={name: [round(part, 4) for part in values.tolist()] for name, values in columns.items()},
        origin=(x, y),
    )
    write_feature_collection(path, features)


def check_dependencies(kinds: frozenset[str]) -> None:
    """Check before a run that the packages that `kinds` need are installed.

    Raises:
        ClientError: PyTorch is missing.
    """
    if kinds & {"clam", "pt"} and importlib.util.find_spec("torch") is None:
        raise ClientError(
            "torch files (--layout clam, --pt) need PyTorch, unlike the rest of the client: pip install torch"
        )


Writer = Callable[[Path, StoredFeatures], None]

FORMATS: dict[str, Callable[[Layout, str], dict[Path, Writer]]] = {
    "clam": lambda layout, slide_id: {
        layout.clam("patches", slide_id): write_clam_patches,
        layout.clam("h5_files", slide_id): write_clam_features,
        layout.clam("pt_files", slide_id): write_pt,
    },
    "pt": lambda layout, slide_id: {layout.features(slide_id, ".pt"): write_pt},
    "geojson": lambda layout, slide_id: {layout.tiles_geojson(slide_id): write_tiles_geojson},
}


def _clam_coords(file: h5py.File, stored: StoredFeatures, path: Path) -> None:
    attributes = stored.coords_attributes
    size = np.array([attributes["level0_width"], attributes["level0_height"]])
    file.create_dataset("coords", data=stored.coords).attrs.update(
        {
            "patch_level": 0,
            "patch_size": attributes["patch_size_level0"],
            "downsample": np.array([1.0, 1.0]),
            "downsampled_level_dim": size,
            "level_dim": size,
            "name": attributes["name"],
            "save_path": path.parent.name,
        }
    )
