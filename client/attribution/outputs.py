"""The files an explanation becomes: arrays in the slide's HDF5, a map, tiles for QuPath."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from client.attribution.explain import Explanation, provenance
from client.attribution.picture import Canvas, colour_limit, draw_map, save_figure
from client.attribution.result import Attribution
from client.attribution.scorer import Float64
from client.errors import ClientError
from client.files import atomic_path
from client.geojson import tile_features, write_features
from client.slide import Slide

LONGEST_PX = 1200
PLAIN_GEOJSON_TILES = 20_000

UNITS = {
    "log_odds": "log-odds of {}",
    "probability": "probability of {}",
    "logit": "logit of {}",
    "embedding": "likeness to the whole slide's {}",
}


def canvas_for(explanation: Explanation, slide: Slide | None) -> Canvas:
    """The slide's overview, or white where only its embeddings are at hand."""
    if slide is None:
        return Canvas.blank(explanation.slide.coords, explanation.slide.tile_size, LONGEST_PX)
    overview = slide.overview(max(1.0, max(slide.dimensions) / LONGEST_PX))
    return Canvas(overview.pixels, overview.downsample)


def write_map(path: Path, explanation: Explanation, canvas: Canvas, limit: float | None = None) -> None:
    """The target's map as PNG; `limit` fixes the colours, so that slides can be compared."""
    result, trust, slide = explanation.attribution, explanation.reliability, explanation.slide
    values = result.values[:, explanation.focus]
    limit = limit or colour_limit(values)
    faint = np.abs(values) < trust.noise_floor if trust else None
    picture = draw_map(canvas, slide.coords, slide.tile_size, values, limit, faint)
    unit = UNITS[explanation.score].format(explanation.target)
    with atomic_path(path) as part:
        save_figure(
            part, picture, limit, title=_title(explanation), unit=unit, warnings=_warnings(explanation)
        )


def write_arrays(path: Path, explanation: Explanation) -> None:
    """Add the values to the slide's HDF5 file, a row for each of its `coords`; whole or not at all.

    `attribution_<method>` float64 [rows, K] (NaN where a tile was not valid), `..._stderr` and
    `..._leaf_size` where the method has them, and `attribution_keep_one`: plain arrays at the top, with
    attributes that say how they were made.
    """
    about = provenance(explanation)
    with atomic_path(path) as part:
        shutil.copyfile(path, part)
        try:
            with h5py.File(part, "r+") as file:
                _add_result(file, explanation, explanation.attribution, about)
                if explanation.keep_one is not None:
                    brief = {
                        key: about[key] for key in ("score", "export_id", "trained", "embeddings_sha256")
                    }
                    _add_result(file, explanation, explanation.keep_one, brief)
        except OSError as error:
            raise ClientError(f"{path}: cannot be read as HDF5 ({error})") from error


def write_geojson(path: Path, explanation: Explanation, origin: tuple[int, int] = (0, 0)) -> None:
    """Tiles with measurements for QuPath: `attr:<class>`, `attr_se:<class>`, `keep_one:<class>`, `leaf_size`.

    `origin` is where QuPath's (0, 0) lies on level 0.
    """
    result, slide = explanation.attribution, explanation.slide
    measurements: dict[str, Float64] = {}
    for column, name in enumerate(result.names):
        measurements[f"attr:{name}"] = result.values[:, column]
        if result.stderr is not None:
            measurements[f"attr_se:{name}"] = result.stderr[:, column]
        if explanation.keep_one is not None:
            measurements[f"keep_one:{name}"] = explanation.keep_one.values[:, column]
    if result.leaf_size is not None:
        measurements["leaf_size"] = result.leaf_size
    features = tile_features(
        slide.coords,
        slide.tile_size,
        slide.slide_id,
        measurements={name: values.tolist() for name, values in measurements.items()},
        origin=origin,
    )
    write_features(path, features)


def _add_result(
    file: h5py.File, explanation: Explanation, result: Attribution, about: dict[str, Any]
) -> None:
    name = f"attribution_{result.method}"
    data = _set(file, name, _rows(explanation, result.values))
    data.attrs.clear()
    data.attrs.update(
        {
            "method": result.method,
            "classes": list(result.names),
            "base": result.base,
            "full": result.full,
            "evaluations": result.evaluations,
            "additive": result.additive,
            **{key: value if np.ndim(value) == 0 else json.dumps(value) for key, value in about.items()},
        }
    )
    for suffix, values in (("stderr", result.stderr), ("leaf_size", result.leaf_size)):
        if values is not None:
            _set(file, f"{name}_{suffix}", _rows(explanation, values))


def _set(file: h5py.File, name: str, values: Float64) -> h5py.Dataset:
    if name in file and file[name].shape == values.shape:
        file[name][...] = values
    else:
        if name in file:
            del file[name]
        file.create_dataset(name, data=values)
    return file[name]


def _rows(explanation: Explanation, values: Float64) -> Float64:
    """Values of the tiles -> values of the file's rows, NaN where a row is no valid tile."""
    rows = np.full((explanation.slide.total, *values.shape[1:]), np.nan)
    rows[explanation.slide.rows] = values
    return rows


def _title(explanation: Explanation) -> list[str]:
    result, focus, trust = explanation.attribution, explanation.focus, explanation.reliability
    occluder = explanation.settings.baselines
    lines = [
        f"{explanation.slide.slide_id}: {explanation.target}, {result.method}",
        f"whole slide {result.full[focus]:+.3g}, nothing {result.base[focus]:+.3g}, sum of tiles "
        f"{np.nansum(result.values[:, focus]):+.3g}; {result.evaluations} masks, "
        f"occluder {occluder if isinstance(occluder, str) else 'bank'}",
    ]
    if trust is not None:
        lines.append(
            f"SRG {trust.curves.gain:+.3g} (random up to {max(map(abs, trust.random_gains)):.3g}), "
            f"noise floor {trust.noise_floor:.2g} (hatched below), redundancy {trust.redundancy:.2f}, "
            f"agreement with {trust.other_occluder} {trust.agreement:+.2f}"
        )
    return lines


def _warnings(explanation: Explanation) -> list[str]:
    untrained = [] if explanation.contract.trained else ["untrained weights: this map shows nothing real"]
    return untrained + (explanation.reliability.warnings() if explanation.reliability else [])
