"""Half precision as a GPU computes it, on the CPU: equal to ONNX Runtime where nothing overflows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from export import export
from export.export import export_preset
from export.graphs import write_graph
from export.half_gate import TrueHalf
from export.parity import LARGEST_HALF, ParityError
from export.precision import PRECISIONS
from export.samples import seeded_basis, seeded_coords, seeded_keep
from export.tile_graph import tile_graph
from gigapath_contract.reference import Arrays, seeded_embeddings
from training.models.build import Models, build_models
from training.models.presets import Preset

TILES = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)


def in_onnx_runtime(path: Path, inputs: Arrays) -> Arrays:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tile_encoder_equals_onnx_runtime(tiny: Preset, precision: str, tmp_path: Path) -> None:
    graph = tmp_path / "tile_encoder" / "model.onnx"
    graph.parent.mkdir()
    write_graph(tile_graph(build_models("tiny").tile, PRECISIONS[precision]), graph)
    run = TrueHalf(tmp_path)
    found = run("tile_encoder", {"TILES": TILES})["EMBEDDINGS"]
    expected = in_onnx_runtime(graph, {"TILES": TILES})["EMBEDDINGS"]
    np.testing.assert_allclose(found, expected, atol=1e-5 if precision == "fp32" else 0.02)
    names = {tensor.name for tensor in run.tensors()}
    assert ("blocks.0.mlp.gated" in names) is (precision != "fp32")
    assert ("blocks.0.attn.proj.sum" in names) is (precision == "fp16")
    assert all(0 <= tensor.largest < LARGEST_HALF for tensor in run.tensors())


@pytest.mark.parametrize("tiles", [1, 37, 1068])
def test_the_slide_graphs_equal_onnx_runtime(tiny_repository: Path, tiles: int, tmp_path: Path) -> None:
    inputs: Arrays = {
        "EMBEDDINGS": seeded_embeddings(*seeded_basis(32), tiles),
        "COORDS": seeded_coords(tiles),
    }
    for name in ("slide_encoder", "slide_occlusion"):
        (tmp_path / name).symlink_to(tiny_repository / name / "1")
        given = inputs | ({"KEEP": seeded_keep(tiles)} if name == "slide_occlusion" else {})
        found = TrueHalf(tmp_path)(name, given)
        for output, expected in in_onnx_runtime(tmp_path / name / "model.onnx", given).items():
            np.testing.assert_allclose(found[output], expected, atol=2e-5)


@pytest.mark.usefixtures("slide_graphs_traced")
@pytest.mark.parametrize("precision", ["fp16", "fp16-mixed"])
def test_an_overflow_that_onnx_runtimes_cpu_hides_is_refused_with_its_layer(
    tiny: Preset,
    empty_repository: Path,
    real_slide: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One channel of a SwiGLU whose product is 1.6e5, and a projection that makes little of it."""

    def doctored(*arguments: object) -> Models:
        models = build_models("tiny")
        block: Any = models.tile.vit.blocks[0]
        gate, up = 0, block.mlp.fc2.in_features
        with torch.no_grad():
            block.mlp.fc1.bias[[gate, up]] = 400.0
            block.mlp.fc1.weight[[gate, up]] = 0.0
            block.mlp.fc2.weight[:, 0] *= 1e-6
        return models

    monkeypatch.setattr(export, "choose_models", doctored)
    with pytest.raises(
        ParityError, match=r"tile_encoder: blocks\.0\.mlp\.gated .* 1\.6e\+05 .* 65,504"
    ) as caught:
        export_preset("tiny", repository=empty_repository, slide=real_slide, precision=precision)
    assert "\n" not in str(caught.value)
    rows = {row.case: row for row in caught.value.report.rows if row.model == "tile_encoder"}
    assert rows["4 tiles"].passed, "ONNX Runtime's CPU computes it in float32"
    assert not rows["4 tiles, true half"].passed
    overflow = caught.value.report.overflow()
    assert overflow is not None
    assert overflow.margin < 1
