"""Further files for those who need them, all made from a stored feature file."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from client.errors import ClientError
from client.files import atomic_path
from client.layout import Layout
from client.store import StoredFeatures, new_file, read_features

# Names are part of the tile's id, so that the same tile has the same id in every run.
_NAMESPACE = uuid.UUID("5f6f5a0e-8d0b-4d0e-9d7a-6a3f0c0f1b51")


def export(layout: Layout, slide_id: str, kinds: frozenset[str], *, again: bool) -> None:
    """Write those of `kinds` (keys of `EXPORTS`) that are missing, or all `again`.

    Raises:
        ClientError: one can't be written, or needs a package that isn't there.
    """
    stored: StoredFeatures | None = None
    for kind in sorted(kinds):
        for path, write in EXPORTS[kind](layout, slide_id).items():
            if again or not path.exists():
                stored = stored or read_features(layout.features(slide_id))
                write(path, stored)


def write_clam_features(path: Path, stored: StoredFeatures) -> None:
    """CLAM's `h5_files/<slide>.h5`: features and coordinates of the valid tiles."""
    with new_file(path) as file:
        _clam_coords(file, stored, path)
        file.create_dataset("features", data=stored.embeddings[stored.valid])


def write_clam_patches(path: Path, stored: StoredFeatures) -> None:
    """CLAM's `patches/<slide>.h5`; its patch size means pixels at `patch_level`, so here level 0."""
    with new_file(path) as file:
        _clam_coords(file, stored, path)


def write_pt(path: Path, stored: StoredFeatures) -> None:
    """The valid tiles' embeddings as one torch tensor [N, D]; the only use of PyTorch, see `require`."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(stored.embeddings[stored.valid]), buffer)
    with atomic_path(path) as part:
        part.write_bytes(buffer.getvalue())


def write_tiles_geojson(path: Path, stored: StoredFeatures) -> None:
    """Every tile as a QuPath tile object, level-0 pixels, streamed."""
    width, height = (int(side) for side in stored.coords_attributes["tile_size_level0"])
    tissue = stored.tissue
    with atomic_path(path) as part, part.open("w") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for i, (x, y) in enumerate(stored.coords.tolist()):
            ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
            measured = {} if math.isnan(tissue[i]) else {"tissue": round(float(tissue[i]), 4)}
            feature = {
                "type": "Feature",
                "id": str(uuid.uuid5(_NAMESPACE, f"{stored.coords_attributes['name']} {x} {y}")),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {
                    "objectType": "tile",
                    "name": f"tile {i}",
                    "classification": {"name": "tile", "color": [20, 110, 60]}
                    if stored.valid[i]
                    else {"name": "unreadable tile", "color": [200, 30, 30]},
                    "measurements": measured,
                    "isLocked": True,
                },
            }
            file.write(("," if i else "") + "\n" + json.dumps(feature))
        file.write("\n]}\n")


def require(kinds: frozenset[str]) -> None:
    """Fail now, not after hours, where a package that `kinds` need is missing."""
    if kinds & {"clam", "pt"} and importlib.util.find_spec("torch") is None:
        raise ClientError(
            "torch files (--layout clam, --pt) need PyTorch, which the client else doesn't: pip install torch"
        )


Writer = Callable[[Path, StoredFeatures], None]

EXPORTS: dict[str, Callable[[Layout, str], dict[Path, Writer]]] = {
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
    file.create_dataset("coords", data=stored.coords[stored.valid]).attrs.update(
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
