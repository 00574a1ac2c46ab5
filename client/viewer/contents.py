"""What the page shows of one slide, as JSON: where it lies, its tiles, its maps and how far to trust them."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gigapath_contract.command_line import explain
from gigapath_contract.errors import ContractError, FeatureFileError, MppMissing
from gigapath_contract.features import (
    TileFeatures,
    check_self_contained,
    dataset,
    one_line_errors,
    read_tile_features,
)

from ..arrays import Array
from ..attribution.render.overlay import colour_limit
from ..errors import ClientError
from ..outputs.file_keys import FileKeys
from ..outputs.layout import StoredSlide
from ..scoring.result_key import SlideContent
from ..slides.address import RemotePath
from ..slides.fingerprint import slide_sha256
from ..slides.geojson import read_features
from .deepzoom import DeepZoom
from .library import Entry, Library

logger = logging.getLogger(__name__)

Json = dict[str, Any]
PREFIX = "attribution_"
TILE_HEAD = "tile_head"
GROUPINGS = ("look", "place")
SETS = ("sufficient", "necessary")


def describe(library: Library, entry: Entry) -> Json:
    """All that the page needs of a slide but its pixels; what cannot be read is named in `problems`."""
    problems: list[str] = []
    found: Json = {
        "key": entry.key,
        "slide_id": entry.slide_id,
        "status": entry.status,
        "scores": entry.scores,
    }
    slide: DeepZoom | None = None
    try:
        slide = library.open(entry)
    except ClientError as error:
        problems.append(str(error))
    if entry.record:
        problems += filter(None, [entry.record.reason, *entry.record.notes])
    try:
        mpp = slide.slide.mpp if slide else None
        found |= _stored(entry.stored, mpp) if entry.stored else {"tiles": None, "maps": [], "sets": []}
    except (ClientError, ContractError, OSError) as error:
        problems.append(f"{entry.stored.results if entry.stored else entry.key}: {error}")
        found |= {"tiles": None, "maps": [], "sets": []}
    dimensions = found.get("dimensions")
    if slide is not None:
        size = list(slide.slide.dimensions)
        if other := _other_file(entry, slide.slide.path, size, dimensions):
            problems.append(f"{slide.slide.path}: {other}: another file, so maps and tiles are not shown")
            found |= {"tiles": None, "maps": [], "sets": []}
        found |= {
            "dimensions": size,
            "mpp": slide.slide.mpp,
            "mpp_source": slide.slide.mpp_source,
            "bounds": slide.slide.bounds,
            "deep_zoom": {"tile": slide.tile, "levels": slide.levels},
        }
    problems += filter(None, [found.get("assumed", "")])
    found["origin"] = found.get("origin") or (slide.slide.bounds[:2] if slide else (0, 0))
    annotations, unreadable = _annotations(library, entry, found["origin"])
    for problem in problems + unreadable:
        logger.warning("%s: %s", entry.slide_id, problem)
    return {
        "deep_zoom": None,
        "bounds": None,
        **found,
        "annotations": annotations,
        "tile_maps": [list(corner) for corner in library.tile_maps(entry)],
        "record": _record(entry),
        "problems": problems + unreadable,
    }


def _other_file(entry: Entry, path: Path, size: list[int], scored: list[int] | None) -> str:
    """Why a file is not the one that was scored; empty where it may be.

    It is judged by its size in px and in bytes; on a server, by the digest, for which it is not read.
    """
    if scored and scored != size:
        return f"{size[0]}x{size[1]} px, but {scored[0]}x{scored[1]} px when it was scored"
    content = FileKeys(entry.stored.out, entry.slide_id).content if entry.stored else SlideContent()
    before = {name: length for name, length, _ in content.files}.get(path.name)
    if isinstance(path, RemotePath):  # no length was noted where it was scored from there
        replaced = before == 0 and content.sha256 != slide_sha256(path)
        return "its server had another one when it was scored" if replaced else ""
    now = path.stat().st_size
    return "" if before in (None, now) else f"{now} bytes, but {before} when it was scored"


def summary(entry: Entry) -> Json:
    """A row of the list of slides."""
    record = entry.record
    return {
        "key": entry.key,
        "slide_id": entry.slide_id,
        "folder": str(entry.folder),
        "status": entry.status,
        "reason": "; ".join(filter(None, [record.reason, *record.notes])) if record else "",
        "tiles": record.tiles if record else None,
        "invalid_tiles": record.invalid_tiles if record else None,
        "mpp": record.mpp if record else None,
        "scores": entry.scores,
        **_brief(entry.stored.results if entry.stored else None),
    }


def _stored(files: StoredSlide, mpp: tuple[float, float] | None = None) -> Json:
    """The tiles, maps and provenance in a slide's HDF5 files; `mpp`: the slide's, for coordinates in µm."""
    with one_line_errors(), h5py.File(files.features) as features, h5py.File(files.results) as file:
        try:
            stored = read_tile_features(features, embeddings=False)
        except MppMissing as error:
            if mpp is None:
                raise ClientError(f"{error}: give the slide (--slide or --wsi-dir)") from error
            stored = read_tile_features(features, embeddings=False, mpp=mpp[0])
        check_self_contained(file)
        one_file = files.results == files.features
        # In a batch's folder another export may have embedded the tiles.
        of_export = stored.attributes if one_file else dict(file["features"].attrs)
        if of_export.get("tile_key") != stored.attributes.get("tile_key"):
            raise ClientError(
                "the tiles were embedded again after this export had scored them: run the batch again"
            )
        about = {**stored.attributes, **of_export, **stored.coords_attributes}
        if stored.scale.tile_size is None:
            raise ClientError(
                "does not say how large its tiles are: view what `attribute` with --tile-size makes of it"
            )
        undecoded = stored.invalid_coords
        sides = [int(about.get(f"level0_{side}", 0)) for side in ("width", "height")]
        origin = tuple(int(start) for start in about.get("bounds_origin", ()))
        return {
            "tiles": {
                "coords": packed(np.concatenate([stored.coords, undecoded]), np.int32),
                "valid": packed(np.concatenate([stored.valid, np.zeros(len(undecoded), bool)]), np.uint8),
                "tissue": packed(np.concatenate([stored.tissue, np.full(len(undecoded), np.nan)])),
                "size": stored.scale.tile_size,
            },
            "dimensions": sides if min(sides) > 0 else None,
            "mpp": stored.scale.mpp,
            "origin": origin,
            "maps": [*_maps(file, len(stored.coords)), *_tile_head(stored)],
            "sets": list(_sets(file, len(stored.coords))),
            "assumed": stored.assumed,
            "contract": _parsed(about.get("contract", "")),
            "about": {name: plain(value) for name, value in about.items() if name != "contract"},
        }


def _maps(file: h5py.File, rows: int) -> Iterator[Json]:
    """Every map of a file, that of `attribute`'s default first; the one by the other grouping is its own."""
    named = sorted(name for name in file if _is_map(file, name))
    for name in sorted(named, key=lambda name: name == f"{PREFIX}keep_one"):
        values = _rows(file, name, rows)
        about = {key: _parsed(plain(value)) for key, value in file[name].attrs.items()}
        errors, leaves = (
            _rows(file, f"{name}_{part}", rows) if f"{name}_{part}" in file else None
            for part in ("stderr", "leaf_size")
        )
        yield _map(name, values, about, errors, leaves)
        for grouping in GROUPINGS:
            if f"{name}_{grouping}" in file and about.get("grouping") != grouping:
                other = {key: about[key] for key in ("classes", "score", "target", "trained") if key in about}
                yield _map(f"{name}_{grouping}", _rows(file, f"{name}_{grouping}", rows), other)


