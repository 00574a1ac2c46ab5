"""The GPU benchmark as far as it goes without a GPU: its runtimes on the CPU, and its error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.gpu import all_runtimes, flops_per_tile, matmul_peak, measure, page
from training.models.build import build_models


def test_runtimes_are_timed_alternately_and_agree(tmp_path: Path) -> None:
    runtimes, missing, flops = all_runtimes("demo", "cpu", 2, tmp_path)
    onnx = ["ONNX Runtime, fp16", "ONNX Runtime, fp16-mixed"]
    assert (list(runtimes), missing) == (["PyTorch eager, autocast", *onnx], {})
    measured = measure(runtimes, batch=2, trials=3, seconds=0.05)
    for runtime in measured.values():
        assert len(runtime.rates) == 3
        assert min(runtime.rates) > 0
        assert runtime.cosine > 0.99  # bfloat16 on this side, float16 on the other
    peak = matmul_peak("cpu", size=256, trials=3)
    table = page("a CPU", "demo", 2, measured, {"TensorRT": "not installed"}, flops, peak)
    assert table.count("\n| ") == 5
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
    assert flops_per_tile(encoder) == pytest.approx(by_hand, rel=1e-3)


def test_without_a_gpu_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    reported = capsys.readouterr().err
    assert reported.startswith("error: no NVIDIA GPU here")
    assert reported.count("\n") == 1
