"""`attribute` for many slides: a map each, a table, a sheet, and no slide twice."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from client.attribution.attribute import Settings
from client.commands.attribute_slide import settings_key
from client.outputs.layout import Layout
from gigapath_contract.schema import Contract

Run = Callable[..., Any]


def test_a_batch_is_attributed_whole_or_by_manifest_and_resumed(
    slides: Path, triton_url: str, contract: Contract, run_client: Run, tmp_path: Path
) -> None:
    layout, server = Layout(tmp_path, contract), ("--url", triton_url)
    assert run_client("batch", slides, "--out", tmp_path, *server).code == 0
    many = ("attribute", tmp_path, *server, "--max-evals", 16, "--no-checks", "--target", "lesion")
    (tmp_path / "one.csv").write_text(f"slide_id,path\nb,{slides / 'b.tif'}\n")
    first = run_client(*many, "--manifest", tmp_path / "one.csv")
    assert first.code == 0, first.err
    kept = layout.slide_features("c").read_bytes()
    layout.slide_features("c").write_bytes(b"no HDF5")
    broken = run_client(*many, "--all")
    assert broken.code == 1
    assert "b: was done" in broken.err

    def table() -> dict[str, dict[str, str]]:
        with (layout.attribution / "attributions.csv").open() as file:
            return {row["slide_id"]: row for row in csv.DictReader(file)}

    assert {name: row["status"] for name, row in table().items()} == {"a": "ok", "b": "ok", "c": "failed"}
    assert "c.h5" in table()["c"]["warnings"]
    layout.slide_features("c").write_bytes(kept)
    again = run_client(*many, "--all")
    assert again.code == 0, again.err
    assert [f"{name}: was done" in again.err for name in "abc"] == [True, True, False]
    for name, row in table().items():
        assert (row["status"], row["target"]) == ("ok", "lesion")
        assert row["map"] == f"{name}-partition_shap-lesion.png"
        assert (layout.attribution / row["map"]).exists()
        # The slides' files were found where they were scored.
        assert (layout.attribution / f"{name}-partition_shap-lesion-strongest.png").exists()
    assert (layout.attribution / "attributions.pdf").read_bytes().startswith(b"%PDF")
    refused = run_client(*many, "--all", "--slide-id", "a")
    assert (refused.code, refused.err.count("\n")) == (1, 1)


def test_banks_of_one_shape_are_told_apart() -> None:
    bank = np.zeros((100, 96), np.float32)
    other = bank.copy()
    other[50] = 1
    one, two = (repr(settings_key(Settings(occluder=values))) for values in (bank, other))
    assert one != two
    assert one == repr(settings_key(Settings(occluder=bank.copy())))
