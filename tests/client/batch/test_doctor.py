"""The doctor: what is fine, what is not, and the exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gigapath_contract.schema import Contract

Run = Callable[..., Any]


def test_all_is_well(
    slides: Path, triton_url: str, contract: Contract, run_client: Run, tmp_path: Path
) -> None:
    done = run_client("doctor", slides, "--url", triton_url, "--out", tmp_path / "out")
    assert done.code == 0, done.out
    assert f"ok   server {triton_url}: Triton 2.51.0" in done.out
    assert f"export {contract.export_id}" in done.out
    assert "ok   slide a: 1280 x 1024 px, mpp 0.5 x 0.5 (" in done.out
    assert "at most 20 tiles" in done.out
    assert not (tmp_path / "out").exists()


def test_each_fault_is_listed(slides: Path, run_client: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.tif").touch()
    (tmp_path / "a.tif").symlink_to(slides / "a.tif")
    done = run_client("doctor", tmp_path, "--url", "127.0.0.1:1", "--out", tmp_path)
    assert done.code == 1
    assert "FAIL server: no answer from the Triton server at 127.0.0.1:1" in done.out
    assert "FAIL slide empty: " in done.out
    assert "ok   slide a: " in done.out
    assert "FAIL slides: " in run_client("doctor", tmp_path / "none.csv", "--url", "127.0.0.1:1").out
