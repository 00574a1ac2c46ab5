"""The driver that disturbs a batch, on few slides: nothing is lost, and no byte differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from benchmarks import faults


def test_a_disturbed_batch_ends_complete(
    demo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("client killed", "server killed", "another client's slow request", "disk full, and freed")
    monkeypatch.setattr(faults, "exported", lambda preset: demo_repository)
    monkeypatch.setattr(faults, "FAULTS", {name: faults.FAULTS[name] for name in kinds})
    monkeypatch.setattr(faults, "PAUSE_S", 2.0)
    monkeypatch.setattr(faults, "SLOW_TILES", 1_000)
    monkeypatch.setattr(faults, "STATE", tmp_path / "faults.json")
    monkeypatch.setattr(faults, "GROWTH", 10)  # too short to say whether memory is flat
    # The disk is full after the first slide: after the last one the batch could not write its tables.
    faults.main(slides=12, faults=4, seed=1, pages=tmp_path)
    page = (tmp_path / "faults.md").read_text()
    assert "FAILED" not in page
    assert "| faults | 4 |" in page
    assert "| slides lost | 0 |" in page
    faults.main(page_only=True, pages=tmp_path / "again")
    assert (tmp_path / "again" / "faults.md").read_text() == page


def test_a_run_that_broke_off_has_a_page_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "STATE", tmp_path / "faults.json")
    faults.Findings(10, 1, met=["client killed"], memory={"client, disturbed": [1.0] * 3}).keep()
    with pytest.raises(typer.Exit):
        faults.main(page_only=True, pages=tmp_path)
    page = (tmp_path / "faults.md").read_text()
    assert "| client killed | 1 times |" in page
    assert "| slides lost | None — FAILED |" in page
