"""GeoJSON as QuPath reads and writes it: annotations in, tissue and tiles out."""

from __future__ import annotations

import gzip
import io
import json
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapely
from shapely.geometry import Polygon, box, shape
from shapely.geometry.base import BaseGeometry

from gigapath_contract.errors import one_line
from gigapath_contract.files import parse_json

from ..arrays import Bool, Float64, Int64
from ..errors import MaskError
from ..files import atomic_path

Feature = dict[str, Any]
Frame = Literal["qupath", "level0"]
"""Where annotations have their (0, 0) on a slide with bounds: at the bounds' corner, or at level 0's."""

SUFFIXES = (".geojson", ".json", ".geojson.gz", ".json.gz")
TISSUE_COLOUR, TILE_COLOUR = (20, 110, 60), (60, 90, 160)
# The same object gets the same id in every run.
_NAMESPACE = uuid.UUID("0d7c5f7e-7a1c-4c55-9d7e-2f6f3a6f0c11")

MOST_BYTES = 256 << 20  # of JSON: as Python objects it takes ten times that
_BAD_SHAPE = (
    *(LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError),
    shapely.errors.ShapelyError,
)
FURTHEST_PX = 1e8  # no slide reaches so far, and cv2's fixed point would overflow
# GEOS needs minutes for an outline that crosses itself or others much more often, and no drawing does.
MOST_CROSSINGS = 2_000  # of one outline with itself ...
MOST_OVERLAPS = 20_000  # ... and of all outlines, beyond three per vertex
MOST_CANDIDATES = 5_000_000  # pairs of edges whose bounding boxes meet, beyond 50 per vertex


def is_geojson(path: Path) -> bool:
    """Whether a file's name says GeoJSON."""
    return path.name.lower().endswith(SUFFIXES)


def read_annotations(
    path: Path,
    *,
    origin: tuple[int, int] = (0, 0),
    frame: Frame = "qupath",
    classes: frozenset[str] | None = None,
) -> BaseGeometry:
    """The union of a file's areas in level-0 pixels, less those whose class ends with * (QuPath's Ignore*).

    `origin` is where QuPath's (0, 0) lies on level 0, as it crops a slide to its bounds, and `frame` whether
    the file counts from there. `classes` keeps those names only. Points and lines are passed over.

    Raises:
        MaskError: not readable, not GeoJSON, without areas, or its outlines cross too often.
    """
    found = _areas(path)
    ignored = [geometry for name, geometry in found if name.endswith("*")]
    wanted = [g for name, g in found if not name.endswith("*") and (classes is None or name in classes)]
    if not wanted:
        names = ", ".join(sorted({name or "(none)" for name, _ in found})) or "none at all"
        raise MaskError(
            f"{path}: no area of the wanted class in it (classes with areas: {names}): draw tissue first"
        )
    area = shapely.union_all(wanted).difference(shapely.union_all(ignored))
    return shapely.transform(area, lambda points: points + np.array(origin)) if frame == "qupath" else area


def frame_doubt(path: Path, area: BaseGeometry, bounds: tuple[int, int, int, int], frame: Frame) -> str:
    """What speaks against the frame in which a file's `area` was read, for a slide's `bounds`; else empty."""
    left, top, width, height = bounds
    scanned = box(left, top, left + width, top + height).buffer(1)
    if scanned.covers(area):
        return ""
    if frame == "level0" or (left, top) == (0, 0):
        outside = area.difference(scanned).area / area.area
        if outside <= 0.05:
            return ""
        return f"{outside:.0%} of {path.name} lies outside the slide: is it of this one?"
    return (
        f"{path.name} reaches beyond the slide's bounds, where QuPath's (0, 0) lies: if it is in level-0 "
        "pixels, give --mask-frame level0"
    )


