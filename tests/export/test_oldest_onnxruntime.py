"""The graphs in the oldest ONNX Runtime that is supported, which a Triton container may carry."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from export.graphs import write_graph
from export.precision import PRECISIONS
from export.samples import seeded_basis, seeded_coords, seeded_keep
from export.tile_graph import tile_graph
from gigapath_contract.reference import seeded_embeddings
from training.models.build import build_models
from training.models.presets import Preset

ROOT = Path(__file__).resolve().parents[2]
OLDEST = ROOT / "build" / "oldest-onnxruntime"
RUN = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
np.savez(sys.argv[3], **dict(zip(names, session.run(names, dict(np.load(sys.argv[2]))))))
print(onnxruntime.__version__)
"""
Arrays = dict[str, npt.NDArray[Any]]


def in_oldest(graph: Path, inputs: Arrays, folder: Path) -> tuple[str, Arrays]:
    """The version, and the graph's outputs."""
    np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
    files = [str(path) for path in (graph, folder / "inputs.npz", folder / "outputs.npz")]
    environment = os.environ | {"PYTHONPATH": str(OLDEST)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *files], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip(), dict(np.load(folder / "outputs.npz"))


def in_ours(graph: Path, inputs: Arrays) -> Arrays:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def tiles() -> Arrays:
    return {"TILES": np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)}


def slide(width: int, count: int = 1100) -> Arrays:
    return {
        "EMBEDDINGS": seeded_embeddings(*seeded_basis(width), count),
        "COORDS": seeded_coords(count),
    }


def test_it_is_the_oldest_that_the_project_allows() -> None:
    floors = set(re.findall(r'"onnxruntime(?:-gpu)?>=([^"]+)"', (ROOT / "pyproject.toml").read_text()))
    (pinned,) = re.findall(
        r"(?m)^onnxruntime==(\S+)", (ROOT / "requirements/oldest-onnxruntime.txt").read_text()
    )
    assert {pinned.removesuffix(".0")} == floors


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        ("tile_encoder", tiles),
        ("slide_encoder", lambda: slide(96)),
        ("slide_occlusion", lambda: slide(96) | {"KEEP": seeded_keep(1100)}),
    ],
)
def test_the_demo_in_float32(
    demo_repository: Path, tmp_path: Path, model: str, inputs: Callable[[], Arrays]
) -> None:
    graph = demo_repository / model / "1" / "model.onnx"
    version, outputs = in_oldest(graph, inputs(), tmp_path)
    assert version != onnxruntime.__version__
    expected = in_ours(graph, inputs())
    assert outputs.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(outputs[name], values, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "fp16-mixed"])
def test_both_encoders_in_half(tiny: Preset, two_versions: Path, tmp_path: Path, precision: str) -> None:
    """The slide encoder's graph is the same in both."""
    write_graph(tile_graph(build_models(tiny, seed=0).tile, PRECISIONS[precision]), tmp_path / "tile.onnx")
    for graph, inputs in (
        (tmp_path / "tile.onnx", tiles()),
        (two_versions / "slide_encoder" / "2" / "model.onnx", slide(tiny.tile.embed_dim)),
    ):
        _, outputs = in_oldest(graph, inputs, tmp_path)
        for output, values in in_ours(graph, inputs).items():
            np.testing.assert_allclose(outputs[output], values, atol=5e-3)
