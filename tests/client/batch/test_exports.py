"""Several exports and several options into one folder: nothing is lost, stale or computed twice."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from client.commands.view import counted
from client.outputs.layout import Layout, features_files, stored_layouts
from client.scoring.result_key import SlideContent, find_keys
from client.scoring.score import DEFAULT_TILING, SlideSource, TilingOptions
from client.viewer.contents import describe
from client.viewer.library import Library
from gigapath_contract.schema import Contract
from server.local import RunningServer
from tests.support.pyramid import write_pyramid
from tests.support.served import suspended

Run = Callable[..., Any]
MORE = ("--layout", "clam", "--pt", "--geojson")
QUICKLY = ("--max-evals", 16, "--no-checks", "--target", "lesion")


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def tiles_in(path: Path) -> int:
    with h5py.File(path) as file:
        return len(file["coords"])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_what_is_made_from_features_is_never_older_than_they_are(
    slides: Path, triton_url: str, contract: Contract, run_client: Run, tmp_path: Path
) -> None:
    layout, server = Layout(tmp_path, contract), ("--url", triton_url)
    batch = ("batch", slides / "a.tif", "--out", tmp_path, *server)
    assert run_client(*batch, *MORE).code == 0
    assert run_client("attribute", tmp_path, *server, *QUICKLY).code == 0
    derived = [
        layout.features("a", ".pt"),
        *(layout.clam(kind, "a") for kind in ("patches", "h5_files", "pt_files")),
        layout.tiles_geojson("a"),
        layout.attribution / "a-partition_shap-lesion.png",
    ]
    assert all(path.exists() for path in derived)
    many = tiles_in(layout.features("a"))
    assert run_client(*batch, "--min-tissue", 0.9).code == 0
    few = tiles_in(layout.features("a"))
    assert 0 < few < many
    assert not any(path.exists() for path in derived)
    with h5py.File(layout.slide_features("a")) as file:
        assert not any(name.startswith("attribution") for name in file)
    assert run_client(*batch, "--min-tissue", 0.9, *MORE).code == 0
    assert len(torch.load(layout.features("a", ".pt"), weights_only=True)) == few
    assert tiles_in(layout.clam("h5_files", "a")) == tiles_in(layout.clam("patches", "a")) == few
    # Renewed with the exports asked for, they are made anew at once.
    assert run_client(*batch, *MORE).code == 0
    assert len(torch.load(layout.clam("pt_files", "a"), weights_only=True)) == many


def test_another_export_takes_the_tile_embeddings_and_leaves_the_results(
    slides: Path,
    triton_url: str,
    other_server: RunningServer,
    contract: Contract,
    run_client: Run,
    tmp_path: Path,
) -> None:
    first, other_export = Layout(tmp_path, contract), other_server.url
    assert run_client("batch", slides, "--out", tmp_path, "--url", triton_url).code == 0
    assert run_client("attribute", tmp_path, "--slide-id", "a", "--url", triton_url, *QUICKLY).code == 0
    kept = contents(tmp_path)
    refused = run_client("attribute", tmp_path, "--slide-id", "a", "--url", other_export, *QUICKLY)
    assert (refused.code, refused.err.count("\n")) == (1, 1), refused.err
    assert "has not scored a" in refused.err
    with suspended(other_server.pid, "tile_encoder"):
        done = run_client("batch", slides, "--out", tmp_path, "--url", other_export)
    assert done.code == 0, done.err
    refused = run_client("attribute", first.slide_features("a"), "--url", other_export, *QUICKLY)
    assert (refused.code, refused.err.count("\n")) == (1, 1), refused.err
    assert "is of another export than the served 0123456789abcdef" in refused.err
    assert f"holds results of {first.export.name} too" in " ".join(done.err.split())
    assert done.out.startswith("served: export demo-01234567, classes benign, lesion\n")
    second = next(layout for layout in stored_layouts(tmp_path) if layout.export != first.export)
    assert second.export.name == "demo-01234567"
    assert run_client("attribute", tmp_path, "--slide-id", "a", "--url", other_export, *QUICKLY).code == 0
    now = contents(tmp_path)
    assert {name: now[name] for name in kept if not name.startswith(".keys/")} == {
        name: content for name, content in kept.items() if not name.startswith(".keys/")
    }
    assert {row["reused"] for row in rows_of(second.status)} == {"False"}
    for name in "abc":
        with h5py.File(first.slide_features(name)) as one, h5py.File(second.slide_features(name)) as two:
            np.testing.assert_array_equal(one["features"][:], two["features"][:])
            assert two["features"].attrs["export_id"] == "0123456789abcdef"
    with h5py.File(second.slide_features("a")) as file:
        about = file["attribution_partition_shap"].attrs
        assert about["export_id"] == "0123456789abcdef"
        assert "embeddings_doubt" not in about  # they are this export's own
    entries = Library((tmp_path,)).entries()
    assert sorted(entries) == ["a", "a@2", "b", "b@2", "c", "c@2"]
    assert counted(entries) == "3 slides, 6 results"
    for layout in (first, second):
        [entry] = [one for one in entries.values() if (one.slide_id, one.folder) == ("a", layout.export)]
        shown = describe(Library((tmp_path,)), entry)
        assert (shown["problems"], shown["contract"]["export_id"]) == ([], layout.contract.export_id)
        assert [one["name"] for one in shown["maps"]] == ["partition_shap", "keep_one"]
        assert sum(entry.scores.values()) == pytest.approx(1)
    # The first export's run finds all done; timings want to know whose.
    assert run_client("batch", slides, "--out", tmp_path, "--url", triton_url).code == 0
    assert {row["reused"] for row in rows_of(first.status)} == {"True"}
    assert "give one of" in run_client("timings", tmp_path).err
    assert run_client("timings", second.export).code == 0
    # Other tiles under the second: the first's scores are not explained from them.
    more = ("--min-tissue", 0.9)
    assert run_client("batch", slides, "--out", tmp_path, "--url", other_export, *more).code == 0
    refused = run_client("attribute", tmp_path, "--slide-id", "a", "--url", triton_url, *QUICKLY)
    assert "a was embedded again after export" in refused.err


def test_score_replaces_another_exports_file_only_where_it_is_asked_to(
    slides: Path, triton_url: str, other_export: str, run_client: Run, tmp_path: Path
) -> None:
    score = ("score", slides / "a.tif", "--out", tmp_path)
    assert run_client(*score, "--url", triton_url).code == 0
    assert run_client("attribute", tmp_path / "a.h5", "--url", triton_url, *QUICKLY).code == 0
    kept = contents(tmp_path)
    again = run_client(*score, "--url", triton_url)
    assert (again.code, "was done" in again.out, "lesion" in again.out) == (0, True, True)
    assert contents(tmp_path) == kept
    attribute = ("attribute", tmp_path / "a.h5", *QUICKLY)
    for command in (score, ("attribute", *score[1:]), attribute):
        refused = run_client(*command, "--url", other_export)
        assert (refused.code, refused.err.count("\n")) == (1, 1), refused.err
        assert "the server serves 0123456789abcdef" in refused.err
    assert {name: content for name, content in contents(tmp_path).items() if "sqlite" not in name} == {
        name: content for name, content in kept.items() if "sqlite" not in name
    }
    assert run_client(*attribute, "--url", other_export, "--overwrite").code == 0
    assert run_client(*score, "--url", other_export, "--overwrite").code == 0
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["slide_features"].attrs["export_id"] == "0123456789abcdef"
    assert not (tmp_path / "a-partition_shap-lesion.png").exists()


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        ({}, ""),
        ({"export_id": "other"}, "result"),
        ({"precision": "fp16"}, "tiles result"),
        ({"tile_encoder": {"weights_sha256": "0"}}, "tiles result"),
        ({"slide_encoder": {"weights_sha256": "0"}, "export_id": "other"}, "result"),
        ({"tile": {"max_batch": 8}}, ""),
        ({"tile": {"crop_px": 256}}, "plan tiles result"),
    ],
)
def test_what_each_key_depends_on(
    slides: Path, contract: Contract, change: dict[str, Any], differ: str
) -> None:
    parts = {
        name: dataclasses.replace(getattr(contract, name), **value) if isinstance(value, dict) else value
        for name, value in change.items()
    }
    source = SlideSource(slides / "a.tif")

    def keys(other: Contract, tiling: TilingOptions = DEFAULT_TILING) -> dict[str, str]:
        found = find_keys(source, other, tiling, SlideContent())
        return {"plan": found.plan, "tiles": found.tiles, "result": found.result}

    now, then = keys(contract), keys(dataclasses.replace(contract, **parts))
    assert [name for name in now if now[name] != then[name]] == differ.split()
    if not differ:
        sparse = keys(contract, TilingOptions(min_tissue=0.5))
        assert all(now[name] != sparse[name] for name in now)


def test_the_scores_have_every_slide_with_its_status_and_every_patient(
    slides: Path, triton_url: str, contract: Contract, run_client: Run, tmp_path: Path
) -> None:
    write_pyramid(tmp_path / "blank.tif", np.full((1024, 1024, 3), 240, np.uint8), levels=(1, 4))
    rows = [f"p1,{name},{slides / name}.tif,mine" for name in "ab"]
    rows += [
        f"p2,c,{slides / 'c'}.tif,mine",
        f"p2,blank,{tmp_path / 'blank.tif'},mine",
        "p3,gone,gone.tif,mine",
        f"nan,unknown,{tmp_path / 'blank.tif'},mine",  # pandas' way to say that the patient is not known
    ]
    (tmp_path / "cohort.csv").write_text("\n".join(["Case_ID,slide_id,path,status", *rows]))
    out = tmp_path / "out"
    assert run_client("batch", tmp_path / "cohort.csv", "--out", out, "--url", triton_url).code == 1
    layout = Layout(out, contract)
    scores = {row["slide_id"]: row for row in rows_of(layout.scores)}
    assert {name: row["status"] for name, row in scores.items()} == {
        **dict.fromkeys("abc", "ok"),
        **dict.fromkeys(("blank", "unknown"), "degraded"),
        "gone": "failed",
    }
    assert {row["manifest_status"] for row in scores.values()} == {"mine"}  # its own column is kept
    assert scores["gone"]["score_lesion"] == scores["blank"]["score_lesion"] == ""
    patients = {row["patient"]: row for row in rows_of(layout.export / "patients.csv")}
    lesion = {name: float(scores[name]["score_lesion"]) for name in "abc"}
    assert float(patients["p1"]["score_lesion"]) == pytest.approx((lesion["a"] + lesion["b"]) / 2)
    assert float(patients["p2"]["score_lesion"]) == lesion["c"]
    assert patients["p3"]["score_lesion"] == ""
    assert [(row["slides"], row["scored_slides"], row["status"]) for row in patients.values()] == [
        ("2", "2", "ok"),
        ("2", "1", "degraded"),
        ("1", "0", "failed"),
    ]
    assert {row["pooling"] for row in patients.values()} == {"mean of the slides' probabilities"}


def test_a_tile_that_was_not_decoded_is_a_row_for_nobody(
    slides: Path,
    triton_url: str,
    other_server: RunningServer,
    contract: Contract,
    run_client: Run,
    tmp_path: Path,
) -> None:
    damaged, out = tmp_path / "d.tif", tmp_path / "out"
    pixels = np.random.default_rng(0).integers(60, 200, (768, 1024, 3), dtype=np.uint8)
    write_pyramid(damaged, pixels, size=(1024, 768))
    with tifffile.TiffFile(damaged) as file:
        start, size = file.pages.first.dataoffsets[1], file.pages.first.databytecounts[1]
    content = bytearray(damaged.read_bytes())
    content[start : start + size] = bytes(size)
    damaged.write_bytes(content)
    Image.new("L", (64, 48), 255).save(tmp_path / "all.png")
    (tmp_path / "m.csv").write_text("path,mask_path\nd.tif,all.png\n")
    batch = ("batch", tmp_path / "m.csv", "--out", out)
    done = run_client(*batch, "--url", triton_url, *MORE)
    assert done.code == 0, done.err
    layout = Layout(out, contract)
    files = [layout.features("d"), layout.patches("d"), layout.slide_features("d")]
    files += [layout.clam(kind, "d") for kind in ("patches", "h5_files")]
    assert [tiles_in(path) for path in files] == [11] * 5
    assert len(torch.load(layout.features("d", ".pt"), weights_only=True)) == 11
    with h5py.File(layout.features("d")) as file:
        assert np.isfinite(file["features"][:]).all()
        assert file["invalid_coords"][:].tolist() == [[256, 0]]
        assert [256, 0] not in file["coords"][:].tolist()
    # Another export takes up the embeddings of the tiles that were decoded, and says the same of the other.
    with suspended(other_server.pid, "tile_encoder"):
        assert run_client(*batch, "--url", other_server.url).code == 0
    second = next(one for one in stored_layouts(out) if one.export != layout.export)
    assert rows_of(second.status)[0]["reason"] == "1 of 12 tiles could not be decoded"
    assert run_client("attribute", out, "--url", triton_url, *QUICKLY).code == 0
    library = Library((out,))
    entries = library.entries().values()
    shown = describe(library, next(e for e in entries if e.stored and e.stored.export == layout.export))
    assert shown["tiles"]["valid"]["shape"] == (12,)
    assert {one["values"]["shape"][0] for one in shown["maps"]} == {12}


def test_a_slide_without_tiles_gives_clam_nothing(
    triton_url: str, contract: Contract, run_client: Run, tmp_path: Path
) -> None:
    write_pyramid(tmp_path / "blank.tif", np.full((512, 512, 3), 255, np.uint8), size=(512, 512))
    run_client("batch", tmp_path / "blank.tif", "--out", tmp_path / "out", "--url", triton_url, *MORE)
    layout = Layout(tmp_path / "out", contract)
    assert tiles_in(layout.features("blank")) == 0
    assert not list(tmp_path.rglob("clam/**/blank.*"))


def test_embeddings_of_a_published_encoder_have_tridents_name_too(contract: Contract, tmp_path: Path) -> None:
    published = dataclasses.replace(contract.tile_encoder, name="gigapath_tile_enc_vitg")
    for digest in ("1" * 64, "2" * 64):  # the name is the last run's
        encoder = dataclasses.replace(published, weights_sha256=digest)
        layout = Layout(tmp_path, dataclasses.replace(contract, tile_encoder=encoder))
        layout.write_contract()
        layout.features("a").parent.mkdir()
        layout.features("a").touch()
        assert (layout.job / "features_gigapath" / "a.h5").samefile(layout.features("a"))
    assert len(features_files(tmp_path)) == 2
    Layout(tmp_path / "demo", contract).write_contract()
    assert not list(tmp_path.glob("demo/*/features_*"))
