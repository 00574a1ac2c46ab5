"""A server that answers NaN: refused by name, and nothing of it stored."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from client.errors import NonFiniteAnswer
from client.outputs.records import FAILED, OK, read_records
from client.triton.connection import Connection
from client.triton.contract import read_contract
from client.triton.endpoint import Endpoint
from client.triton.parity import verify
from gigapath_contract.reference import read_reference
from server.local import run_triton
from tests.support.pyramid import write_pyramid

Run = Callable[..., Any]


def fail_above(graph: onnx.GraphProto, source: str, output: str, threshold: float) -> None:
    """Make a row of `output` NaN where the mean of its row of `source` is above `threshold`."""
    node = next(node for node in graph.node if output in node.output)
    node.output[list(node.output).index(output)] = "sound"
    kept = numpy_helper.from_array(np.array([threshold, 0], np.float32), "kept")
    graph.initializer.append(kept)
    graph.node.extend(
        [
            helper.make_node("Split", ["kept"], ["threshold", "nothing"], axis=0, num_outputs=2),
            helper.make_node("Cast", [source], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["wide"], ["flat"], axis=1),
            helper.make_node("Constant", [], ["last"], value_ints=[1]),
            helper.make_node("ReduceMean", ["flat", "last"], ["mean"], keepdims=1),
            helper.make_node("Sub", ["threshold", "mean"], ["room"]),
            helper.make_node("Sqrt", ["room"], ["root"]),
            helper.make_node("Mul", ["root", "nothing"], ["zero_or_nan"]),
            helper.make_node("Add", ["sound", "zero_or_nan"], [output]),
        ]
    )


@pytest.fixture(scope="module")
def failing(demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of the demo, whose tile encoder returns NaN for tiles brighter than 200 on average."""
    folder = tmp_path_factory.mktemp("failing")
    repository = shutil.copytree(demo_repository, folder / "repository", symlinks=True)
    path = repository / "tile_encoder" / "1" / "model.onnx"
    model = onnx.load(path)
    fail_above(model.graph, "TILES", "EMBEDDINGS", 200)
    onnx.save(model, path)
    with run_triton(repository, log=folder / "log") as server:
        yield server.url


def test_an_answer_that_is_not_finite_is_refused_by_name(failing: str) -> None:
    tiles = np.zeros((4, 224, 224, 3), np.uint8)
    tiles[2] = 255
    with Connection(Endpoint(failing)) as connection:
        with pytest.raises(NonFiniteAnswer) as caught:
            connection.infer("tile_encoder", {"TILES": tiles}, ["EMBEDDINGS"])
        assert (caught.value.model, caught.value.output, caught.value.rows) == (
            "tile_encoder",
            "EMBEDDINGS",
            (2,),
        )
        assert "tile_encoder returned NaN or infinite values in 1 of 4 rows of EMBEDDINGS" in str(
            caught.value
        )
        embeddings = connection.infer("tile_encoder", {"TILES": tiles[:2]}, ["EMBEDDINGS"])["EMBEDDINGS"]
        assert np.isfinite(embeddings).all()


def test_a_slide_names_its_tile_and_nothing_of_it_is_stored(
    failing: str, real_slide: Path, run_client: Run, tmp_path: Path
) -> None:
    ended = run_client("score", real_slide, "--url", failing, "--out", tmp_path / "out")
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert f"{real_slide}, tile at x=" in ended.err
    assert "tile_encoder returned NaN or infinite values in" in ended.err
    assert not list((tmp_path / "out").rglob("*.h5"))


def test_it_fails_no_slide_that_shares_the_request(
    failing: str, picture: np.ndarray, run_client: Run, tmp_path: Path
) -> None:
    """Three slides in requests of up to 64 tiles, one at a time; one slide has a bright tile."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(3):
        pixels = picture[600 * number : 600 * number + 512, 900:1412] // 2
        if number == 1:
            pixels[:256, :256] = 255
        write_pyramid(folder / f"{number}.tif", pixels)
    out = tmp_path / "out"
    ended = run_client(
        *("batch", folder, "--url", failing, "--out", out, "--all-tiles", "--slides", 3, "--in-flight", 1)
    )
    records = {record.slide_id: record for record in read_records(out)}
    assert ended.code == 1
    assert {name: record.status for name, record in records.items()} == {"0": OK, "1": FAILED, "2": OK}
    assert "1.tif, tile at x=0, y=0: tile_encoder returned NaN" in records["1"].reason


def test_verify_shows_it_as_a_row_that_failed(failing: str, demo_repository: Path) -> None:
    reference, _, gates = read_reference(demo_repository / "slide_pipeline" / "1" / "reference.npz")
    bright = dataclasses.replace(reference, tiles=np.full_like(reference.tiles, 255), slides=())
    with Connection(Endpoint(failing)) as connection:
        (row,) = verify(connection, bright, gates, read_contract(connection))
    assert np.isnan(row.max_abs)
    assert not row.passed
