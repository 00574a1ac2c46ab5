"""A slide's features, found by its name in what `score` and `batch` leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from client.errors import ClientError
from client.outputs.hdf5 import read_features
from client.outputs.layout import file_stem, find_features, stored_slides

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Feature files of two slides, one of which two encoders have embedded."""
    for path in ("20x/features_x/a.h5", "20x/features_x/b[1].h5", "20x/features_y/a.h5"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "20x" / "slide_features_x").mkdir()
    for name in ("a", "b[1]", "c"):
        (tmp_path / "20x" / "slide_features_x" / f"{name}.h5").touch()
    return tmp_path


def test_a_file_is_itself_and_a_slide_is_found_below_a_folder(folder: Path) -> None:
    path = folder / "20x" / "features_x" / "b[1].h5"
    assert find_features(path) == path
    assert find_features(folder, "b[1]") == path
    assert find_features(folder / "20x", "b[1]") == path
    assert find_features(folder / "20x" / "slide_features_x" / "b[1].h5") == path
    (folder / "s").mkdir()
    (folder / "s" / "single.h5").touch()
    assert find_features(folder / "s") == find_features(folder / "s", "single") == folder / "s" / "single.h5"


def test_a_file_of_another_kind_is_no_slide(folder: Path) -> None:
    (folder / "s").mkdir()
    for name, dataset in (("a", "features"), ("b", "feats"), ("statistics", "mean")):
        with h5py.File(folder / "s" / f"{name}.h5", "w") as file:
            file[dataset] = np.zeros((1, 3))
    assert [stored.features.stem for stored in stored_slides(folder / "s")] == ["a", "b"]
    with pytest.raises(ClientError, match="no features of slide statistics"):
        find_features(folder / "s", "statistics")


@pytest.mark.parametrize(
    ("target", "slide_id", "message"),
    [
        ("gone.h5", None, "no such file or folder"),
        ("", None, "features of 2 slides (a, b[1]): choose one with --slide-id"),
        ("", "a", "several files with features of a: give one of "),
        ("", "c", "no features of slide c"),
        ("20x/slide_features_x/a.h5", None, "several files with features of a: give one of "),
        ("20x/slide_features_x/c.h5", None, "no features of slide c"),
        ("20x/features_x/a.h5", "a", "--slide-id chooses a slide of a folder"),
    ],
)
def test_what_is_not_one_slide_is_refused(
    folder: Path, target: str, slide_id: str | None, message: str
) -> None:
    with pytest.raises(ClientError) as error:
        find_features(folder / target, slide_id)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_chain_of_the_readme_from_batch_to_attribute_and_counterfactual(
    slides: Path, real_slide: Path, triton_url: str, run_client: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    server = ("--url", triton_url)
    assert run_client("batch", slides, "--out", out, *server).code == 0
    explain = ("--max-evals", 16, "--no-checks")
    done = run_client("attribute", out, "--slide-id", "b", "--slide", slides / "b.tif", *explain, *server)
    assert done.code == 0, done.err
    # A map is drawn on no other slide, be it of the same size or not.
    for other, message in ((slides / "a.tif", "SHA-256 differs"), (real_slide, "has 2220x2967 px, but")):
        for command in (("attribute", out), ("counterfactual", out, out / "contours_geojson" / "b.geojson")):
            done = run_client(*command, "--slide-id", "b", "--slide", other, *server)
            assert (done.code, done.err.count("\n")) == (1, 1), done.err
            assert message in done.err
    names = {path.name for path in out.glob("*/attribution/b-*")}
    assert {path.rsplit(".")[-1] for path in names} == {"png", "geojson", "sqlite"}
    assert not list(out.glob("*/features_*/b-*"))
    # The tissue that `batch` wrote for QuPath is an area to remove.
    annotations = out / "contours_geojson" / "b.geojson"
    done = run_client("counterfactual", out, annotations, "--slide-id", "b", "--change", "keep", *server)
    assert done.code == 0, done.err
    assert len(list(out.glob("*/attribution/b-counterfactual-keep.csv"))) == 1
    # A file of slide features stands for its slide; which one of a folder has to be said.
    [stored] = out.glob("*/slide_features_*/b.h5")
    done = run_client("attribute", stored, *explain, *server)
    assert done.code == 0, done.err
    assert names == {path.name for path in out.glob("*/attribution/b-*")} - {"b-counterfactual-keep.csv"}
    done = run_client("attribute", out, *server)
    assert (done.code, done.err.count("\n")) == (1, 1), done.err
    assert "choose one with --slide-id" in done.err
    with pytest.raises(ClientError, match="tile features"):
        read_features(stored)


def test_classes_of_alike_names_have_files_of_their_own() -> None:
    names = ("<1%", ">1%", "ER+", "ER-", "G2/G3", "G2-G3", "Läsion (G2)", "Kein Tumor", "..")
    stems = [file_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    assert stems[2:4] + stems[7:8] == ["ER+", "ER-", "Kein_Tumor"]
    assert stems[6].startswith("Läsion_G2_-"), "letters of any language"
    assert not any(set(stem) & set("<>%/ ()") for stem in stems)
