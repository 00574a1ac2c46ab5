"""`client verify`: the export's reference through a real server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from client.errors import ClientError, ContractMismatch
from client.triton.connection import Connection
from client.triton.parity import load_reference, looks_like_tf32, verify
from gigapath_contract.reference import ParityRow, write_reference
from gigapath_contract.schema import Contract

Run = Callable[..., Any]


@pytest.fixture
def stored(demo_repository: Path) -> Path:
    return demo_repository / "slide_pipeline" / "1" / "reference.npz"


def test_the_server_returns_what_pytorch_returned(
    run_client: Run, triton_url: str, stored: Path, tmp_path: Path
) -> None:
    report = tmp_path / "rows.json"
    ended = run_client("verify", "--url", triton_url, "--reference", stored, "--report", report)
    rows = json.loads(report.read_text())
    assert ended.code == 0
    assert f"all {len(rows)} pass" in ended.out
    assert {row["model"] for row in rows} == {"tile_encoder", "slide_encoder", "slide_occlusion"}
    assert all(row["max_abs"] <= 1e-4 for row in rows)


def test_a_wrong_answer_fails_by_name(
    connection: Connection, contract: Contract, stored: Path, run_client: Run, triton_url: str, tmp_path: Path
) -> None:
    reference, gates = load_reference(stored, contract)
    shifted = {"EMBEDDINGS": reference.tile["EMBEDDINGS"] + 1e-3}
    off = dataclasses.replace(reference, tile=shifted, slides=())
    (row,) = verify(connection, off, gates, contract)
    assert (row.model, row.output, row.passed) == ("tile_encoder", "EMBEDDINGS", False)
    assert row.max_abs == pytest.approx(1e-3, rel=0.05)

    off = dataclasses.replace(reference, tile=shifted, slides=reference.slides[:1])
    write_reference(tmp_path / "off.npz", off, contract, gates)
    ended = run_client("verify", "--url", triton_url, "--reference", tmp_path / "off.npz")
    assert ended.code == 1
    assert "1 of" in ended.out
    assert "FAILED" in ended.out


def round_to_tf32(array: np.ndarray) -> np.ndarray:
    """float32 with 10 of its 23 bits of mantissa, rounded to nearest, as tensor cores take their factors."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


def with_tf32_weights(path: Path, target: Path) -> Path:
    """A copy of a graph whose products' weights are rounded to TF32."""
    model = onnx.load(path)
    factors = {node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm")}
    for weight in model.graph.initializer:
        if weight.name in factors:
            values = round_to_tf32(onnx.numpy_helper.to_array(weight))
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, target)
    return target


def test_a_server_in_tf32_is_recognised(
    demo_repository: Path, contract: Contract, stored: Path, run_client: Run, triton_url: str, tmp_path: Path
) -> None:
    """The reference as graphs with rounded factors answer it: the exact server is off by TF32's errors."""
    reference, gates = load_reference(stored, contract)
    tile = with_tf32_weights(demo_repository / "tile_encoder/1/model.onnx", tmp_path / "tile.onnx")
    slide = with_tf32_weights(demo_repository / "slide_encoder/1/model.onnx", tmp_path / "slide.onnx")
    (embeddings,) = ort.InferenceSession(tile).run(["EMBEDDINGS"], {"TILES": reference.tiles})
    session, slides = ort.InferenceSession(slide), []
    cases = {case.name: case for case in reference.cases() if case.model == "slide_encoder"}
    for one in reference.slides[:3]:
        inputs = cases[f"N={len(one.coords)}"].inputs
        inputs = {**inputs, "EMBEDDINGS": round_to_tf32(inputs["EMBEDDINGS"])}
        answers = session.run(list(one.encoder), inputs)
        slides.append(dataclasses.replace(one, encoder=dict(zip(one.encoder, answers, strict=True))))
    disturbed = dataclasses.replace(reference, tile={"EMBEDDINGS": embeddings}, slides=tuple(slides))
    write_reference(tmp_path / "tf32.npz", disturbed, contract, gates)
    ended = run_client("verify", "--url", triton_url, "--reference", tmp_path / "tf32.npz")
    assert ended.code == 1
    assert "the server computes float32 products in TF32" in ended.out
    assert "NVIDIA_TF32_OVERRIDE=0" in ended.out


@pytest.mark.parametrize(
    ("relative", "cosine", "precision", "tf32"),
    [
        (2**-11, 0.99999, "fp32", True),
        (2**-6, 0.99999, "fp32", False),
        (float("nan"), float("nan"), "fp32", False),
        (2**-11, 0.9, "fp32", False),
        (2**-11, 0.99999, "fp16", False),
    ],
)
def test_other_errors_are_not_taken_for_tf32(
    contract: Contract, relative: float, cosine: float, precision: str, tf32: bool
) -> None:
    row = ParityRow("tile_encoder", "4 tiles", "EMBEDDINGS", 3 * relative, cosine, relative, passed=False)
    assert looks_like_tf32([row], dataclasses.replace(contract, precision=precision)) is tf32
    assert not looks_like_tf32([dataclasses.replace(row, passed=True)], contract)


def test_a_reference_that_is_missing_damaged_or_of_another_export(
    contract: Contract, stored: Path, tmp_path: Path
) -> None:
    with pytest.raises(ClientError, match=r"no reference at .*--reference"):
        load_reference(tmp_path / "none.npz", contract)
    (tmp_path / "cut.npz").write_bytes(stored.read_bytes()[:1000])
    with pytest.raises(ClientError, match="is no reference file"):
        load_reference(tmp_path / "cut.npz", contract)
    with pytest.raises(ContractMismatch, match=r"belongs to export .* the server serves other"):
        load_reference(stored, dataclasses.replace(contract, export_id="other"))
