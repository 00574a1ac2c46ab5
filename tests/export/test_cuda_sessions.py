"""Every served graph opens in ONNX Runtime's CUDA provider, without a GPU (`tests.support.cuda_stub`)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from export.graphs import slide_graph, write_graph
from export.precision import PRECISIONS, halve
from export.tile_graph import tile_graph
from gigapath_contract.schema import GRAPHS
from tests.support.cuda_stub import build_stub
from training.models.build import build_models
from training.models.presets import Preset

ROOT = Path(__file__).resolve().parents[2]
ONNX_RUNTIME = ROOT / "build" / "onnxruntime-gpu"
PROVIDER = ONNX_RUNTIME / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"
OPEN = """
import sys
import onnxruntime

providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
print(onnxruntime.InferenceSession(sys.argv[1], providers=providers).get_providers()[0])
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CUDA's libraries."""
    if shutil.which("cc") is None or shutil.which("nm") is None:
        pytest.skip("building the stub needs a C compiler: apt-get install gcc libc6-dev")
    return build_stub(PROVIDER, tmp_path_factory.mktemp("cuda"))


def opened(graph: Path, stub: Path) -> subprocess.CompletedProcess[str]:
    """A process that opens a session and prints its first provider."""
    environment = os.environ | {"PYTHONPATH": str(ONNX_RUNTIME), "LD_LIBRARY_PATH": str(stub)}
    return subprocess.run(
        [sys.executable, "-c", OPEN, graph], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("model", GRAPHS)
def test_a_float32_graph_opens(demo_repository: Path, stub: Path, model: str) -> None:
    done = opened(demo_repository / model / "1" / "model.onnx", stub)
    assert (done.returncode, done.stdout) == (0, "CUDAExecutionProvider\n"), done.stderr[-2000:]


def test_graphs_in_half_precision_open(tiny: Preset, stub: Path, tmp_path: Path) -> None:
    models = build_models(tiny)
    halve(models.slide_model.encoder)
    for name, graph in {
        "slide_encoder": slide_graph(models.slide_model),
        **{name: tile_graph(models.tile, PRECISIONS[name]) for name in ("fp16", "fp16-mixed")},
    }.items():
        write_graph(graph, tmp_path / f"{name}.onnx")
        done = opened(tmp_path / f"{name}.onnx", stub)
        assert (done.returncode, done.stdout) == (0, "CUDAExecutionProvider\n"), done.stderr[-2000:]


def test_a_constant_shared_by_subgraphs_ends_the_process(
    demo_repository: Path, stub: Path, tmp_path: Path
) -> None:
    """Why `export.ways` gives every subgraph its own; once this fails, it need not."""
    model = onnx.load(demo_repository / "slide_encoder" / "1" / "model.onnx")
    shared: dict[bytes, onnx.TensorProto] = {}
    branches = [one.g for node in model.graph.node for one in node.attribute if one.HasField("g")]
    for branch in branches:
        constants = [node for node in branch.node if node.op_type == "Constant"]
        names: dict[str, str] = {}
        for constant in constants:
            value = constant.attribute[0].t
            value.name = ""
            first = shared.setdefault(value.SerializeToString(), value)
            names[constant.output[0]] = first.name = first.name or constant.output[0]
            branch.node.remove(constant)
        for node in branch.node:
            node.input[:] = [names.get(name, name) for name in node.input]
    model.graph.initializer.extend(shared.values())
    onnx.save(model, tmp_path / "shared.onnx")
    assert opened(tmp_path / "shared.onnx", stub).returncode == -signal.SIGSEGV
