"""GeoJSON: what QuPath exports comes in, what it imports goes out, nonsense is one line."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapely.geometry import box, shape

from client.errors import MaskError
from client.slides.geojson import (
    is_geojson,
    read_annotations,
    tile_features,
    tissue_features,
    write_feature_collection,
)


def polygon(*corners: tuple[float, float], name: str | None = None) -> dict[str, object]:
    ring = [*corners, corners[0]]
    properties = {"classification": {"name": name}} if name else {}
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": properties,
    }


SQUARE = polygon((0, 0), (10, 0), (10, 10), (0, 10), name="Tissue")


def test_names() -> None:
    assert all(is_geojson(Path(name)) for name in ("a.geojson", "a.JSON", "a.geojson.gz", "a.json.gz"))
    assert not any(is_geojson(Path(name)) for name in ("a.png", "geojson", "a.gz"))


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [SQUARE]},
        [SQUARE],  # QuPath before 0.3
        SQUARE,
        SQUARE["geometry"],
        {"type": "GeometryCollection", "geometries": [SQUARE["geometry"]]},
        {"type": "FeatureCollection", "features": [SQUARE, SQUARE]},
        {"type": "FeatureCollection", "features": [{**SQUARE, "properties": None}]},
        [SQUARE, {"type": "Feature", "geometry": None, "properties": {}}],  # allowed by RFC 7946
        [
            SQUARE,
            {"type": "Feature", "geometry": {"type": "Point", "coordinates": [90, 90]}, "properties": {}},
        ],
    ],
)
def test_every_form_of_export(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(content))
    assert read_annotations(path).equals(box(0, 0, 10, 10))
    assert read_annotations(path, origin=(100, 50)).equals(box(100, 50, 110, 60))


def test_classes_and_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    other = polygon((20, 0), (30, 0), (30, 10), (20, 10), name="Stroma")
    ignored = polygon((0, 0), (5, 0), (5, 10), (0, 10), name="Ignore*")
    bow_tie = polygon((40, 0), (50, 10), (50, 0), (40, 10), name="Stroma")  # crosses itself
    path.write_text(json.dumps([SQUARE, other, ignored, bow_tie]))
    assert read_annotations(path).area == 50 + 100 + 50
    assert read_annotations(path, classes=frozenset({"Tissue"})).equals(box(5, 0, 10, 10))
    with pytest.raises(MaskError, match=r"classes with areas: Ignore\*, Stroma, Tissue"):
        read_annotations(path, classes=frozenset({"Tumor"}))
    named = [{**SQUARE, "properties": {"classification": how}} for how in ("Tumor", ["Tumor", "CD8"])]
    path.write_text(json.dumps(named))
    for name in ("Tumor", "Tumor: CD8"):  # as QuPath shows it, and wrote it before 0.4
        assert read_annotations(path, classes=frozenset({name})).equals(box(0, 0, 10, 10))


def test_objects_in_qupath_s_hierarchy_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    inner = polygon((2, 2), (4, 2), (4, 4), (2, 4), name="Tumor")
    outer = {**SQUARE, "properties": {"classification": {"name": "Tissue"}, "childObjects": [inner]}}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [outer]}))
    assert read_annotations(path).equals(box(0, 0, 10, 10))
    assert read_annotations(path, classes=frozenset({"Tumor"})).equals(box(2, 2, 4, 4))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"3", "not GeoJSON"),
        (b'["a"]', "not GeoJSON"),
        (b"{}", "no valid geometry"),
        (b'[{"geometry": null}]', "no area of the wanted class"),
        (b'[{"type": "Feature"}]', "no valid geometry"),
        (b'[{"geometry": {"type": "Polygon", "coordinates": [[0, 1]]}}]', "no valid geometry"),
        (b'[{"geometry": {"type": "Cube", "coordinates": [[0, 1]]}}]', "no valid geometry"),
        (b'{"type": "FeatureCollection", "features": []}', r"classes with areas: none at all"),
        (b'[{"geometry": {"type": "Point", "coordinates": [0, 1]}}]', r"classes with areas: none at all"),
        (b"[" * 100_000, "not JSON"),
        (b'[{"geometry": {"type": "Polygon", "coordinates": []}, "properties": [1]}]', "no valid geometry"),
        (
            b'[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1e999, 0], [1, 1], [0, 0]]]}}]',
            "coordinates that no slide has",
        ),
    ],
)
def test_nonsense_is_one_line(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "a.geojson"
    path.write_bytes(data)
    with pytest.raises(MaskError, match=said) as error:
        read_annotations(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_outlines_that_cross_too_often_are_refused_at_once(tmp_path: Path) -> None:
    """Of 400 random vertices GEOS needs half a minute, of 3,000 hours; few crossings are no mistake."""
    random, path = np.random.default_rng(0), tmp_path / "a.geojson"

    def drawn(vertices: int) -> dict[str, Any]:
        return polygon(*random.random((vertices, 2)).tolist())

    path.write_text(json.dumps([drawn(30), drawn(40)]))
    assert read_annotations(path).area > 0
    for tangled in ([drawn(3_000)], [drawn(8) for _ in range(200)]):
        path.write_text(json.dumps(tangled))
        began = time.process_time()
        with pytest.raises(MaskError, match="cross too often"):
            read_annotations(path)
        assert time.process_time() - began < 10


def test_a_compressed_file_is_refused_by_what_it_unpacks_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.slides.geojson.MOST_BYTES", 1 << 20)
    path = tmp_path / "a.geojson.gz"
    path.write_bytes(gzip.compress(b" " * (2 << 20)))
    with pytest.raises(MaskError, match="over 1 MiB of JSON: export the annotations alone"):
        read_annotations(path)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.geojson.gz").write_bytes(gzip.compress(json.dumps(SQUARE).encode())[:-9])
    (tmp_path / "b.geojson.gz").write_text(json.dumps(SQUARE))
    for name, said in [
        ("none.geojson", "cannot be read"),
        ("a.geojson.gz", "not JSON"),
        ("b.geojson.gz", "cannot be read"),
    ]:
        with pytest.raises(MaskError, match=said) as error:
            read_annotations(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_tissue_there_and_back(tmp_path: Path, name: str) -> None:
    drawn = [box(300, 200, 400, 300).difference(box(320, 220, 340, 240)), box(500, 500, 510, 520)]
    write_feature_collection(tmp_path / name, tissue_features(drawn, "s", origin=(300, 200)))
    write_feature_collection(tmp_path / ("again." + name), tissue_features(drawn, "s", origin=(300, 200)))
    data = (tmp_path / name).read_bytes()
    assert data == (tmp_path / ("again." + name)).read_bytes()
    content = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    assert content["type"] == "FeatureCollection"
    first, second = content["features"]
    assert first["type"] == "Feature"
    assert first["id"] != second["id"]
    assert first["properties"]["objectType"] == "annotation"
    assert first["properties"]["classification"] == {"name": "Tissue", "color": [20, 110, 60]}
    assert shape(first["geometry"]).bounds == (0, 0, 100, 100)  # QuPath's coordinates
    assert read_annotations(tmp_path / name, origin=(300, 200)).equals(drawn[0].union(drawn[1]))


def test_tiles(tmp_path: Path) -> None:
    coords = np.array([[0, 0], [256, 0], [0, 250]])
    scores = {"tumour": [0.25, float("nan"), 1.0]}
    path = tmp_path / "tiles.geojson"
    write_feature_collection(path, tile_features(coords, (256, 250), "s", measurements=scores))
    features = json.loads(path.read_text())["features"]
    assert [shape(feature["geometry"]).bounds for feature in features] == [
        (0, 0, 256, 250),
        (256, 0, 512, 250),
        (0, 250, 256, 500),
    ]
    assert [f["properties"]["measurements"] for f in features] == [{"tumour": 0.25}, {}, {"tumour": 1.0}]
    assert {f["properties"]["objectType"] for f in features} == {"tile"}
    ring = features[0]["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1]
    assert len({f["id"] for f in features}) == 3


def test_an_empty_collection_is_valid(tmp_path: Path) -> None:
    write_feature_collection(tmp_path / "a.geojson", iter(()))
    assert json.loads((tmp_path / "a.geojson").read_text()) == {"type": "FeatureCollection", "features": []}