def read_features(path: Path) -> list[Feature]:
    """The features of a FeatureCollection, of a bare list of them, of one alone, or of a bare geometry.

    Those that QuPath nests in others, where it writes its hierarchy, come last.

    Raises:
        MaskError: not readable, or not GeoJSON.
    """
    try:
        with path.open("rb") as file:
            data = (gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file).read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise MaskError(f"{path}: over {MOST_BYTES >> 20} MiB of JSON: export the annotations alone")
        content = parse_json(data)
    except (ValueError, EOFError, zlib.error) as error:
        raise MaskError(f"{path}: not JSON ({error}): export it again") from None
    except OSError as error:
        raise MaskError(f"{path}: cannot be read ({error.strerror or error}): check the file") from None
    if isinstance(content, dict) and ("coordinates" in content or "geometries" in content):
        content = {"type": "Feature", "geometry": content, "properties": None}
    features = content.get("features", [content]) if isinstance(content, dict) else content
    if not isinstance(features, list) or not all(isinstance(feature, dict) for feature in features):
        raise MaskError(f"{path}: not GeoJSON: export annotations from QuPath as GeoJSON")
    for feature in features:  # grows by what is nested
        about = feature.get("properties")
        nested = about.get("childObjects") if isinstance(about, dict) else None
        features += [child for child in nested if isinstance(child, dict)] if isinstance(nested, list) else []
    return features


def write_feature_collection(path: Path, features: Iterable[Feature]) -> None:
    """Stream features into a FeatureCollection, gzipped where the name ends with .gz; whole or not at all.

    Raises:
        OutputError: it can't be written.
    """
    with atomic_path(path) as part, part.open("wb") as raw:
        # A fixed time and no name: the same features give the same bytes.
        out = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else raw
        with io.TextIOWrapper(out, encoding="utf-8") as file:
            file.write('{"type": "FeatureCollection", "features": [')
            for index, feature in enumerate(features):
                file.write((",\n" if index else "\n") + json.dumps(feature))
            file.write("\n]}\n")


def tissue_features(
    contours: Iterable[Polygon], slide_id: str, *, origin: tuple[int, int] = (0, 0)
) -> Iterator[Feature]:
    """One annotation for each contour (level-0 pixels); `origin` as in `read_annotations`."""
    for index, contour in enumerate(contours):
        placed = shapely.transform(contour, lambda points: np.round(points - np.array(origin), 2))
        yield _feature(
            placed,
            f"{slide_id} Tissue {index}",
            objectType="annotation",
            classification=_class("Tissue", TISSUE_COLOUR),
        )


def area_feature(
    area: BaseGeometry,
    slide_id: str,
    name: str,
    colour: tuple[int, int, int],
    measurements: Mapping[str, float],
) -> Feature:
    """One annotation of the class `name` with measurements; `area` in QuPath's pixels."""
    return _feature(
        area,
        f"{slide_id} {name}",
        objectType="annotation",
        classification=_class(name, colour),
        measurements=dict(measurements),
    )


def tile_features(
    coords: Int64,
    size: tuple[int, int],
    slide_id: str,
    *,
    measurements: Mapping[str, Sequence[float]] | None = None,
    colours: Sequence[Sequence[int]] | None = None,
    origin: tuple[int, int] = (0, 0),
) -> Iterator[Feature]:
    """One tile object for each of `coords` [N, 2] (level-0 pixels), of `size` (w, h) level-0 pixels.

    `measurements` are N numbers by name; those that are not finite are left out, as JSON has none. `colours`
    are N times RGB from 0 to 255, in place of the class's.
    """
    for index, (x, y) in enumerate((coords - np.array(origin)).tolist()):
        named = ((name, float(values[index])) for name, values in (measurements or {}).items())
        yield _feature(
            shapely.box(x, y, x + size[0], y + size[1], ccw=False),
            f"{slide_id} tile {x} {y}",
            objectType="tile",
            classification=_class("tile", TILE_COLOUR),
            **({} if colours is None else {"color": [int(part) for part in colours[index]]}),
            measurements={name: value for name, value in named if np.isfinite(value)},
        )


def _feature(geometry: BaseGeometry, name: str, **properties: Any) -> Feature:
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_NAMESPACE, name)),
        "geometry": shapely.geometry.mapping(geometry),
        "properties": {**properties, "isLocked": True},
    }


