"""`make bench-gpu` as far as it goes without a GPU: its ways on the CPU, and the line it ends with."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import all_ways, bench, matmul_peak, measure, operations_a_tile, page
from training.models.build import build_models


def test_ways_are_timed_in_turns_and_agree(tmp_path: Path) -> None:
    ways, missing, operations = all_ways("demo", "cpu", 2, tmp_path)
    assert (list(ways), missing) == (["PyTorch eager, autocast", "ONNX Runtime"], {})
    measured = measure(ways, batch=2, rounds=3, seconds=0.05)
    for way in measured.values():
        assert len(way.rates) == 3
        assert min(way.rates) > 0
        assert way.cosine > 0.99  # bfloat16 on this side, float16 on the other
    peak = matmul_peak("cpu", size=256, rounds=3)
    table = page("a CPU", "demo", 2, measured, {"TensorRT": "not installed"}, operations, peak)
    assert table.count("\n| ") == 4
    assert "| TensorRT | not run: not installed |" in table


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
    assert operations_a_tile(encoder) == pytest.approx(by_hand, rel=1e-3)


def test_without_a_gpu_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as end:
        bench()
    assert end.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: no NVIDIA GPU here")
    assert told.count("\n") == 1
