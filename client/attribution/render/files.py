"""Write every file of an explanation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from shapely.geometry.base import BaseGeometry

from ...outputs.layout import file_stem
from ...slides.slide import Slide
from ..explain import Explanation
from ..tile import Encode, Fill, TileScore
from .evidence import write_evidence
from .figures import canvas_for, write_look_groups, write_map, write_strongest, write_tile_map
from .outputs import PLAIN_GEOJSON_TILES, write_arrays, write_geojson


def write_explanation(
    explanation: Explanation,
    h5: Path,
    folder: Path,
    slide: Slide | None,
    limit: float | None = None,
    outlines: BaseGeometry | None = None,
) -> list[Path]:
    """Add the arrays to `h5`; write the maps, the GeoJSON and, with a slide, the strongest tiles to `folder`.

    limit: fixes the map's colour scale at +-limit.
    outlines: areas in level-0 px to outline on the maps.

    Returns the files. Raises OutputError where one can't be written.
    """
    compressed = len(explanation.slide.coords) > PLAIN_GEOJSON_TILES
    picture = _path(folder, explanation, ".png")
    tiles = _path(folder, explanation, ".geojson.gz" if compressed else ".geojson")
    origin = explanation.slide.bounds_origin or (0, 0)
    write_arrays(h5, explanation)
    canvas = canvas_for(explanation, slide, outlines)
    write_map(picture, explanation, canvas, limit)
    write_geojson(tiles, explanation, origin, limit)
    written = [h5, picture, tiles]
    if (other := explanation.attribution.alternative) is not None:
        written.append(_path(folder, explanation, f"-by-{other.grouping}.png"))
        write_map(
            written[-1],
            replace(explanation, attribution=other, evidence=None, reliability=None),
            canvas,
            limit,
        )
    if explanation.evidence is not None:
        written.append(_path(folder, explanation, "-evidence.geojson"))
        write_evidence(written[-1], explanation, origin)
    if slide is not None:
        written.append(_path(folder, explanation, "-strongest.png"))
        write_strongest(written[-1], explanation, slide)
    if slide is not None and explanation.look_groups is not None:
        written.append(_path(folder, explanation, "-looks.png"))
        write_look_groups(written[-1], explanation, explanation.look_groups, slide)
    return written


def write_tile_maps(
    explanation: Explanation,
    folder: Path,
    slide: Slide,
    encode: Encode,
    count: int,
    score: TileScore = "slide",
    fill: Fill = "blur",
) -> Iterator[Path]:
    """Write the maps of the `count` tiles with the largest absolute values, and yield the file of each."""
    values = explanation.attribution.values[:, explanation.target_index]
    for tile in np.argsort(-np.abs(values), kind="stable")[:count].tolist():
        x, y = explanation.slide.coords[tile].tolist()
        path = _path(folder, explanation, f"-tile-{x}-{y}.png")
        write_tile_map(path, explanation, slide, tile, encode, score=score, fill=fill)
        yield path


def _path(folder: Path, explanation: Explanation, suffix: str) -> Path:
    target = file_stem(explanation.target_class)
    return folder / f"{explanation.slide.slide_id}-{explanation.attribution.method}-{target}{suffix}"
