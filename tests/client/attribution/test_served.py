"""Attribution through a real Triton, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from client.attribution.explain import explain
from client.attribution.model.embedded import EmbeddedSlide, read_embedded
from client.attribution.model.served import ServedForward
from client.errors import ContractMismatch
from client.triton.connection import Connection
from gigapath_contract.schema import Contract
from training.models.build import build_models

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def scored(triton_url: str, real_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real slide's H5, as `client score` writes it; read only."""
    out = tmp_path_factory.mktemp("scored")
    command = [
        sys.executable,
        "-m",
        "client",
        "score",
        str(real_slide),
        "--out",
        str(out),
        "--url",
        triton_url,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return out / f"{real_slide.stem}.h5"


@pytest.fixture
def h5(scored: Path, tmp_path: Path) -> Path:
    """A copy of it to write to."""
    copy = tmp_path / scored.name
    copy.write_bytes(scored.read_bytes())
    return copy


@pytest.fixture(scope="module")
def slide(scored: Path) -> EmbeddedSlide:
    return read_embedded(scored)


def test_served_masks_score_as_in_pytorch_in_any_batch(
    connection: Connection, contract: Contract, slide: EmbeddedSlide
) -> None:
    tiles = len(slide.coords)
    keep = np.random.default_rng(0).random((20, tiles)) < 0.7
    coords = slide.model_coords(contract)
    served = ServedForward(connection, contract)
    scores = served(slide.embeddings, coords, keep)
    assert served.requests == 1
    payload = slide.embeddings.nbytes + slide.coords.nbytes
    assert served.bytes_sent == payload + keep.nbytes

    small = replace(contract, occlusion=replace(contract.occlusion, max_mask_tokens=3 * (tiles + 1) + tiles))
    split = ServedForward(connection, small)
    again = split(slide.embeddings, coords, keep)
    assert split.requests == 7  # 3 masks per request
    assert split.bytes_sent == 7 * payload + keep.nbytes
    np.testing.assert_allclose(again.logits, scores.logits, atol=1e-5)
    np.testing.assert_allclose(again.slide, scores.slide, atol=1e-5)

    model = build_models(contract.preset).slide_model.eval()
    assert model.head is not None
    with torch.inference_mode():
        expected = model.score(
            torch.from_numpy(slide.embeddings), torch.from_numpy(slide.coords), torch.from_numpy(keep)
        )
    assert expected.logits is not None
    np.testing.assert_allclose(scores.logits, expected.logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(scores.slide, expected.slide.numpy(), atol=1e-4)


def test_nothing_kept_still_has_a_score(
    connection: Connection, contract: Contract, slide: EmbeddedSlide
) -> None:
    served = ServedForward(connection, contract)
    scores = served(
        slide.embeddings, slide.model_coords(contract), np.zeros((2, len(slide.coords)), dtype=bool)
    )
    assert np.isfinite(scores.logits).all()
    np.testing.assert_array_equal(scores.logits[0], scores.logits[1])


def test_a_slide_over_the_budget_is_refused_before_anything_is_sent(
    connection: Connection, contract: Contract, slide: EmbeddedSlide
) -> None:
    tiny = replace(contract, occlusion=replace(contract.occlusion, max_mask_tokens=len(slide.coords)))
    served = ServedForward(connection, tiny)
    with pytest.raises(ContractMismatch, match="budget"):
        explain(slide, served, tiny)
    assert served.bytes_sent == 0


def test_from_embeddings_on_disk_with_no_slide_and_again_without_a_forward(
    run_client: Run, triton_url: str, h5: Path
) -> None:
    arguments = ("-v", "attribute", h5, "--url", triton_url, "--max-evals", 64, "--target", "lesion")
    first = run_client(*arguments)
    assert first.code == 0, first.err
    assert "completeness gap" in first.out
    stem = f"{h5.stem}-partition_shap-lesion"
    for name in (f"{stem}.png", f"{stem}.geojson", f"{h5.stem}-masks.sqlite"):
        assert (h5.parent / name).stat().st_size > 0
    with h5py.File(h5) as file:
        values, about = file["attribution_partition_shap"][:], dict(file["attribution_partition_shap"].attrs)
        assert len(values) == len(file["coords"])
        assert file["attribution_keep_one"].shape == values.shape
    np.testing.assert_allclose(values.sum(axis=0), about["full"] - about["base"], atol=1e-9)
    before = {path.name: path.read_bytes() for path in h5.parent.iterdir()}
    again = run_client(*arguments)
    assert again.code == 0, again.err
    assert "0, all from the cache, 0.0 MB sent" in " ".join(again.out.split())
    for path in h5.parent.iterdir():
        assert path.read_bytes() == before[path.name], path.name
    short = run_client(*arguments[1:])
    served, line, *warnings, picture, onward = short.out.splitlines()
    assert line == first.out.splitlines()[1], "the same line as above the figures"
    assert line.startswith(f"{h5.stem}: log_odds of lesion {about['full'][1]:+.4g}, empty slide ")
    assert len(warnings) <= 1
    assert picture.startswith(f"{h5.parent / stem}.png (and ")
    assert (served[:7], onward[:5]) == ("served:", "next:")


def test_from_a_slide_to_every_picture(
    run_client: Run, triton_url: str, real_slide: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run_client(
        "-v", "attribute", real_slide, "--out", out, "--url", triton_url, "--method", "occlusion", "--region",
        2, "--stride", 1, "--no-checks", "--tile-maps", 1, "--tile-score", "embedding",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    written = [Path(line) for line in ran.out.splitlines() if line.startswith(str(out))]
    assert len(written) == 5
    assert all(path.stat().st_size > 0 for path in written)
    tiles = json.loads(next(path for path in written if path.suffix == ".geojson").read_text())
    assert all(np.isfinite(tile["properties"]["measurements"]["attr:lesion"]) for tile in tiles["features"])


def test_a_bank_and_the_embedding_score(run_client: Run, triton_url: str, h5: Path, scored: Path) -> None:
    ran = run_client(
        "attribute", h5, "--url", triton_url, "--score", "embedding", "--method", "occlusion",
        "--bank", scored, "--no-checks",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    with h5py.File(h5) as file:
        data = file["attribution_occlusion"]
        assert data.shape[1] == 1
        assert data.attrs["full"][0] == pytest.approx(1)
        assert data.attrs["occluder"].startswith("bank of")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "cat"), "no class 'cat': the served model knows benign, lesion"),
        (("--url", "127.0.0.1:1", "--retry-for", "0"), "no answer from the Triton server at 127.0.0.1:1"),
        (("--bank", "missing.h5"), "missing.h5: "),
        (("--stride", "9"), "stride must lie between 1 and the window's size (4), not 9"),
        (("--slide", "missing.svs"), "missing.svs: no such file"),
    ],
)
def test_a_mistake_is_one_line(
    run_client: Run, triton_url: str, h5: Path, options: tuple[str, ...], message: str
) -> None:
    ran = run_client("attribute", h5, "--url", triton_url, "--method", "occlusion", *options)
    assert ran.code == 1
    assert ran.err.strip().startswith("error: ")
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_no_such_slide_is_one_line(run_client: Run, triton_url: str, tmp_path: Path) -> None:
    ran = run_client("attribute", tmp_path / "no.svs", "--url", triton_url, "--out", tmp_path)
    assert ran.code == 1
    assert "no.svs: no such file" in ran.err


def test_an_h5_that_contradicts_the_server_is_refused(
    run_client: Run, triton_url: str, h5: Path, contract: Contract, tmp_path: Path
) -> None:
    other_tile = replace(contract, tile=replace(contract.tile, mpp=0.25))
    for name, value, reason in (
        ("encoder_sha256", "0" * 64, "another tile encoder than its contract"),
        ("contract", "garbage", "its contract can't be read"),
        ("contract", "[" * 100_000, "its contract can't be read"),
        ("contract", other_tile.to_json(), "at 0.25 mpp, the served model takes"),
    ):
        with h5py.File(h5, "r+") as file:
            before = file["features"].attrs[name]
            file["features"].attrs[name] = value
        done = run_client("attribute", h5, "--url", triton_url, "--out", tmp_path)
        assert (done.code, done.err.count("\n")) == (1, 1), done.err
        assert reason in done.err
        with h5py.File(h5, "r+") as file:
            file["features"].attrs[name] = before


def test_what_is_not_known_about_an_h5_is_said(
    run_client: Run, triton_url: str, h5: Path, contract: Contract, tmp_path: Path
) -> None:
    def explained() -> tuple[str, str, bytes]:
        options = ("--no-checks", "--max-evals", 16, "--target", "lesion")
        done = run_client("attribute", h5, "--url", triton_url, "--out", tmp_path, *options)
        assert done.code == 0, done.err
        copy = tmp_path / "attribution" / h5.name  # where another tool made the file
        with h5py.File(copy if copy.exists() else h5) as file:
            noted = file["attribution_partition_shap"].attrs.get("embeddings_doubt", "")
        (picture,) = tmp_path.glob("*-partition_shap-lesion.png")
        return done.out, noted, picture.read_bytes()

    out, noted, plain = explained()
    assert (noted, "explained by" in out) == ("", False)
    with h5py.File(h5, "r+") as file:
        other = replace(contract, export_id="0123456789abcdef", precision="fp16").to_json()
        file["features"].attrs["contract"] = other
    out, noted, picture = explained()
    assert noted == (
        "embedded by export 0123456789abcdef with the same tile encoder in fp16, not fp32, explained by "
        f"export {contract.export_id}: scores stored earlier may differ"
    )
    assert noted in out
    assert picture != plain
    with h5py.File(h5, "r+") as file:
        for name in list(file["features"].attrs):
            del file["features"].attrs[name]
    out, noted, picture = explained()
    assert noted.startswith("the file does not say which tile encoder made its embeddings")
    assert noted in out
    assert picture != plain


def test_another_tools_file_is_attributed_and_not_changed(
    run_client: Run, triton_url: str, h5: Path, slide: EmbeddedSlide, tmp_path: Path
) -> None:
    ours, foreign, out = h5, tmp_path / "clam" / "s.h5", tmp_path / "results"
    foreign.parent.mkdir()
    with h5py.File(foreign, "w") as file:  # as CLAM writes its features
        file["features"], file["coords"] = slide.embeddings, slide.coords
    before = foreign.read_bytes()
    options = ("--url", triton_url, "--max-evals", 16, "--no-checks", "--target", "lesion", "--out", out)
    refused = run_client("attribute", foreign, *options)
    assert (refused.code, refused.err.count("\n")) == (1, 1), refused.err
    assert "--tile-size" in refused.err
    side = slide.tile_size[0]
    done = run_client("attribute", foreign, *options, "--tile-size", side)
    assert done.code == 0, done.err
    assert f"read as level-0 pixels of tiles of {side} px" in " ".join(done.out.split())
    assert run_client("attribute", ours, *options).code == 0
    with h5py.File(out / "attribution" / "s.h5") as copy, h5py.File(ours) as own:
        values = own["attribution_partition_shap"][:]
        np.testing.assert_array_equal(copy["attribution_partition_shap"][:], values[slide.rows])
    assert foreign.read_bytes() == before
    assert [path.name for path in foreign.parent.iterdir()] == ["s.h5"]


def test_a_bank_of_another_encoder_is_refused_and_of_an_unknown_one_named(
    run_client: Run, triton_url: str, h5: Path, slide: EmbeddedSlide, tmp_path: Path
) -> None:
    bank = tmp_path / "bank.h5"
    with h5py.File(bank, "w") as file:
        file["features"], file["coords"] = slide.embeddings, slide.coords
        file["coords"].attrs["patch_size_level0"] = 256
    x, y = slide.coords[0].tolist()
    ring = [[x, y], [x + 300, y], [x + 300, y + 300], [x, y + 300], [x, y]]
    area = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (tmp_path / "area.geojson").write_text(json.dumps(area))
    what_if = ("counterfactual", h5, tmp_path / "area.geojson", "--change", "replace", "--url", triton_url)
    done = run_client(*what_if, "--bank", bank)
    assert done.code == 0, done.err
    said = "bank.h5 does not say which tile encoder made"
    assert said in " ".join(done.out.split())
    assert said in (h5.parent / f"{h5.stem}-counterfactual-replace.csv").read_text()
    with h5py.File(bank, "r+") as file:
        file["features"].attrs["encoder_sha256"] = "0" * 64
    for command in (what_if, ("attribute", h5, "--url", triton_url)):
        refused = run_client(*command, "--bank", bank)
        assert (refused.code, refused.err.count("\n")) == (1, 1), refused.err
        assert "other tile-encoder weights than the server's" in refused.err


def test_what_if_an_annotated_area_were_removed(
    run_client: Run,
    triton_url: str,
    h5: Path,
    connection: Connection,
    contract: Contract,
    slide: EmbeddedSlide,
) -> None:
    x, y = slide.coords[10].tolist()
    width, height = slide.tile_size
    ring = [[x, y], [x + 2 * width, y], [x + 2 * width, y + height], [x, y + height], [x, y]]
    area = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation", "classification": {"name": "tumour"}},
    }
    annotations = h5.parent / "areas.geojson"
    annotations.write_text(json.dumps({"type": "FeatureCollection", "features": [area]}))
    ran = run_client("counterfactual", h5, annotations, "--url", triton_url, "--area", "tumour")
    assert ran.code == 0, ran.err
    table = (h5.parent / f"{h5.stem}-counterfactual-remove.csv").read_text().splitlines()
    assert table[0] == "area,change,tiles,class,log_odds,stderr"
    inside = [tuple(c) in {(x, y), (x + width, y)} for c in slide.coords.tolist()]
    keep = ~np.stack([np.zeros(len(inside), bool), np.array(inside)])
    logits = ServedForward(connection, contract)(
        slide.embeddings, slide.model_coords(contract), keep
    ).logits.astype(np.float64)
    odds = logits[:, 1] - logits[:, 0]
    name, change, tiles, label, value, _ = table[2].split(",")
    assert (name, change, int(tiles), label) == ("tumour", "remove", sum(inside), "lesion")
    assert float(value) == pytest.approx(odds[1] - odds[0], abs=1e-5)
    replaced = run_client(
        "counterfactual", h5, annotations, "--url", triton_url, "--change", "replace", "--bank", h5
    )
    assert replaced.code == 0, replaced.err
    missing = run_client("counterfactual", h5, annotations, "--url", triton_url, "--area", "stroma")
    assert missing.code == 1
    assert "stroma" in missing.err or "tumour" in missing.err
    assert len(missing.err.strip().splitlines()) == 1