def _tile_head(stored: TileFeatures) -> Iterator[Json]:
    """The tile head's probabilities as a map, which is no attribution."""
    if stored.tile_scores:
        values = np.full((len(stored.coords) + len(stored.invalid_coords), len(stored.tile_scores)), np.nan)
        values[: len(stored.coords)] = np.stack(list(stored.tile_scores.values()), axis=1)
        about = {"classes": list(stored.tile_scores), "trained": plain(stored.attributes.get("trained"))}
        yield {**_map(TILE_HEAD, values, about), "limits": [1.0] * len(stored.tile_scores)}


def _map(
    name: str, values: Array, about: Json, errors: Array | None = None, leaves: Array | None = None
) -> Json:
    return {
        "name": name.removeprefix(PREFIX),
        "classes": about["classes"],
        "values": packed(values),
        "stderr": None if errors is None else packed(errors),
        "leaf_size": None if leaves is None else packed(leaves),
        "limits": [colour_limit(column) for column in values.T],
        "about": about,
    }


def _sets(file: h5py.File, rows: int) -> Iterator[Json]:
    """The tiles that suffice for a class and those that it needs."""
    for name in file:
        kind, _, target = name.partition("_")
        if kind in SETS and target:
            inside = np.flatnonzero(_rows(file, name, rows) > 0)
            about = {key: plain(value) for key, value in file[name].attrs.items()}
            yield {"kind": kind, "class": about.get("class", target), "rows": inside.tolist(), "about": about}


