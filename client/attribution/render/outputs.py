"""Data files of an explanation: arrays in the slide's HDF5 file, tiles for QuPath."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gigapath_contract.features import check_self_contained
from gigapath_contract.schema import Contract

from ...arrays import Float64
from ...errors import ClientError
from ...outputs.hdf5 import new_file
from ...outputs.layout import file_stem
from ...slides.geojson import tile_features, write_feature_collection
from ..explain import Explanation, provenance
from ..methods.result import Attribution
from .evidence import COLOURS, evidence_arrays

PLAIN_GEOJSON_TILES = 20_000


def check_attributions(path: Path, contract: Contract) -> None:
    """Refuse a file with the attributions of another export, which `write_arrays` would replace.

    Raises:
        ClientError: it holds such, or can't be read as HDF5.
    """
    try:
        with h5py.File(path) as file:
            found = {str(data.attrs["export_id"]) for data in file.values() if "evaluations" in data.attrs}
    except OSError as error:
        raise ClientError(f"{path}: cannot be read as HDF5 ({error})") from error
    if others := found - {contract.export_id}:
        raise ClientError(
            f"{path}: holds attributions of export {', '.join(others)}, the server serves "
            f"{contract.export_id}: serve the former, score the slide into another folder, or replace them "
            "(--overwrite)"
        )


def write_arrays(path: Path, explanation: Explanation) -> None:
    """Add the values to the slide's HDF5 file, with one row per row of its `coords`; all or nothing.

    `attribution_<method>` float64 [rows, K] (NaN where a tile was not valid), `..._stderr` and
    `..._leaf_size` where the method has them, `..._look` and `..._place` where both were made, and
    `attribution_keep_one`; `sufficient_<class>` and `necessary_<class>`, 1 for its tiles and 0 elsewhere, if
    there is a set; `look_group_<class>`, the number of each tile's group. `provenance` is in the attributes.
    The class is there as `file_stem` writes it, and in their attribute `class` as it is.
    What an earlier run left is removed.

    Raises:
        ClientError: the file can't be read as HDF5.
        OutputError: it can't be written.
    """
    about = provenance(explanation)
    brief = {key: about[key] for key in ("score", "export_id", "trained", "embeddings_sha256")}
    result = explanation.attribution
    datasets = _datasets(explanation, result, about)
    if result.alternative is not None:
        for one in result.groupings:
            datasets[f"attribution_{one.method}_{one.grouping}"] = _rows(explanation, one.values), {}
    target, named = file_stem(explanation.target_class), {"class": explanation.target_class, **brief}
    earlier = {f"{kind}_{target}" for kind in COLOURS}
    earlier |= {f"attribution_{result.method}_{kind}" for kind in ("look", "place", "stderr", "leaf_size")}
    for kind, (inside, measured) in evidence_arrays(explanation).items():
        datasets[f"{kind}_{target}"] = (
            _rows(explanation, inside),
            {"method": result.method, **named, **measured},
        )
    if (groups := explanation.look_groups) is not None:
        datasets[f"look_group_{target}"] = (
            _rows(explanation, (groups.labels + 1).astype(np.float64)),
            {**named, "values": groups.values, "stderr": groups.stderr, "tissue": groups.tissue},
        )
    if explanation.keep_one is not None:
        datasets |= _datasets(explanation, explanation.keep_one, brief)
    try:
        old = h5py.File(path)
    except OSError as error:
        raise ClientError(f"{path}: cannot be read as HDF5 ({error})") from error
    # A new file and not a changed one: the same results give the same bytes, and no space is lost.
    with old, new_file(path) as new:
        check_self_contained(old)  # a copy would take the linked file's content in
        new.attrs.update(old.attrs)
        for name in old:
            if name not in datasets and name not in earlier:
                old.copy(name, new)
        for name, (values, attributes) in datasets.items():
            new.create_dataset(name, data=values).attrs.update(attributes)


def write_geojson(
    path: Path, explanation: Explanation, origin: tuple[int, int] = (0, 0), limit: float | None = None
) -> None:
    """Write tiles with measurements for QuPath, as GeoJSON, in the colours of the map.

    Measurements: `attr:<class>`, `attr_se:<class>`, `keep_one:<class>`, `leaf_size`; `attr_place:<class>` or
    `attr_look:<class>` of the map by the other grouping.
    origin: QuPath's (0, 0) in level-0 px.
    limit: fixes the colour scale at +-limit.

    Raises:
        OutputError: the file can't be written.
    """
    # matplotlib takes long to import: not for commands that draw nothing.
    from .overlay import tile_colours

    result, slide = explanation.attribution, explanation.slide
    measurements: dict[str, Float64] = {}
    for column, name in enumerate(result.names):
        measurements[f"attr:{name}"] = result.values[:, column]
        if result.stderr is not None:
            measurements[f"attr_se:{name}"] = result.stderr[:, column]
        if explanation.keep_one is not None:
            measurements[f"keep_one:{name}"] = explanation.keep_one.values[:, column]
        if result.alternative is not None:
            other = result.alternative
            measurements[f"attr_{other.grouping}:{name}"] = other.values[:, column]
    if explanation.look_groups is not None:
        measurements[f"look_group:{explanation.target_class}"] = (explanation.look_groups.labels + 1).astype(
            np.float64
        )
    if result.leaf_size is not None:
        measurements["leaf_size"] = result.leaf_size
    features = tile_features(
        slide.coords,
        slide.tile_size,
        slide.slide_id,
        measurements={name: values.tolist() for name, values in measurements.items()},
        colours=tile_colours(result.values[:, explanation.target_index], limit).tolist(),
        origin=origin,
    )
    write_feature_collection(path, features)


def _datasets(
    explanation: Explanation, result: Attribution, about: dict[str, Any]
) -> dict[str, tuple[Float64, dict[str, Any]]]:
    """Arrays of a result and their attributes, by name."""
    name = f"attribution_{result.method}"
    attributes = {
        "method": result.method,
        "classes": list(result.names),
        "base": result.base,
        "full": result.full,
        "evaluations": result.evaluations,
        "additive": result.additive,
        **{key: value if np.ndim(value) == 0 else json.dumps(value) for key, value in about.items()},
    }
    datasets = {name: (_rows(explanation, result.values), attributes)}
    for suffix, values in (("stderr", result.stderr), ("leaf_size", result.leaf_size)):
        if values is not None:
            datasets[f"{name}_{suffix}"] = _rows(explanation, values), {}
    return datasets


def _rows(explanation: Explanation, values: Float64) -> Float64:
    """Values of tiles [N, ...] -> values of the file's rows, NaN for rows without a valid tile."""
    rows = np.full((explanation.slide.total, *values.shape[1:]), np.nan)
    rows[explanation.slide.rows] = values
    return rows
