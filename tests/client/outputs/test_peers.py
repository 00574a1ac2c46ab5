"""The tools around us on our files, and we on theirs: a section for each, by the rules of its documentation.

The readers here are written from what each tool documents of its formats; no code of theirs runs. One batch
is read by all: a slide, one whose scanned area begins at bounds, one with a tile that cannot be decoded, and
one without tissue.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pytest
import shapely
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from shapely.geometry import shape

from client.outputs.layout import Layout
from client.slides.geojson import Frame
from client.viewer.contents import describe
from client.viewer.library import Library
from gigapath_contract.schema import Contract
from tests.support.pyramid import write_pyramid
from training.data.h5_features import read_bag

Run = Callable[..., Any]
Array = NDArray[Any]
ROOT = Path(__file__).resolve().parents[3]
SLIDES = ("whole", "bounded", "damaged")
BOUNDS = np.array([300, 200, 1300, 900])
QUICKLY = ("--target", "lesion", "--max-evals", 16, "--no-checks")


def in_a_process(*arguments: object) -> None:
    """The client's command, for fixtures of the module."""
    command = [sys.executable, "-m", "client", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def batch(
    picture: Array, slides: Path, leica_slide: Path, triton_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of a batch with all further formats."""
    folder = tmp_path_factory.mktemp("peers")
    damaged = write_pyramid(folder / "damaged.tif", picture[900:1924, 700:1980])
    content = bytearray(damaged.read_bytes())
    with tifffile.TiffFile(damaged) as file:
        start, size = file.pages.first.dataoffsets[7], file.pages.first.databytecounts[7]
    content[start : start + size] = bytes(size)
    damaged.write_bytes(content)
    write_pyramid(folder / "blank.tif", np.full((512, 512, 3), 255, np.uint8))
    Image.new("L", (80, 64), 255).save(folder / "all.png")
    rows = [f"whole,{slides / 'a.tif'},", f"bounded,{leica_slide},", "damaged,damaged.tif,all.png"]
    (folder / "cohort.csv").write_text("\n".join(["slide_id,path,mask_path", *rows, "blank,blank.tif,"]))
    further = ("--layout", "clam", "--pt", "--geojson")
    in_a_process("batch", folder / "cohort.csv", "--out", folder / "out", "--url", triton_url, *further)
    return folder / "out"


@pytest.fixture(scope="module")
def layout(batch: Path, contract: Contract) -> Layout:
    return Layout(batch, contract)


@pytest.fixture(scope="module")
def bounded(leica_slide: Path) -> openslide.OpenSlide:
    return openslide.OpenSlide(leica_slide)


def arrays_of(path: Path) -> tuple[dict[str, Array], dict[str, dict[str, Any]]]:
    """Every dataset at the top of a file, and its attributes."""
    with h5py.File(path) as file:
        return {name: file[name][()] for name in file}, {name: dict(file[name].attrs) for name in file}


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestTrident:
    """A job folder: coordinates, patch features, slide features and contours, all in level-0 pixels."""

    @pytest.mark.parametrize("slide_id", SLIDES)
    def test_its_patch_stage_reads_our_coordinates(self, layout: Layout, slide_id: str) -> None:
        path = layout.out / "20x_256px_0px_overlap" / "patches" / f"{slide_id}_patches.h5"
        arrays, attributes = arrays_of(path)
        coords, about = arrays["coords"], attributes["coords"]
        assert coords.dtype == np.dtype(np.int64)
        assert coords.ndim == 2
        needed = ("patch_size", "level0_magnification", "target_magnification", "overlap", "name")
        assert not [name for name in needed if name not in about]
        # It reads tiles of the size that follows from two rounded magnifications, which we name.
        its_side = round(about["patch_size"] * about["level0_magnification"] / about["target_magnification"])
        assert its_side == about["patch_size_level0_trident"]
        size = np.array([about["level0_width"], about["level0_height"]])
        assert (coords >= 0).all()
        assert (coords + about["patch_size_level0"] <= size + its_side).all()

    @pytest.mark.parametrize("slide_id", SLIDES)
    def test_its_slide_stage_reads_our_features(self, layout: Layout, slide_id: str) -> None:
        arrays, attributes = arrays_of(layout.features(slide_id))
        features, coords = arrays["features"], arrays["coords"]
        assert features.shape == (len(coords), layout.contract.tile_encoder.embed_dim)
        assert np.isfinite(features).all()
        assert attributes["coords"]["patch_size_level0"] == 256
        patches, _ = arrays_of(layout.patches(slide_id))
        np.testing.assert_array_equal(coords, patches["coords"])

    @pytest.mark.parametrize("slide_id", SLIDES)
    def test_a_slide_embedding_is_one_vector_beside_its_coordinates(
        self, layout: Layout, slide_id: str
    ) -> None:
        arrays, _ = arrays_of(layout.slide_features(slide_id))
        assert arrays["features"].shape == (layout.contract.slide_encoder.embed_dim,)
        assert arrays["coords"].shape[1] == 2

    @pytest.mark.parametrize("slide_id", ["whole", "bounded"])
    def test_it_would_patch_where_we_did(
        self, layout: Layout, bounded: openslide.OpenSlide, slide_id: str
    ) -> None:
        """Contours are taken up as level-0 pixels: of a slide with bounds they lie within these."""
        found = json.loads((layout.out / "contours_geojson" / f"{slide_id}.geojson").read_text())
        tissue = shapely.union_all([shape(feature["geometry"]) for feature in found["features"]])
        limits = np.array(tissue.bounds)
        edges = BOUNDS if slide_id == "bounded" else np.array([0, 0, 1280, 1024])
        assert (limits[:2] >= edges[:2]).all()
        assert (limits[2:] <= edges[2:]).all()
        x, y = arrays_of(layout.patches(slide_id))[0]["coords"].T
        assert shapely.intersects(tissue, shapely.box(x, y, x + 256, y + 256)).all()
        for name, value in zip(("x", "y", "width", "height"), (300, 200, 1000, 700), strict=True):
            assert bounded.properties[f"openslide.bounds-{name}"] == str(value)

    def test_a_slide_without_tissue_is_an_empty_file(self, layout: Layout) -> None:
        arrays, _ = arrays_of(layout.features("blank"))
        assert [len(arrays[name]) for name in ("features", "coords")] == [0, 0]


class TestClam:
    """`patches/ID.h5` to read tiles by, `h5_files/ID.h5` and `pt_files/ID.pt` to train on."""

    @pytest.mark.parametrize("slide_id", SLIDES)
    def test_it_reads_the_same_tiles(
        self, layout: Layout, slides: Path, bounded: openslide.OpenSlide, slide_id: str
    ) -> None:
        """`read_region(coord, patch_level, patch_size)`: pixels of that level, from a level-0 corner."""
        arrays, attributes = arrays_of(layout.clam("patches", slide_id))
        ours, about = arrays_of(layout.features(slide_id))
        np.testing.assert_array_equal(arrays["coords"], ours["coords"])
        level, side = (attributes["coords"][name] for name in ("patch_level", "patch_size"))
        assert (level, side) == (0, about["coords"]["patch_size_level0"])
        if slide_id != "damaged":
            slide = bounded if slide_id == "bounded" else openslide.OpenSlide(slides / "a.tif")
            corner = arrays["coords"][0]
            tile = np.asarray(slide.read_region(tuple(corner.tolist()), level, (side, side)))
            assert (tile[..., 3] > 0).mean() > 0.9  # where something was scanned

    @pytest.mark.parametrize("slide_id", SLIDES)
    def test_it_trains_on_the_same_rows(self, layout: Layout, slide_id: str) -> None:
        ours, _ = arrays_of(layout.features(slide_id))
        bag = torch.load(layout.clam("pt_files", slide_id), weights_only=True)
        arrays, _ = arrays_of(layout.clam("h5_files", slide_id))
        assert bag.dtype == torch.float32
        np.testing.assert_array_equal(bag.numpy(), ours["features"])
        np.testing.assert_array_equal(arrays["features"], ours["features"])
        np.testing.assert_array_equal(arrays["coords"], ours["coords"])

    def test_it_meets_no_slide_without_tiles(self, layout: Layout) -> None:
        assert not list(layout.out.glob("clam/**/blank*"))


class TestProvGigaPath:
    """`finetune/`: every key of ID.h5 is read as an array, `features` and `coords` become the bag."""

    @pytest.mark.parametrize("slide_id", SLIDES)
    def test_its_data_set_reads_a_folder_of_features(self, layout: Layout, slide_id: str) -> None:
        root = layout.features("any").parent
        with h5py.File(root / (f"{slide_id}.svs".replace(".svs", "") + ".h5")) as file:
            assets = {key: file[key][:] for key in file}  # a group or a scalar would fail
        images, coords = torch.from_numpy(assets["features"]), torch.from_numpy(assets["coords"])
        assert (images.ndim, len(images)) == (2, len(coords))
        assert images.isfinite().all()  # else its loss would be NaN
        cells = torch.floor(coords / 256).long()
        positions = cells[:, 0] * 1000 + cells[:, 1] + 1
        assert ((cells >= 0) & (cells < 1000)).all()
        assert len(set(positions.tolist())) == len(positions)

    @pytest.mark.parametrize("slide_id", SLIDES)
    def test_and_a_folder_of_tensors(self, layout: Layout, slide_id: str) -> None:
        bag = torch.load(layout.clam("pt_files", slide_id), weights_only=True)
        assert bag.shape == arrays_of(layout.features(slide_id))[0]["features"].shape

    def test_an_undecodable_tile_is_no_row_of_anything(self, layout: Layout) -> None:
        arrays, _ = arrays_of(layout.features("damaged"))
        assert arrays["invalid_coords"].shape == (1, 2)
        assert arrays["invalid_coords"][0].tolist() not in arrays["coords"].tolist()


class TestQuPath:
    """GeoJSON of objects, in pixels of the image as QuPath shows it: from the bounds on, y downwards."""

    @pytest.mark.parametrize("slide_id", ["whole", "bounded"])
    @pytest.mark.parametrize("kind", ["tissue_geojson", "tiles_geojson"])
    def test_it_imports_our_objects(self, layout: Layout, kind: str, slide_id: str) -> None:
        found = json.loads((layout.out / kind / f"{slide_id}.geojson").read_text())
        assert found["type"] == "FeatureCollection"
        assert found["features"]
        width, height = BOUNDS[2:] - BOUNDS[:2] if slide_id == "bounded" else (1280, 1024)
        for feature in found["features"]:
            about = feature["properties"]
            uuid.UUID(feature["id"])
            assert about["objectType"] == ("tile" if kind.startswith("tiles") else "annotation")
            assert isinstance(about["classification"]["name"], str)
            assert all(0 <= part <= 255 for part in about["classification"]["color"])
            assert all(isinstance(value, float | int) for value in about.get("measurements", {}).values())
            geometry = shape(feature["geometry"])
            assert geometry.is_valid
            for ring in feature["geometry"]["coordinates"]:
                assert ring[0] == ring[-1]
            if kind.startswith("tissue"):
                x0, y0, x1, y1 = geometry.bounds
                assert 0 <= x0 < x1 <= width
                assert 0 <= y0 < y1 <= height

    def test_tiles_lie_where_they_were_read(self, layout: Layout) -> None:
        found = json.loads(layout.tiles_geojson("bounded").read_text())["features"]
        corners = np.array([shape(feature["geometry"]).bounds[:2] for feature in found]) + BOUNDS[:2]
        np.testing.assert_array_equal(corners, arrays_of(layout.features("bounded"))[0]["coords"])

    def test_we_take_its_annotations(
        self, layout: Layout, leica_slide: Path, triton_url: str, run_client: Run, tmp_path: Path
    ) -> None:
        """An export as its menu writes it, with and without a class, drawn on the slide with bounds."""

        def drawn(x: int, y: int, side: int, **properties: object) -> dict[str, object]:
            ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
            return {
                "type": "Feature",
                "id": str(uuid.uuid4()),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "annotation", **properties},
            }

        lesion = {"name": "lesion", "color": [200, 0, 0]}
        areas = [drawn(0, 0, 256, classification=lesion), drawn(256, 0, 256, name="a note")]
        point = {"type": "Feature", "geometry": None, "properties": {"objectType": "annotation"}}
        path = tmp_path / "q.geojson"
        path.write_text(json.dumps({"type": "FeatureCollection", "features": [*areas, point]}))
        about = ("--slide-id", "bounded", "--slide", leica_slide, "--out", tmp_path, "--url", triton_url)
        assert run_client("counterfactual", layout.out, path, *about, "--area", "lesion").code == 0
        rows = table_of(tmp_path / "bounded-counterfactual-remove.csv")
        assert {(row["area"], row["tiles"]) for row in rows} == {("lesion", "1")}
        assert run_client("counterfactual", layout.out, path, *about).code == 0
        rows = table_of(tmp_path / "bounded-counterfactual-remove.csv")
        assert {(row["area"], row["tiles"]) for row in rows} == {("all areas", "2")}

    def test_areas_in_its_frame_and_in_level_0_mean_the_same_tiles(
        self, layout: Layout, leica_slide: Path, triton_url: str, run_client: Run, tmp_path: Path
    ) -> None:
        """Our file knows where the slide's bounds begin; TRIDENT's contours count from level 0."""

        def changed(areas: Path, *more: object) -> dict[str, str]:
            about = ("--slide-id", "bounded", "--out", tmp_path, "--url", triton_url)
            done = run_client("counterfactual", layout.out, areas, *about, *more)
            assert done.code == 0, done.err
            return table_of(tmp_path / "bounded-counterfactual-remove.csv")[0]

        contours, slide = layout.contours("bounded"), ("--slide", leica_slide)
        level0 = ("--mask-frame", "level0")
        right = changed(layout.tissue_geojson("bounded"))
        assert right == changed(layout.tissue_geojson("bounded"), *slide)
        assert right == changed(contours, *level0) == changed(contours, *level0, *slide)
        wrong = changed(contours, *slide)
        assert int(wrong["tiles"]) < int(right["tiles"])
        assert "give --mask-frame level0" in wrong["embeddings_doubt"]

    def test_the_viewer_places_both(self, layout: Layout, leica_slide: Path) -> None:
        frames: dict[str, Frame] = {"tissue_geojson": "qupath", "contours_geojson": "level0"}
        for folder, frame in frames.items():
            library = Library((layout.out,), annotations=layout.out / folder, frame=frame)
            [entry] = [one for one in library.entries().values() if one.slide_id == "bounded"]
            own, *near = describe(library, entry)["annotations"]
            corners = np.array(shape(own["features"][0]["geometry"]).bounds[:2]) + own["origin"]
            tissue = next(one for one in near if one["features"][0]["id"] == own["features"][0]["id"])
            placed = np.array(shape(tissue["features"][0]["geometry"]).bounds[:2]) + tissue["origin"]
            np.testing.assert_array_equal(corners, placed)

    def test_maps_lie_where_the_slide_was_read(
        self, layout: Layout, leica_slide: Path, triton_url: str, run_client: Run, tmp_path: Path
    ) -> None:
        """With the slide's file and without it; of another tool's file alone that is assumed, and said."""
        ours, theirs = layout.features("bounded"), tmp_path / "bounded.h5"
        arrays, _ = arrays_of(ours)
        with h5py.File(theirs, "w") as file:
            trident(file, arrays["features"], arrays["coords"])
            file["coords"].attrs.update({"name": "bounded", "level0_width": 2000, "level0_height": 1500})
        slide = ("--slide", leica_slide)
        for source, more, start in ((ours, (), BOUNDS[:2]), (theirs, slide, BOUNDS[:2]), (theirs, (), 0)):
            out = tmp_path / "out"
            done = run_client("attribute", source, *more, *QUICKLY, "--out", out, "--url", triton_url)
            assert done.code == 0, done.err
            said = "QuPath's (0, 0) is taken for level 0's" in " ".join(done.out.split())
            assert said == (source == theirs and not more)
            found = json.loads((out / "bounded-partition_shap-lesion.geojson").read_text())["features"]
            corners = np.array([shape(feature["geometry"]).bounds[:2] for feature in found])
            np.testing.assert_array_equal(corners + start, arrays["coords"])


class TestSlide2vec:
    """Tensors [N, D] without coordinates, and a table with the columns of its documentation."""

    @pytest.mark.parametrize("slide_id", SLIDES)
    def test_it_loads_our_tensors(self, layout: Layout, slide_id: str) -> None:
        tiles = torch.load(layout.features(slide_id, ".pt"), map_location="cpu", weights_only=True)
        assert tiles.shape[1] == layout.contract.tile_encoder.embed_dim

    def test_its_table_is_a_manifest(self, slides: Path, run_client: Run, tmp_path: Path) -> None:
        Image.new("L", (80, 64), 255).save(tmp_path / "mask.png")
        table = tmp_path / "slides.csv"
        table.write_text(
            "sample_id,image_path,mask_path,spacing_at_level_0\n"
            f"s,{slides / 'a.tif'},{tmp_path / 'mask.png'},0.5\nt,{slides / 'b.tif'},,\n"
        )
        assert run_client("tissue", table, "--out", tmp_path / "out").code == 0
        rows = {row["slide_id"]: row for row in table_of(tmp_path / "out" / "tissue.csv")}
        assert rows["s"]["tissue"] == "1.0000"
        assert float(rows["t"]["tissue"]) < 1

    @pytest.mark.parametrize("suffix", ["npz", "pt"])
    def test_its_embeddings_without_coordinates_are_refused(
        self, layout: Layout, triton_url: str, run_client: Run, tmp_path: Path, suffix: str
    ) -> None:
        features = arrays_of(layout.features("whole"))[0]["features"]
        path = tmp_path / "tile_embeddings" / f"whole.{suffix}"
        path.parent.mkdir()
        if suffix == "npz":
            np.savez_compressed(path, features=features, tile_index=np.arange(len(features)))
        else:
            torch.save(torch.from_numpy(features), path)
        for command in (("attribute", path), ("counterfactual", path, layout.tissue_geojson("whole"))):
            done = run_client(*command, "--out", tmp_path / "out", "--url", triton_url)
            why = "embeddings without coordinates: give an H5 file that holds both"
            assert (done.code, done.err) == (1, f"error: {path}: {why}\n")
        assert not (tmp_path / "out" / "whole.h5").exists()


class TestStamp:
    """`feats` and coordinates in µm; there is no layout of ours for it, which is said."""

    def test_there_is_no_layout(self, slides: Path, triton_url: str, run_client: Run, tmp_path: Path) -> None:
        done = run_client(
            "batch", slides, "--layout", "stamp", "--out", tmp_path / "out", "--url", triton_url
        )
        assert (done.code, done.err) == (1, "error: --layout stamp is not known: trident or clam\n")

    def test_a_given_mpp_that_contradicts_the_slide_is_said(
        self, layout: Layout, slides: Path, triton_url: str, run_client: Run, tmp_path: Path
    ) -> None:
        arrays, _ = arrays_of(layout.features("whole"))
        with h5py.File(tmp_path / "s.h5", "w") as file:
            stamp(file, arrays["features"], arrays["coords"])
        about = ("--slide", slides / "a.tif", "--mpp", 0.45, "--out", tmp_path / "out", "--url", triton_url)
        done = run_client("attribute", tmp_path / "s.h5", *about, *QUICKLY)
        assert done.code == 0, done.err
        said = "0.45 mpp is used, the file says 0.5"
        assert said in " ".join(done.out.split())
        _, attributes = arrays_of(tmp_path / "out" / "attribution" / "s.h5")
        assert said in attributes["coords"]["assumed"]

    def test_the_viewer_takes_the_mpp_from_the_slide(
        self, layout: Layout, slides: Path, tmp_path: Path
    ) -> None:
        arrays, _ = arrays_of(layout.features("whole"))
        with h5py.File(tmp_path / "a.h5", "w") as file:
            stamp(file, arrays["features"], arrays["coords"])
        for slide, tiles, said in (
            (slides / "a.tif", len(arrays["coords"]), "in µm were converted to level-0 pixels of 0.5 µm"),
            (None, None, "need the slide's mpp: give the slide (--slide or --wsi-dir)"),
        ):
            library = Library((tmp_path,), slide=slide)
            [entry] = library.entries().values()
            shown = describe(library, entry)
            assert (shown["tiles"] and shown["tiles"]["valid"]["shape"][0]) == tiles
            assert said in " ".join(shown["problems"])

    def test_its_table_of_slides_is_a_manifest(self, slides: Path, run_client: Run, tmp_path: Path) -> None:
        table = tmp_path / "slide_table.csv"
        table.write_text("PATIENT,FILENAME\np,a.h5\np,c.h5\n")
        assert run_client("tissue", table, "--wsi-dir", slides, "--out", tmp_path / "out").code == 0
        assert [row["slide_id"] for row in table_of(tmp_path / "out" / "tissue.csv")] == ["a", "c"]


# Files as others write them, from the features and level-0 coordinates of one of our slides at 0.5 mpp.


def trident(file: h5py.File, features: Array, coords: Array) -> None:
    file["features"], file["coords"] = features, coords
    file["coords"].attrs.update(
        {
            "patch_size": 256,
            "patch_size_level0": 256,
            "level0_magnification": 20,
            "target_magnification": 20,
            "overlap": 0,
            "name": "theirs",
            "savetodir": "job",
            "level0_width": 1280,
            "level0_height": 1024,
        }
    )
    file["features"].attrs.update({"name": "theirs", "savetodir": "job", "encoder": "gigapath"})


def batched(file: h5py.File, features: Array, coords: Array) -> None:
    """With an axis of one, as a few scripts leave it."""
    trident(file, features[None], coords[None])


def clam(file: h5py.File, features: Array, coords: Array) -> None:
    file["features"], file["coords"] = features, coords


def stamp(file: h5py.File, features: Array, coords: Array) -> None:
    file["feats"], file["coords"] = features, coords.astype(np.float32) * 0.5
    file.attrs.update({"tile_size_um": 128.0, "tile_size_px": 256, "extractor": "gigapath", "unit": "um"})


def stamp_without_unit(file: h5py.File, features: Array, coords: Array) -> None:
    stamp(file, features, coords)
    del file.attrs["unit"]


Write = Callable[[h5py.File, Array, Array], None]
THEIRS: dict[str, tuple[Write, tuple[object, ...], str]] = {
    "TRIDENT": (trident, (), ""),
    "an axis of one": (batched, (), ""),
    "CLAM": (clam, ("--tile-size", 256), "read as level-0 pixels of tiles of 256 px"),
    "STAMP": (stamp, ("--mpp", 0.5), "in µm were converted to level-0 pixels of 0.5 µm"),
    "STAMP, without unit": (stamp_without_unit, ("--mpp", 0.5), "in µm were converted"),
}


def attribution_of(path: Path) -> Array:
    with h5py.File(path) as file:
        return np.asarray(file["attribution_partition_shap"][()])


@pytest.fixture(scope="module")
def explained(layout: Layout, triton_url: str) -> Array:
    """The attributions of our own file of the slide."""
    in_a_process("attribute", layout.out, "--slide-id", "whole", *QUICKLY, "--url", triton_url)
    return attribution_of(layout.slide_features("whole"))


@pytest.fixture(scope="module")
def theirs(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files `theirs.h5` by the tool that wrote them."""
    arrays, _ = arrays_of(layout.features("whole"))
    written = {}
    for tool, (write, _, _) in THEIRS.items():
        written[tool] = tmp_path_factory.mktemp("theirs") / "theirs.h5"
        with h5py.File(written[tool], "w") as file:
            write(file, arrays["features"], arrays["coords"])
    return {**written, "our CLAM export": layout.clam("h5_files", "whole")}


@pytest.mark.parametrize("tool", [*THEIRS, "our CLAM export"])
def test_their_features_on_our_commands(
    theirs: dict[str, Path],
    explained: Array,
    layout: Layout,
    triton_url: str,
    run_client: Run,
    tmp_path: Path,
    tool: str,
) -> None:
    """`attribute`, `counterfactual`, `view` and `finetune` give what our own file of the slide gives."""
    path, (_, options, assumed) = theirs[tool], THEIRS.get(tool, (None, (), ""))
    before, out, server = path.read_bytes(), tmp_path / "out", ("--url", triton_url)
    done = run_client("attribute", path, *options, "--out", out, *QUICKLY, *server)
    assert done.code == 0, done.err
    assert assumed in " ".join(done.out.split())
    assert f"client view {out}" in done.out
    [copy] = out.glob("attribution/*.h5")
    np.testing.assert_array_equal(attribution_of(copy), explained)
    arrays, attributes = arrays_of(copy)
    np.testing.assert_array_equal(arrays["coords"], arrays_of(layout.features("whole"))[0]["coords"])
    assert assumed in attributes["coords"].get("assumed", "")

    area = {"type": "Polygon", "coordinates": [[[0, 0], [640, 0], [640, 1024], [0, 1024], [0, 0]]]}
    (tmp_path / "half.geojson").write_text(json.dumps({"type": "Feature", "geometry": area}))
    for source, more, folder in ((path, options, out), (layout.features("whole"), (), tmp_path / "ours")):
        command = ("counterfactual", source, tmp_path / "half.geojson", *more, "--out", folder, *server)
        done = run_client(*command)
        assert done.code == 0, done.err
    found, ours = (
        [
            [row[name] for name in ("tiles", "class", "log_odds")]
            for row in table_of(next(folder.glob("*-counterfactual-remove.csv")))
        ]
        for folder in (out, tmp_path / "ours")
    )
    assert found == ours

    library = Library((out,))
    [entry] = library.entries().values()
    shown = describe(library, entry)
    assert shown["tiles"]["valid"]["shape"] == (len(arrays["coords"]),)
    assert "partition_shap" in [one["name"] for one in shown["maps"]]
    assert assumed in " ".join(shown["problems"])

    if not tool.startswith("STAMP"):  # whose µm training refuses, in a line
        for bag, own in zip(read_bag(path), read_bag(layout.features("whole")), strict=True):
            np.testing.assert_array_equal(bag, own)
    assert path.read_bytes() == before


def test_their_slide_embedding_stands_for_the_tiles_beside_it(
    layout: Layout, triton_url: str, run_client: Run, tmp_path: Path
) -> None:
    """TRIDENT's job folder: slide_features_gigapath/ID.h5 and features_gigapath_.../ID.h5 side by side."""
    arrays, _ = arrays_of(layout.features("whole"))
    job = tmp_path / "job" / "20x_256px_0px_overlap"
    for name, features in (
        ("features_gigapath", arrays["features"]),
        ("slide_features_gigapath", np.ones(64)),
    ):
        (job / name).mkdir(parents=True)
        with h5py.File(job / name / "theirs.h5", "w") as file:
            trident(file, features, arrays["coords"])
    slide_level = job / "slide_features_gigapath" / "theirs.h5"
    command = ("attribute", slide_level, *QUICKLY, "--out", tmp_path / "out", "--url", triton_url)
    done = run_client(*command)
    assert done.code == 0, done.err
    assert arrays_of(tmp_path / "out" / "attribution" / "theirs.h5")[0]["features"].shape[1] == 96
    assert f"client view {tmp_path / 'out'}" in done.out
    finer = job.with_name("40x_256px_0px_overlap") / "features_gigapath"  # of the same slide, beside it
    finer.mkdir(parents=True)
    (finer / "theirs.h5").write_bytes((job / "features_gigapath" / "theirs.h5").read_bytes())
    assert run_client(*command).code == 0
    (finer / "theirs.h5").unlink()
    (job / "features_gigapath" / "theirs.h5").unlink()
    refused = run_client(*command)
    assert (refused.code, refused.err.count("\n")) == (1, 1), refused.err
    assert "holds no features of slide theirs" in refused.err
