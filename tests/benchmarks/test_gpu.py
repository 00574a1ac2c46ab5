"""The GPU benchmark as far as it goes without a GPU: its sections on the CPU, and how one fails."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.gpu import Found, measure, page
from benchmarks.gpu_runtimes import flops_per_tile
from benchmarks.gpu_sections import PRECISIONS, SECTIONS, TINY, occlusion
from training.models.build import build_models

SMALL = replace(TINY, batches=(2,), slides=(30,), masks=((30, 3),), scored=4)
ABOUT = dict.fromkeys(("command", "device", "host", "preset", "torch", "onnxruntime"), "x")


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_measures_what_it_names(name: str, demo_repository: Path) -> None:
    section, precisions = SECTIONS[name]
    tables = section(SMALL, {"fp32": demo_repository} if precisions else {})
    rows = [row for table in tables.values() for row in table]
    rates = [row[unit] for row in rows for unit in ("TFLOP/s", "tiles/s", "masks/s", "ms") if unit in row]
    assert rates
    assert all(isinstance(rate, float) and rate > 0 for rate in rates)
    runtimes = {row["runtime"] for row in rows if "runtime" in row}
    if name == "tile-encoder":
        assert runtimes == {
            "PyTorch eager, autocast",
            "PyTorch eager, half",
            "ONNX Runtime, fp32",
            "Triton, fp32",
        }
    for row in rows:
        assert float(row.get("1 - cosine to PyTorch") or 0) < 1e-3
        assert float(row.get("1 - cosine to eager") or 0) < 1e-3
        assert row.get("passed") == row.get("rows")
    assert page(ABOUT, Found(tables)).count("\n| ") == len(rows) + len(tables)


def test_what_fails_is_named_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS, "occlusion", (occlusion, ()))
    *_, found = measure(replace(SMALL, preset="none"), ["occlusion", "matrix-product"], None)
    assert list(found.tables) == ["Matrix product"]
    assert found.failed.keys() == {"occlusion"}
    assert found.failed["occlusion"].startswith("TrainingError: no preset 'none'")
    assert found.seconds.keys() == {"exports", "occlusion", "matrix-product"}
    assert "**occlusion failed**: TrainingError: no preset" in page(ABOUT, found)
    assert json.dumps(found.tables)


def test_every_precision_of_an_export_is_measured() -> None:
    from export.precision import PRECISIONS as exported

    assert PRECISIONS.keys() == exported.keys()
    assert set(SECTIONS["served"][1]) == exported.keys()


def test_a_tile_takes_what_its_matrices_take() -> None:
    """By hand: the patch projection, and what a block multiplies."""
    encoder = build_models("demo").tile
    tokens = encoder.vit.patch_embed.num_patches + 1
    by_hand = 2 * (tokens - 1) * encoder.vit.patch_embed.proj.weight.numel()
    for block in encoder.vit.blocks:
        linear = sum(
            p.numel() for name, p in block.named_parameters() if name.endswith("weight") and p.ndim == 2
        )
        by_hand += 2 * tokens * linear + 4 * tokens**2 * encoder.vit.num_features
    assert flops_per_tile(encoder) == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"), [([], "no NVIDIA GPU here"), (["--tiny", "--only", "all"], "no section 'all'")]
)
def test_a_mistake_is_one_line(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    reported = capsys.readouterr().err
    assert reported.startswith(f"error: {message}")
    assert reported.count("\n") == 1
