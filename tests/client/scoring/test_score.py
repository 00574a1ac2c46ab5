"""One slide over a real server: numbers equal to direct requests, files that others can read."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import tritonclient.grpc as triton

from client.outputs.hdf5 import Provenance, read_features, write_slide_h5
from client.reading.stream import read_tiles
from client.scoring.embedding import Throughput, chunk_size
from client.scoring.result_key import SlideKeys
from client.scoring.score import ScoredSlide, SlideSource, TilingOptions, score_slide
from client.scoring.timings import StageTimer
from client.triton.connection import Connection
from client.triton.endpoint import Endpoint
from client.triton.statistics import read_statistics
from gigapath_contract.schema import Contract
from server.local import run_triton
from tests.support.pyramid import write_pyramid

Array = npt.NDArray[Any]
THROUGHPUT = Throughput()
TISSUE = np.random.default_rng(1).integers(90, 200, (256, 256, 3), np.uint8)


def score(
    path: Path, connection: Connection, contract: Contract, throughput: Throughput = THROUGHPUT, **tiling: Any
) -> ScoredSlide:
    source = SlideSource(path, path.stem)
    return score_slide(source, connection, contract, TilingOptions(**tiling), throughput, timer=StageTimer())


@pytest.fixture(scope="module")
def scored(real_slide: Path, connection: Connection, contract: Contract) -> ScoredSlide:
    return score(real_slide, connection, contract)


@pytest.fixture(scope="module")
def direct(triton_url: str) -> Callable[..., Array]:
    """One request by tritonclient alone."""

    def ask(model: str, output: str, **inputs: Array) -> Array:
        tensors = []
        for name, array in inputs.items():
            kind = {"uint8": "UINT8", "float32": "FP32", "int64": "INT64"}[str(array.dtype)]
            tensors.append(triton.InferInput(name, array.shape, kind).set_data_from_numpy(array))
        with triton.InferenceServerClient(triton_url) as client:
            return np.asarray(client.infer(model, tensors).as_numpy(output))

    return ask


def test_a_request_holds_as_many_tiles_as_the_contract_allows_unless_told_fewer(contract: Contract) -> None:
    for most in (64, 128):
        allowed = replace(contract, tile=replace(contract.tile, max_batch=most))
        sizes = [chunk_size(Throughput(chunk=chunk), allowed) for chunk in (None, 32, 500)]
        assert sizes == [most, 32, most]


def test_numbers_equal_direct_requests(scored: ScoredSlide, direct: Callable[..., Array]) -> None:
    plan = scored.plan
    assert len(plan) > 40
    assert scored.valid.all()
    tiles = np.concatenate([batch.pixels for batch in read_tiles(plan)])
    np.testing.assert_array_equal(scored.embeddings, direct("tile_encoder", "EMBEDDINGS", TILES=tiles))
    inputs = {"EMBEDDINGS": scored.embeddings, "COORDS": plan.coords}
    for output, ours in (
        ("LAYERS", scored.layers),
        ("SLIDE", scored.slide_embedding),
        ("LOGITS", scored.logits),
    ):
        np.testing.assert_array_equal(ours, direct("slide_encoder", output, **inputs))


def test_bytes_are_the_same_however_it_was_done(
    real_slide: Path,
    triton_url: str,
    contract: Contract,
    scored: ScoredSlide,
    demo_repository: Path,
    tmp_path: Path,
) -> None:
    provenance = Provenance(contract, SlideKeys())
    write_slide_h5(tmp_path / "one" / "a.h5", scored, provenance)
    expected = (tmp_path / "one" / "a.h5").read_bytes()
    with run_triton(demo_repository, log=tmp_path / "log") as second:
        for number, (endpoint, throughput) in enumerate(
            [
                (Endpoint(triton_url), Throughput(workers=1)),
                (Endpoint(triton_url), Throughput(workers=4)),
                (Endpoint(f"{triton_url},{second.url}"), Throughput(workers=4, in_flight=1)),
                (Endpoint(triton_url, shared_memory=True), Throughput()),
            ]
        ):
            with Connection(endpoint) as connection:
                again = score(real_slide, connection, contract, throughput)
            path = tmp_path / str(number) / "a.h5"
            write_slide_h5(path, again, provenance)
            assert path.read_bytes() == expected, endpoint


def test_a_file_as_trident_and_prov_gigapath_read_it(
    scored: ScoredSlide, contract: Contract, tmp_path: Path
) -> None:
    write_slide_h5(tmp_path / "s.h5", scored, Provenance(contract, SlideKeys()))
    with h5py.File(tmp_path / "s.h5") as file:
        assets = {key: file[key][:] for key in file}  # prov-gigapath's way: every key must be an array
        features, coords = file["features"], file["coords"]
        assert (features.dtype, coords.dtype) == (np.float32, np.int64)
        assert features.chunks[0] >= 256
        assert features.maxshape[0] is None
        attributes = dict(coords.attrs)
        recorded = dict(features.attrs)
        classes = list(file["scores"].attrs["classes"]) if contract.head else []
    n = len(scored.plan)
    np.testing.assert_array_equal(assets["features"], scored.embeddings)
    np.testing.assert_array_equal(assets["coords"], scored.plan.coords)
    assert (np.lexsort(scored.plan.coords.T) == np.arange(n)).all()  # by y, then x
    depth, width = contract.slide_encoder.depth, contract.slide_encoder.embed_dim
    assert assets["layer_features_cls"].shape == assets["layer_features_mean"].shape == (depth + 1, width)
    assert assets["slide_features"].shape == (width,)
    assert {key: attributes[key] for key in ("patch_size", "patch_size_level0", "overlap", "name")} == {
        "patch_size": 256,
        "patch_size_level0": 256,
        "overlap": 0,
        "name": "CMU-1-Small-Region",
    }
    assert (attributes["level0_width"], attributes["level0_height"]) == (2220, 2967)
    assert (attributes["level0_magnification"], attributes["target_magnification"]) == (20, 20)
    assert json.loads(recorded["contract"])["export_id"] == contract.export_id
    assert (recorded["mpp_level0_x"], recorded["mpp_source"]) == (0.499, "openslide.mpp")
    if contract.head:
        assert classes == list(contract.head.classes)
        np.testing.assert_allclose(assets["scores"].sum(), 1, atol=1e-6)


def test_a_slide_without_tissue_is_an_empty_file_not_a_missing_one(
    connection: Connection, contract: Contract, tmp_path: Path
) -> None:
    slide = write_pyramid(tmp_path / "white.tif", np.full((512, 512, 3), 255, np.uint8))
    scored = score(slide, connection, contract)
    assert scored.degraded_reason.startswith("no tissue found")
    write_slide_h5(tmp_path / "white.h5", scored, Provenance(contract, SlideKeys()))
    stored = read_features(tmp_path / "white.h5")
    assert stored.embeddings.shape == (0, contract.tile_encoder.embed_dim)
    assert stored.coords.shape == (0, 2)


def test_a_tile_that_cannot_be_decoded_stays_out(
    connection: Connection, contract: Contract, direct: Callable[..., Array], tmp_path: Path
) -> None:
    slide = write_pyramid(tmp_path / "a.tif", TISSUE, size=(1024, 768))
    whole = score(slide, connection, contract, tissue=False)
    with tifffile.TiffFile(slide) as file:
        page = file.pages.first
        start, size = page.dataoffsets[1], page.databytecounts[1]
    content = bytearray(slide.read_bytes())
    content[start : start + size] = bytes(size)
    damaged = tmp_path / "b.tif"
    damaged.write_bytes(content)
    scored = score(damaged, connection, contract, Throughput(chunk=5), tissue=False)
    assert scored.degraded_reason == "1 of 12 tiles could not be decoded"
    assert (~scored.valid).nonzero()[0].tolist() == [1]
    assert np.isnan(scored.embeddings[1]).all()
    keep = scored.valid
    np.testing.assert_array_equal(scored.embeddings[keep], whole.embeddings[keep])
    inputs = {"EMBEDDINGS": whole.embeddings[keep], "COORDS": whole.plan.coords[keep]}
    np.testing.assert_array_equal(scored.slide_embedding, direct("slide_encoder", "SLIDE", **inputs))


def test_a_slide_is_stored_under_its_own_name_not_its_file_s(
    slides: Path, connection: Connection, contract: Contract, tmp_path: Path
) -> None:
    scored = score_slide(SlideSource(slides / "a.tif", "case 7"), connection, contract)
    write_slide_h5(tmp_path / "any.h5", scored, Provenance(contract, SlideKeys()))
    with h5py.File(tmp_path / "any.h5") as file:
        names = {file[key].attrs["name"] for key in ("coords", "features", "slide_features")}
    assert names == {"case 7"}
    assert SlideSource(slides / "a.tif").slide_id == "a"


def test_the_command(
    real_slide: Path, triton_url: str, run_client: Callable[..., Any], tmp_path: Path
) -> None:
    done = run_client("score", real_slide, "--out", tmp_path, "--url", triton_url)
    assert done.code == 0, done.err
    assert "0.499 x 0.499 (openslide.mpp)" in done.out
    assert "bottleneck: " not in done.out  # of a second's work
    h5 = tmp_path / "CMU-1-Small-Region.h5"
    assert f"next: gigapath-client attribute {h5} --slide {real_slide}" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {
        "CMU-1-Small-Region.h5",
        "CMU-1-Small-Region-tiles.png",
        "records",
        ".keys",
    }
    explained = run_client("timings", tmp_path)
    assert explained.code == 0
    assert "bottleneck: " in explained.out
    for stage in ("tissue", "read", "wait-server", "send", "queue", "compute", "slide", "write"):
        assert stage in explained.out


def test_a_server_killed_meanwhile_is_named_and_leaves_nothing(
    real_slide: Path, demo_repository: Path, run_client: Callable[..., Any], tmp_path: Path
) -> None:
    with run_triton(demo_repository, log=tmp_path / "log") as server:

        def kill_once_busy() -> None:
            with Connection(Endpoint(server.url)) as connection:
                # The server's own first requests, of 3 tiles, may be counted late.
                while read_statistics(connection, "tile_encoder").rows < 3 + 3:
                    time.sleep(0.005)
            server.kill()

        killer = threading.Thread(target=kill_once_busy, daemon=True)
        killer.start()
        throughput = ["--chunk", 1, "--in-flight", 1, "--retry-for", 0.5]
        done = run_client("score", real_slide, "--out", tmp_path / "out", "--url", server.url, *throughput)
        killer.join()
    assert done.code == 1
    assert done.err.strip().count("\n") == 0
    assert done.err.startswith(f"error: no answer from the Triton server at {server.url}")
    assert not (tmp_path / "out").exists()
