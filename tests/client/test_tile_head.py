"""A served tile head, from the server's outputs to files, keys and maps."""

from __future__ import annotations

import base64
import dataclasses
import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from client.outputs.hdf5 import read_features
from client.outputs.layout import Layout, find_features
from client.scoring.embedding import Embedded, Throughput, embed_tiles, row_width
from client.scoring.result_key import SlideContent, find_keys
from client.scoring.resume import EmbeddingCheckpoint
from client.scoring.score import SlideSource, TilingOptions
from client.scoring.timings import StageTimer
from client.slides.slide import open_slide
from client.slides.tiling import plan_tiles
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from client.triton.parity import load_reference, verify
from client.viewer.contents import describe
from client.viewer.library import Library
from gigapath_contract.schema import Contract
from server.local import LOOPBACK, run_triton
from server.ports import free_port
from tests.client.conftest import Run

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("stroma", "tumour", "other")


@pytest.fixture(scope="module")
def http() -> int:
    return free_port(LOOPBACK)


@pytest.fixture(scope="module")
def url(tile_head_repository: Path, http: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a real Triton that serves an export with a tile head and patch tokens, HTTP at `http`."""
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with run_triton(tile_head_repository, log=log, http_port=http) as server:
        yield server.url


@pytest.fixture(scope="module")
def served(url: str) -> Iterator[Connection]:
    with Connection(Endpoint(url, retry_for=2)) as opened:
        yield opened


@pytest.fixture(scope="module")
def contract(served: Connection) -> Contract:
    return read_contract(served)


def test_the_server_returns_what_pytorch_returned(
    tile_head_repository: Path, served: Connection, contract: Contract
) -> None:
    stored = tile_head_repository / "slide_pipeline/1/reference.npz"
    reference, gates = load_reference(stored, contract)
    rows = [row for row in verify(served, reference, gates, contract) if row.model == "tile_encoder"]
    assert [row.output for row in rows] == ["EMBEDDINGS", "TILE_LOGITS", "PATCH_TOKENS"]
    assert all(row.passed and row.max_abs < 1e-5 for row in rows)


def test_a_request_gets_the_outputs_that_it_names(served: Connection, contract: Contract) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    for name, dims in contract.tile_outputs.items():
        (answer,) = served.infer("tile_encoder", {"TILES": tiles}, [name]).items()
        assert answer[0] == name
        assert answer[1].shape == (3, *dims)
    coords = np.array([[0, 0], [256, 0], [512, 0]])
    names = ["EMBEDDINGS", "TILE_LOGITS", "SLIDE", "LOGITS"]
    ensemble = served.infer("slide_pipeline", {"TILES": tiles, "COORDS": coords}, names)
    alone = served.infer("tile_encoder", {"TILES": tiles}, names[:2])
    for name, array in alone.items():
        np.testing.assert_array_equal(ensemble[name], array)


def test_the_probe_compares_the_heads_logits_too(
    url: str, http: int, tile_head_repository: Path, tmp_path: Path
) -> None:
    probe = runpy.run_path(str(ROOT / "deploy/base/probe.py"))
    probe["infer"](f"http://127.0.0.1:{http}", 60, tile_head_repository)
    (tmp_path / "slide_pipeline/1").mkdir(parents=True)
    with np.load(tile_head_repository / "slide_pipeline/1/reference.npz") as stored:
        wrong = {**stored, "tile_encoder.TILE_LOGITS": stored["tile_encoder.TILE_LOGITS"] + 0.01}
    np.savez(tmp_path / "slide_pipeline/1/reference.npz", **wrong)
    with pytest.raises(ValueError, match="tile_encoder computes wrong numbers: TILE_LOGITS differs"):
        probe["infer"](f"http://127.0.0.1:{http}", 60, tmp_path)


@pytest.fixture(scope="module")
def out(url: str, slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `batch --geojson` writes for one slide."""
    from client.cli import app

    folder = tmp_path_factory.mktemp("batch")
    (folder / "slides.csv").write_text(f"slide_id,image_path\na,{slides / 'a.tif'}\n")
    app(
        ["batch", str(folder / "slides.csv"), "--out", str(folder / "out"), "--url", url, "--geojson"],
        standalone_mode=False,
    )
    return folder / "out"


def test_a_batch_keeps_the_heads_scores_beside_the_features(out: Path, contract: Contract) -> None:
    assert contract.tile_head is not None
    layout = Layout(out, contract)
    assert layout.encoder.endswith(f"-fp32-head-{contract.tile_head.weights_sha256[:8]}")
    with h5py.File(layout.features("a")) as file:
        logits, scores = file["tile_logits"], file["tile_scores"]
        assert tuple(scores.attrs["classes"]) == CLASSES
        assert len(logits) == len(file["features"]) > 0
        np.testing.assert_allclose(scores[:], contract.tile_head.probabilities(logits[:]))
        np.testing.assert_allclose(scores[:].sum(axis=1), 1, rtol=1e-5)
    stored = read_features(layout.features("a"))
    assert tuple(stored.tile_scores) == CLASSES
    tiles = json.loads(layout.tiles_geojson("a").read_text())["features"]
    found = [tile["properties"]["measurements"]["tile:tumour"] for tile in tiles]
    np.testing.assert_allclose(found, stored.tile_scores["tumour"], atol=1e-4)
    assert layout.tiles_geojson("a").is_relative_to(layout.export), "another export's head says other things"


def test_the_viewer_has_the_heads_probabilities_as_a_map(out: Path, contract: Contract) -> None:
    library = Library((out,))
    (entry,) = library.entries().values()
    found = describe(library, entry)
    (shown,) = found["maps"]
    assert (shown["name"], tuple(shown["classes"]), shown["limits"]) == ("tile_head", CLASSES, [1.0] * 3)
    values = np.frombuffer(base64.b64decode(shown["values"]["data"]), "<f4").reshape(shown["values"]["shape"])
    scores = read_features(Layout(out, contract).features("a")).tile_scores
    np.testing.assert_array_equal(values, np.stack(list(scores.values()), axis=1))


def test_score_writes_a_map_for_each_class_and_draws_it_again_where_it_is_gone(
    url: str, slides: Path, run_client: Run, tmp_path: Path, out: Path, contract: Contract
) -> None:
    arguments = ("score", slides / "a.tif", "--out", tmp_path, "--url", url)
    ended = run_client(*arguments)
    maps = [tmp_path / f"a-tile-head-{name}.png" for name in CLASSES]
    assert ended.code == 0
    assert all(path.exists() and str(path) in ended.out for path in maps)
    one, other = (read_features(path) for path in (tmp_path / "a.h5", Layout(out, contract).features("a")))
    np.testing.assert_array_equal(one.tile_scores["tumour"], other.tile_scores["tumour"])
    before = maps[1].read_bytes()
    maps[1].unlink()
    assert run_client(*arguments).code == 0
    assert maps[1].read_bytes() == before
    assert run_client(*arguments, "--min-tissue", 0.9, "--overwrite").code == 0
    assert maps[1].read_bytes() != before


def test_patch_tokens_are_stored_on_request_alone(
    url: str, slides: Path, run_client: Run, tmp_path: Path, served: Connection, contract: Contract
) -> None:
    arguments = ("score", slides / "a.tif", "--out", tmp_path, "--url", url, "--chunk", 1)
    ended = run_client(*arguments, "--patch-tokens")
    path = tmp_path / "patch_tokens" / "a.h5"
    assert (ended.code, str(path) in ended.out) == (0, True)
    with h5py.File(path) as file, h5py.File(tmp_path / "a.h5") as scored:
        tokens = file["patch_tokens"]
        assert (tokens.dtype, tokens.chunks) == (np.float16, (1, 197, 32))
        np.testing.assert_array_equal(file["coords"][:], scored["coords"][:])
        np.testing.assert_allclose(tokens[:, 0], scored["features"][:], rtol=1e-3, atol=1e-3)
        assert tokens.attrs["export_id"] == contract.export_id
        size = f"patch tokens of {len(tokens)} tiles: {tokens.nbytes / 1e6:.3g} MB in float16"
    assert size in " ".join(ended.err.split())
    assert find_features(tmp_path) == tmp_path / "a.h5", "a folder with one slide"
    before = path.stat().st_mtime_ns
    assert run_client(*arguments, "--patch-tokens").code == 0
    assert path.stat().st_mtime_ns == before
    assert run_client(*arguments, "--min-tissue", 0.9).code == 0
    assert not path.exists(), "of tiles that are stored no more"


def test_a_batch_adds_tokens_and_maps_to_what_is_done_and_keeps_them_true(
    url: str, slides: Path, run_client: Run, tmp_path: Path, contract: Contract
) -> None:
    manifest, out, alone = tmp_path / "slides.csv", tmp_path / "out", tmp_path / "score"
    manifest.write_text(f"slide_id,image_path\na,{slides / 'a.tif'}\n")
    batch = ("batch", manifest, "--out", out, "--url", url)
    extras = ("--patch-tokens", "--tile-head-maps")
    assert run_client(*batch).code == 0
    layout = Layout(out, contract)
    tokens = layout.patch_tokens("a")
    maps = [layout.export / "tile_head_maps" / f"a-tile-head-{name}.png" for name in CLASSES]
    assert not tokens.exists()
    assert run_client("score", slides / "a.tif", "--out", alone, "--url", url, "--patch-tokens").code == 0
    ended = run_client(*batch, *extras)
    assert (ended.code, "a  was done" in ended.err) == (0, True)
    assert [path.read_bytes() for path in maps] == [(alone / path.name).read_bytes() for path in maps]
    with h5py.File(tokens) as file, h5py.File(alone / "patch_tokens" / "a.h5") as other:
        np.testing.assert_array_equal(file["patch_tokens"], other["patch_tokens"])
        np.testing.assert_array_equal(file["coords"], other["coords"])
    before = [path.stat().st_mtime_ns for path in (tokens, *maps)]
    assert run_client(*batch, *extras).code == 0
    assert [path.stat().st_mtime_ns for path in (tokens, *maps)] == before
    maps[0].unlink()  # as after a run that was killed
    assert run_client(*batch, *extras).code == 0
    assert maps[0].read_bytes() == (alone / maps[0].name).read_bytes()
    assert [path.stat().st_mtime_ns for path in (tokens, *maps[1:])] == [before[0], *before[2:]]
    assert run_client(*batch, "--min-tissue", 0.9).code == 0
    assert not any(path.exists() for path in (tokens, *maps)), "of tiles that are stored no more"


@pytest.mark.parametrize(
    ("option", "reason"),
    [("--patch-tokens", "export has no patch tokens"), ("--tile-head-maps", "export has no tile head")],
)
def test_a_batch_names_what_the_export_lacks(
    triton_url: str, slides: Path, run_client: Run, tmp_path: Path, option: str, reason: str
) -> None:
    ended = run_client("batch", slides, "--out", tmp_path / "out", "--url", triton_url, option)
    assert (ended.code, reason in ended.err) == (1, True), ended.err


def test_an_export_without_patch_tokens_is_named(
    triton_url: str, slides: Path, run_client: Run, tmp_path: Path
) -> None:
    ended = run_client("score", slides / "a.tif", "--out", tmp_path, "--url", triton_url, "--patch-tokens")
    assert ended.code == 1
    assert "the served export has no patch tokens: export with PATCH_TOKENS=1" in " ".join(ended.err.split())


def test_a_resumed_slide_has_the_logits_of_an_undisturbed_one(
    served: Connection, contract: Contract, slides: Path, tmp_path: Path
) -> None:
    with open_slide(slides / "a.tif") as slide:
        plan = plan_tiles(slide, None)

    def embed(checkpoint: EmbeddingCheckpoint | None) -> Embedded:
        return embed_tiles(
            plan, served, contract, Throughput(chunk=4), timer=StageTimer(), checkpoint=checkpoint
        )

    whole = embed(None)
    assert whole.tile_logits is not None
    assert whole.tile_logits.shape == (len(plan), 3)
    width = row_width(contract)
    with EmbeddingCheckpoint(tmp_path / "a.part", "key", width) as first:
        embed(first)
    cut = (tmp_path / "a.part").read_bytes()[:-100]
    (tmp_path / "a.part").write_bytes(cut)
    with EmbeddingCheckpoint(tmp_path / "a.part", "key", width) as second:
        assert 0 < len(second.valid) < len(plan)
        resumed = embed(second)
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_head_makes_other_tiles_and_another_slide_head_does_not(
    contract: Contract, slides: Path
) -> None:
    def tiles_key(changed: Contract) -> str:
        return find_keys(SlideSource(slides / "a.tif"), changed, TilingOptions(), SlideContent()).tiles

    assert contract.tile_head is not None
    other = dataclasses.replace(contract.tile_head, weights_sha256="0" * 64)
    keys = [
        tiles_key(dataclasses.replace(contract, **change))
        for change in ({}, {"head": None, "export_id": "0"}, {"tile_head": other}, {"tile_head": None})
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