def _class(name: str, colour: tuple[int, int, int]) -> dict[str, Any]:
    return {"name": name, "color": list(colour)}


def _areas(path: Path) -> list[tuple[str, BaseGeometry]]:
    """Class and valid shape of each feature with an area."""
    shapes = []
    for feature in read_features(path):
        if "geometry" in feature and feature["geometry"] is None:  # RFC 7946: an object without a place
            continue
        try:
            shapes.append((_class_name(feature), shape(feature["geometry"])))
        except _BAD_SHAPE as error:
            raise MaskError(
                f"{path}: a feature has no valid geometry ({one_line(error)}): export it again"
            ) from None
    _check_outlines(path, [geometry for _, geometry in shapes])
    areas = []
    for name, geometry in shapes:
        parts = [p for p in shapely.get_parts(shapely.make_valid(geometry)) if p.area > 0]
        if parts:
            areas.append((name, shapely.union_all(parts)))
    return areas


def _check_outlines(path: Path, geometries: Sequence[BaseGeometry]) -> None:
    """Refuse coordinates that no slide has, and outlines that would keep GEOS busy for minutes.

    Raises:
        MaskError: they are not finite or too large, or cross themselves or each other too often.
    """
    parts, owner = np.array(geometries, object), np.arange(len(geometries))
    while (shapely.get_type_id(parts) > 3).any():  # collections, which hold collections
        parts, index = shapely.get_parts(parts, return_index=True)
        owner = owner[index]
    rings, index = shapely.get_rings(parts, return_index=True)
    points, ring = shapely.get_coordinates(rings, return_index=True)
    if not (np.abs(points) <= FURTHEST_PX).all():  # false for nan too
        raise MaskError(f"{path}: holds coordinates that no slide has: export it again, in pixels")
    starts = np.flatnonzero(ring[1:] == ring[:-1])
    ends, edge_owner = starts + 1, owner[index[ring[starts]]]
    edges = np.stack([points[starts], points[ends]], axis=1)
    tree, candidates, crossings = shapely.STRtree(shapely.linestrings(edges)), 0, 0
    own = np.zeros(len(geometries), np.int64)
    for first in range(0, len(edges), _EDGES_AT_A_TIME):
        some = tree.geometries[first : first + _EDGES_AT_A_TIME]
        one, other = tree.query(some)
        one = one + first
        candidates += len(one)
        one, other = one[one < other], other[one < other]
        cross = _cross(edges[one], edges[other])
        one, other = edge_owner[one[cross]], edge_owner[other[cross]]
        crossings += len(one)
        np.add.at(own, one[one == other], 1)
        if (
            candidates > MOST_CANDIDATES + 50 * len(edges)
            or crossings > MOST_OVERLAPS + 3 * len(edges)
            or own.max(initial=0) > MOST_CROSSINGS
        ):
            raise MaskError(
                f"{path}: its outlines cross too often for areas: draw or simplify them in QuPath"
            )


_EDGES_AT_A_TIME = 64


def _cross(one: Float64, other: Float64) -> Bool:
    """Which pairs of edges, each [n, 2 ends, (x, y)], cross in their inside."""

    def side(edge: Float64, point: Float64) -> Float64:
        (dx, dy), (px, py) = (edge[:, 1] - edge[:, 0]).T, (point - edge[:, 0]).T
        return np.asarray(dx * py - dy * px)

    def apart(edge: Float64, ends: Float64) -> Bool:
        return np.asarray(np.sign(side(edge, ends[:, 0])) * np.sign(side(edge, ends[:, 1])) < 0)

    return apart(one, other) & apart(other, one)


def _class_name(feature: Feature) -> str:
    """QuPath's class of an object, `Tumor: Positive` where it is derived; empty where it has none."""
    named = (feature.get("properties") or {}).get("classification") or {}
    if isinstance(named, dict):
        named = named.get("name") or named.get("names") or ""
    return ": ".join(map(str, named)) if isinstance(named, list) else str(named)
