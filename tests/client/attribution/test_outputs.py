"""What an explanation becomes: pixels in their place, arrays in their rows, tiles that QuPath reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from PIL import Image

from client.arrays import Float32, Float64, Int64, KeepMask
from client.attribution.attribute import Settings
from client.attribution.explain import ExplainProgress, Explanation, explain
from client.attribution.methods.result import Grouping
from client.attribution.methods.scorer import Scores
from client.attribution.model.embedded import EmbeddedSlide, read_embedded
from client.attribution.render.contact_sheet import strongest
from client.attribution.render.evidence import evidence_lines
from client.attribution.render.figures import _title, canvas_for, prediction, write_map, write_strongest
from client.attribution.render.files import write_explanation
from client.attribution.render.outputs import write_arrays, write_geojson
from client.attribution.render.overlay import (
    COLOURS,
    FAINT,
    OPACITY,
    Canvas,
    colour_limit,
    draw_map,
    muted,
    scale_bar,
)
from client.errors import ClientError, ContractMismatch
from client.slides.slide import open_slide
from client.viewer.contents import _sets
from gigapath_contract.schema import Contract

TILE = (257, 257)


def forward(embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
    """Evidence in channel 0 of an embedding adds up, softly."""
    value = np.tanh(keep @ embeddings[:, 0].astype(np.float64) / 4).astype(np.float32) * 4
    return Scores(np.stack([value, 0 * value], axis=1), np.stack([value, np.ones_like(value)], axis=1))


def write_h5(path: Path, embeddings: Float32, coords: Int64, **attributes: object) -> Path:
    about = {"patch_size": 256, "patch_size_level0": TILE[0], "level0_width": 2220, "level0_height": 2967}
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = embeddings, coords
        file["valid"] = np.isfinite(embeddings).all(axis=1)
        file["coords"].attrs.update(about | {"name": path.stem} | attributes)
    return path


@pytest.fixture
def grid() -> tuple[Float32, Int64]:
    """40 tiles over the real slide, in an order that is not row-major; tile 5 could not be decoded."""
    rng = np.random.default_rng(0)
    rows, columns = np.divmod(np.arange(40), 5)
    order = rng.permutation(40)
    embeddings = rng.normal(size=(40, 2)).astype(np.float32)
    embeddings[5] = np.nan
    return embeddings, (np.stack([columns, rows], axis=1)[order] * 257 + 100).astype(np.int64)


@pytest.fixture
def slide(grid: tuple[Float32, Int64], tmp_path: Path) -> EmbeddedSlide:
    return read_embedded(write_h5(tmp_path / "toy.h5", *grid))


@pytest.fixture
def explanation(slide: EmbeddedSlide, toy_contract: Contract) -> Explanation:
    settings = Settings(method="shapley_regression", max_evals=256)
    return explain(slide, forward, toy_contract, settings, target="tumour")


def read_png(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_tile_colours_exactly_its_own_pixels() -> None:
    rng = np.random.default_rng(0)
    canvas = Canvas(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8), (4.0, 4.5))
    coords, values = np.array([[40, 90], [97, 90]]), np.array([1.0, -0.5])
    drawn = draw_map(canvas, coords, (57, 61), values, limit=2.0)
    grey = muted(canvas.pixels)
    expected = grey.copy()
    # Both edges are floored: [40, 97) / 4 -> 10..24, [97, 154) / 4 -> 24..38, [90, 151) / 4.5 -> 20..33.
    for (x0, x1), value in (((10, 24), 1.0), ((24, 38), -0.5)):
        colour = 255 * np.array(COLOURS(0.5 + 0.5 * value / 2))[:3]
        opacity = FAINT + (OPACITY - FAINT) * abs(value / 2) ** 0.5
        expected[20:33, x0:x1] += opacity * (colour - grey[20:33, x0:x1])
    np.testing.assert_array_equal(drawn, np.rint(expected).astype(np.uint8))


def test_what_was_not_scored_is_not_drawn_and_noise_is_faint() -> None:
    canvas = Canvas(np.full((40, 40, 3), 200, np.uint8), (1.0, 1.0))
    coords = np.array([[0, 0], [20, 0]])
    drawn = draw_map(canvas, coords, (20, 20), np.array([np.nan, 1.0]), 1.0, np.array([False, True]))
    grey = muted(canvas.pixels)
    np.testing.assert_array_equal(drawn[:, :20], np.rint(grey[:, :20]).astype(np.uint8))
    colour = 255 * np.array(COLOURS(1.0))[:3]
    faint = np.rint(grey[0, 0] + FAINT * (colour - grey[0, 0])).astype(np.uint8)
    tile = drawn[:20, 20:]
    assert (tile == faint).all(axis=2).mean() > 0.5
    assert (tile != faint).any(axis=2).sum() > 20  # the hatching


def test_areas_are_outlined_and_a_scale_bar_has_a_round_length() -> None:
    ring = np.array([[10.0, 10], [30, 10], [30, 30], [10, 30]])
    canvas = Canvas(np.full((40, 40, 3), 250, np.uint8), (1.0, 1.0), (ring,))
    drawn = draw_map(canvas, np.array([[0, 0]]), (5, 5), np.array([1.0]), 1.0)
    assert (drawn[10, 12:28] == 0).all()
    assert (drawn[18:22, 18:22] > 200).all()
    assert scale_bar(2.0, 1000) == (250.0, "500 µm")
    assert scale_bar(10.0, 1000) == (200.0, "2 mm")


def test_a_figure_names_the_model_the_prediction_and_the_class_shown(explanation: Explanation) -> None:
    logits = explanation.masked_slide.in_place()(np.ones((1, 39), bool)).logits[0].astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum()
    best = int(chances.argmax())
    assert prediction(explanation) == f"{('tumour', 'normal')[best]}, p = {chances[best]:.3f}"
    assert prediction(replace(explanation, contract=replace(explanation.contract, head=None))) == ""
    contract = replace(explanation.contract, preset="own", export_id="0123456789abcdef")
    assert _title(replace(explanation, contract=contract))[1].startswith("model own-01234567; ")


def test_zero_is_the_middle_of_the_colours_and_one_outlier_does_not_set_them() -> None:
    values = np.concatenate([np.linspace(-1, 1, 1000), [50.0, np.nan]])
    assert 0.9 < colour_limit(values) < 1.1
    assert colour_limit(np.array([0.0, 0.0])) == 1
    assert colour_limit(np.array([np.nan])) == 1


def test_weak_values_of_a_large_slide_are_pale_where_few_tiles_carry_the_score() -> None:
    values = np.full(3000, -0.002)
    values[::200] = 0.6
    assert colour_limit(values) == 0.6
    middle = np.array(COLOURS(0.5))[:3]
    assert np.ptp(middle) < 0.02  # neither red nor blue


def test_the_picture_is_in_the_file_pixel_for_pixel(
    explanation: Explanation, real_slide: Path, tmp_path: Path
) -> None:
    with open_slide(real_slide) as opened:
        canvas = canvas_for(explanation, opened)
    write_map(tmp_path / "map.png", explanation, canvas)
    written = read_png(tmp_path / "map.png")
    values = explanation.attribution.values[:, 0]
    assert explanation.reliability is not None
    faint = np.abs(values) < explanation.reliability.noise_floor
    drawn = draw_map(canvas, explanation.slide.coords, TILE, values, colour_limit(values), faint)
    height, width = drawn.shape[:2]
    found = cv2.matchTemplate(written, drawn, cv2.TM_SQDIFF)
    _, _, (x, y), _ = cv2.minMaxLoc(found)
    np.testing.assert_array_equal(written[y : y + height, x : x + width], drawn)


def test_a_map_that_does_not_beat_random_says_so_on_the_picture(
    explanation: Explanation, tmp_path: Path
) -> None:
    assert explanation.reliability is not None
    good = replace(explanation.reliability, random_srg=(0.0,))
    bad = replace(explanation.reliability, random_srg=(1e9,))
    red = {}
    for name, trust in (("good", good), ("bad", bad)):
        path = tmp_path / f"{name}.png"
        write_map(path, replace(explanation, reliability=trust), canvas_for(explanation, None))
        red[name] = int((read_png(path) == (220, 20, 60)).all(axis=2).sum())  # crimson, of warnings alone
        assert ("does not beat a random map" in " ".join(trust.warnings())) == (name == "bad")
    assert red["bad"] > red["good"] + 100


def test_values_land_in_the_file_s_own_rows(
    explanation: Explanation, grid: tuple[Float32, Int64], tmp_path: Path
) -> None:
    path = tmp_path / "toy.h5"
    before = path.read_bytes()
    write_arrays(path, explanation)
    with h5py.File(path) as file:
        assert all(isinstance(item, h5py.Dataset) and item.ndim > 0 for item in file.values())
        values, stderr = (file[f"attribution_shapley_regression{end}"] for end in ("", "_stderr"))
        assert values.shape == stderr.shape == (40, 2)
        assert values.dtype == np.float64
        assert np.isnan(values[5]).all()
        assert np.isnan(values[:]).sum() == 2
        np.testing.assert_array_equal(file["coords"][:], grid[1])
        np.testing.assert_array_equal(values[:][explanation.slide.rows], explanation.attribution.values)
        alone = file["attribution_keep_one"][:]
        about = dict(values.attrs)
    # Tile i alone: tanh of its own evidence, in the row that i had in the file.
    np.testing.assert_allclose(alone[6, 0], 4 * np.tanh(grid[0][6, 0] / 4), atol=1e-6)
    assert about["target"] == "tumour"
    assert about["occluder"] == "in_place"
    assert list(about["classes"]) == ["tumour", "normal"]
    assert about["export_id"] == "toy"
    assert not about["trained"]
    assert {"noise_floor", "srg", "random_srg", "deletion", "redundancy", "agreement"} <= set(about)
    # Again: the same bytes; an unreadable file stays as it was.
    once = path.read_bytes()
    write_arrays(path, explanation)
    assert path.read_bytes() == once != before
    path.write_bytes(b"no hdf5")
    with pytest.raises(ClientError, match="HDF5"):
        write_arrays(path, explanation)
    assert path.read_bytes() == b"no hdf5"
    assert [p.name for p in tmp_path.iterdir()] == ["toy.h5"]


def test_a_class_of_any_name_is_shown_by_its_name(explanation: Explanation, tmp_path: Path) -> None:
    names = ("ER+ / PR+", "ER+ < PR+")
    odd = replace(explanation, attribution=replace(explanation.attribution, names=names))
    for number in (0, 1):
        write_arrays(tmp_path / "toy.h5", replace(odd, target_index=number))
    with h5py.File(tmp_path / "toy.h5") as file:
        assert {one["class"] for one in _sets(file, len(file["coords"]))} == set(names)


def by_place(slide: EmbeddedSlide, values: Float64) -> dict[tuple[int, int], float]:
    return {(x, y): value for (x, y), value in zip(slide.coords.tolist(), values[:, 0], strict=True)}


@pytest.mark.parametrize("method", ["partition_shap", "occlusion", "keep_one", "shapley_regression"])
def test_the_order_of_tiles_in_the_file_changes_nothing(
    grid: tuple[Float32, Int64], toy_contract: Contract, tmp_path: Path, method: str
) -> None:
    def positional(embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        weight = 1 + 0.2 * np.cos(np.arange(len(embeddings)))
        return forward((embeddings * weight[:, None]).astype(np.float32), coords, keep)

    embeddings, coords = np.nan_to_num(grid[0]), grid[1]
    order = np.random.default_rng(5).permutation(40)
    settings = Settings(method=method, max_evals=200)  # type: ignore[arg-type]
    found = []
    for name, rows in (("a", np.arange(40)), ("b", order)):
        slide = read_embedded(write_h5(tmp_path / f"{name}.h5", embeddings[rows], coords[rows]))
        result = explain(slide, positional, toy_contract, settings, checks=False)
        found.append(by_place(slide, result.attribution.values))
    assert found[0] == found[1]


def test_the_maps_by_look_and_by_place_are_both_stored_and_named(
    slide: EmbeddedSlide, toy_contract: Contract, grid: tuple[Float32, Int64], tmp_path: Path
) -> None:
    path = tmp_path / "toy.h5"
    explained = explain(slide, forward, toy_contract, target="tumour")
    written = write_explanation(explained, path, tmp_path, None)
    names = {one.grouping: one for one in explained.attribution.groupings}
    other: Grouping = "place" if explained.attribution.grouping == "look" else "look"
    stem = f"{slide.slide_id}-partition_shap-tumour"
    assert {each.name for each in written} == {
        "toy.h5", f"{stem}.png", f"{stem}.geojson", f"{stem}-by-{other}.png", f"{stem}-evidence.geojson"
    }  # fmt: skip
    with h5py.File(path) as file:
        about = dict(file["attribution_partition_shap"].attrs)
        assert about["grouping"] == explained.attribution.grouping
        assert about[f"srg_{about['grouping']}"] >= about[f"srg_{other}"]
        for grouping, one in names.items():
            assert one.srg == about[f"srg_{grouping}"]
            stored = file[f"attribution_partition_shap_{grouping}"][:]
            np.testing.assert_array_equal(stored[slide.rows], one.values)
    first = json.loads((tmp_path / f"{stem}.geojson").read_text())["features"][0]
    assert first["properties"]["measurements"][f"attr_{other}:tumour"] == names[other].values[0, 0]
    # One grouping alone leaves nothing of the other behind.
    alone = explain(slide, forward, toy_contract, Settings(group="place"), target="tumour")
    assert len(write_explanation(alone, path, tmp_path, None)) == 4
    with h5py.File(path) as file:
        assert {name for name in file if name.startswith("attribution_partition")} == {
            "attribution_partition_shap",
            "attribution_partition_shap_leaf_size",
        }
        assert file["attribution_partition_shap"].attrs["grouping"] == "place"
        assert "srg_look" not in file["attribution_partition_shap"].attrs


def test_qupath_tiles_carry_values_at_their_places(explanation: Explanation, tmp_path: Path) -> None:
    path = tmp_path / "tiles.geojson"
    write_geojson(path, explanation, origin=(100, 100))
    features = json.loads(path.read_text())["features"]
    assert len(features) == 39
    values = by_place(explanation.slide, explanation.attribution.values)
    for feature in features:
        assert feature["properties"]["objectType"] == "tile"
        x0, y0, x1, y1 = shapely.geometry.shape(feature["geometry"]).bounds
        assert (x1 - x0, y1 - y0) == TILE
        measured = feature["properties"]["measurements"]
        assert measured["attr:tumour"] == values[int(x0) + 100, int(y0) + 100]
        assert {"attr_se:tumour", "keep_one:tumour", "attr:normal"} <= set(measured)


def test_the_strongest_tiles_are_shown_once_each(
    explanation: Explanation, real_slide: Path, tmp_path: Path
) -> None:
    supports, opposes = strongest(np.array([0.1, np.nan, -3, 2, 0, -1]), 8)
    assert supports.tolist() == [3, 0]
    assert opposes.tolist() == [2, 5]
    with open_slide(real_slide) as opened:
        write_strongest(tmp_path / "sheet.png", explanation, opened)
    assert read_png(tmp_path / "sheet.png").std() > 10


def test_progress_gives_the_cost_per_forward(slide: EmbeddedSlide, toy_contract: Contract) -> None:
    progresses: list[ExplainProgress] = []
    explain(slide, forward, toy_contract, progress=progresses.append)
    assert [p.done for p in progresses] == sorted(p.done for p in progresses)
    assert {p.stage for p in progresses} == {"partition_shap", "keep_one", "reliability", "evidence"}
    assert all(p.seconds_per_forward is not None and p.seconds_per_forward > 0 for p in progresses)
    assert progresses[0].seconds_left is not None
    assert progresses[0].seconds_left > 0
    assert progresses[-1].done <= progresses[-1].planned


def test_what_does_not_fit_is_refused_in_one_line(
    grid: tuple[Float32, Int64], toy_contract: Contract, tmp_path: Path
) -> None:
    slide = read_embedded(write_h5(tmp_path / "toy.h5", *grid))
    with pytest.raises(ClientError, match="knows tumour, normal"):
        explain(slide, forward, toy_contract, target="cat")
    with pytest.raises(ClientError, match="--target"):
        explain(slide, forward, toy_contract, target="tumour", score="embedding")
    with pytest.raises(ClientError, match="no classification head"):
        explain(slide, forward, replace(toy_contract, head=None))
    with pytest.raises(ContractMismatch, match="other tile-encoder weights"):
        explain(replace(slide, encoder_sha256="other"), forward, toy_contract)
    with pytest.raises(ContractMismatch, match=r"width 3.*takes 2"):
        explain(replace(slide, embeddings=np.ones((39, 3), np.float32)), forward, toy_contract)
    rule = replace(toy_contract, variant=replace(toy_contract.variant, coordinates="target-mpp/256"))
    with pytest.raises(ContractMismatch, match="mpp"):
        slide.model_coords(rule)
    with pytest.raises(ClientError, match="no valid tile"):
        read_embedded(write_h5(tmp_path / "nan.h5", np.full((3, 2), np.nan, np.float32), grid[1][:3]))
    unsized = write_h5(tmp_path / "unsized.h5", *grid)
    with h5py.File(unsized, "r+") as file:
        del file["coords"].attrs["patch_size_level0"]
    with pytest.raises(ClientError, match="patch_size_level0"):
        read_embedded(unsized)


def test_the_evidence_is_measured_layered_and_annotated(
    grid: tuple[Float32, Int64], toy_contract: Contract, tmp_path: Path
) -> None:
    # Eight tiles of evidence, of which three make the class; the other tiles mean nothing.
    embeddings, coords = np.zeros_like(grid[0]), grid[1]
    embeddings[:8, 0] = 2

    def rule(embeddings: Float32, coords: Int64, keep: KeepMask) -> Scores:
        value = (keep @ embeddings[:, 0] - 5).astype(np.float32)
        return Scores(np.stack([value, 0 * value], axis=1), np.ones((len(keep), 2), np.float32))

    path = write_h5(tmp_path / "toy.h5", embeddings, coords, mpp_level0_x=0.5, mpp_level0_y=0.25)
    explained = explain(read_embedded(path), rule, toy_contract, target="tumour")
    write_explanation(explained, path, tmp_path, None)
    cell = explained.slide.cell_mm2
    with h5py.File(path) as file:
        for kind, count, output in (("sufficient", 3, 1), ("necessary", 6, -1)):
            layer = file[f"{kind}_tumour"]
            assert layer[:].sum() == layer[:8].sum() == count
            assert layer.attrs["tiles"] == count
            assert layer.attrs["share"] == count / 40
            assert layer.attrs["output"] == output
            assert layer.attrs["mm2"] == pytest.approx(count * 257 * 257 * 0.5 * 0.25 / 1e6)
    assert cell == pytest.approx(257 * 257 * 0.125 / 1e6)
    areas = json.loads((tmp_path / "toy-partition_shap-tumour-evidence.geojson").read_text())["features"]
    assert [area["properties"]["classification"]["name"] for area in areas] == [
        "tumour: sufficient",
        "tumour: necessary",
    ]
    for area, count in zip(areas, (3, 6), strict=True):
        assert area["properties"]["objectType"] == "annotation"
        assert area["properties"]["measurements"]["tiles"] == count
        geometry = shapely.geometry.shape(area["geometry"])
        assert geometry.area == count * 257 * 257
        inside = shapely.contains_xy(geometry, *(coords + 128).T)
        assert inside.sum() == inside[:8].sum() == count
    lines = evidence_lines(explained)
    assert lines[0].startswith(
        "sufficient for tumour: 3 tiles (0.0248 mm², 7.50% of the tissue); alone score +1"
    )
    assert lines[2] == "without the sufficient tiles the slide is still called tumour (+5)"
    # The other class is not what the slide is called: nothing of it is evidence, and nothing is left behind.
    other = explain(read_embedded(path), rule, toy_contract, target="normal")
    assert other.evidence is None
    assert evidence_lines(other) == []
