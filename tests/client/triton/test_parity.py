"""`client verify`: the export's reference through a real server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.errors import ClientError, ContractMismatch
from client.triton.connection import Connection
from client.triton.parity import load_reference, verify
from gigapath_contract.reference import write_reference
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
    off = dataclasses.replace(reference, embeddings=reference.embeddings + 1e-3, slides=())
    (row,) = verify(connection, off, gates, contract)
    assert (row.model, row.output, row.passed) == ("tile_encoder", "EMBEDDINGS", False)
    assert row.max_abs == pytest.approx(1e-3, rel=0.05)

    off = dataclasses.replace(reference, embeddings=reference.embeddings + 1e-3, slides=reference.slides[:1])
    write_reference(tmp_path / "off.npz", off, contract, gates)
    ended = run_client("verify", "--url", triton_url, "--reference", tmp_path / "off.npz")
    assert ended.code == 1
    assert "1 of" in ended.out
    assert "FAILED" in ended.out


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