def _rows(file: h5py.File, name: str, rows: int) -> Array:
    """An array of one row per tile, checked before it is read."""
    stored = dataset(file, name, "f")
    if len(stored.shape) not in (1, 2) or stored.shape[0] != rows:
        raise ClientError(f"{name} {stored.shape} has not one row per tile ({rows})")
    values: Array = stored[:]
    # Shown after the others, without a value.
    more = len(file["invalid_coords"]) if "invalid_coords" in file else 0
    return np.concatenate([values, np.full((more, *values.shape[1:]), np.nan, values.dtype)])


def _brief(h5: Path | None) -> Json:
    """The names of a file's maps and their warnings; in place of them what is wrong with the file."""
    if h5 is None:
        return {"maps": [], "warnings": []}
    try:
        return _read_brief(h5, h5.stat().st_mtime_ns)
    except (FeatureFileError, OSError) as error:
        return {"maps": [], "warnings": [explain(error)]}


@lru_cache(4096)
def _read_brief(h5: Path, changed: int) -> Json:
    """`_brief` of a file; `changed` is the file's time."""
    with one_line_errors(), h5py.File(h5) as file:
        check_self_contained(file)
        maps = {name: dict(file[name].attrs) for name in file if _is_map(file, name)}
    warnings = [_parsed(plain(attributes.get("warnings", "[]"))) for attributes in maps.values()]
    return {
        "maps": [name.removeprefix(PREFIX) for name in maps],
        "warnings": [str(text) for texts in warnings for text in texts],
    }


def _is_map(file: h5py.File, name: str) -> bool:
    return name.startswith(PREFIX) and "classes" in file[name].attrs


def limits(library: Library) -> Json:
    """The colour limit of every map and class, one over all slides."""
    found: dict[str, dict[str, float]] = {}
    for entry in library.entries().values():
        try:
            maps = _stored(entry.stored)["maps"] if entry.stored else []
        except (ClientError, ContractError, OSError):
            continue  # the slide's own page says it
        for one in maps:
            classes = found.setdefault(one["name"], {})
            for name, limit in zip(one["classes"], one["limits"], strict=False):
                classes[name] = max(classes.get(name, 0.0), limit)
    return found


def _annotations(library: Library, entry: Entry, origin: tuple[int, int]) -> tuple[list[Json], list[str]]:
    """The features of a slide's GeoJSON files, with where (0, 0) lies, and what could not be read."""
    found, unreadable = [], []
    of_own = origin if library.frame == "qupath" else (0, 0)
    places = [
        *((path, of_own) for path in library.own_geojson(entry)),
        *((path, origin) for path in library.found_geojson(entry)),
    ]
    for path, place in places:
        try:
            found.append({"name": path.name, "origin": place, "features": read_features(path)})
        except ClientError as error:
            unreadable.append(str(error))
    return found, unreadable


def _record(entry: Entry) -> Json | None:
    """What is recorded of how the slide was scored."""
    record = entry.record
    names = ("path", "seconds", "tiles", "invalid_tiles", "resumed_tiles", "result_key", "slide_sha256")
    return {name: getattr(record, name) for name in names} if record else None


def packed(values: Array, kind: type[np.generic] = np.float32) -> Json:
    """An array for the page: base64 of little-endian numbers in C order, with NaN as it is."""
    data = np.ascontiguousarray(values, np.dtype(kind).newbyteorder("<"))
    return {
        "type": np.dtype(kind).name,
        "shape": data.shape,
        "data": base64.b64encode(data.tobytes()).decode(),
    }


def plain(value: Any) -> Any:
    """An HDF5 attribute as JSON knows it; numbers that are not finite become text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _parsed(value: Any) -> Any:
    """A list or object that an attribute holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
