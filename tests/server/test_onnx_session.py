"""What a Triton configuration means to ONNX Runtime, by the rules of NVIDIA's C++ backend."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from server.assemble import TRITON
from server.backends.onnxruntime.onnx_session import (
    cuda_options,
    describe,
    open_session,
    session_options,
    why_no_cuda,
)

ROOT = Path(__file__).resolve().parents[2]


def config(**changes: Any) -> dict[str, Any]:
    tiles = {"name": "TILES", "data_type": "TYPE_UINT8", "dims": ["224", "224", "3"]}
    embeddings = {"name": "EMBEDDINGS", "data_type": "TYPE_FP32", "dims": ["128"]}
    return {"max_batch_size": 64, "input": [tiles], "output": [embeddings], **changes}


def parameters(**values: str) -> dict[str, Any]:
    return {"parameters": {key.replace("__", "."): {"string_value": value} for key, value in values.items()}}


def test_parameters_become_session_options() -> None:
    options = session_options(
        {
            "optimization": {"graph": {"level": 1}},
            **parameters(
                intra_op_thread_count="3",
                inter_op_thread_count="2",
                execution_mode="1",
                enable_mem_arena="0",
                enable_mem_pattern="0",
                session__intra_op__allow_spinning="0",
                contract="{}",
            ),
        }
    )
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 2
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_defaults_are_onnx_runtimes_own() -> None:
    options, defaults = session_options({}), ort.SessionOptions()
    for name in (
        "intra_op_num_threads",
        "inter_op_num_threads",
        "execution_mode",
        "graph_optimization_level",
    ):
        assert getattr(options, name) == getattr(defaults, name)
    assert options.enable_cpu_mem_arena
    assert options.enable_mem_pattern


def test_a_fitting_configuration_opens(toy_repository: Path) -> None:
    session = open_session(toy_repository / "tile_encoder/1/model.onnx", config())
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert describe(session) == f"ONNX Runtime {ort.__version__} on CPUExecutionProvider"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"output": [{"name": "EMBEDDINGS", "data_type": "TYPE_FP32", "dims": ["-1"]}]},
            r"\[-1, -1\] in the conf",
        ),
        ({"output": [{"name": "EMBEDDINGS", "data_type": "TYPE_FP16", "dims": ["128"]}]}, "but TYPE_FP16"),
        (
            {"output": [{"name": "EMBEDDINGS", "data_type": "TYPE_FP32", "dims": ["2", "64"]}]},
            r"\[-1, 2, 64\]",
        ),
        (
            {"output": [{"name": "SLIDE", "data_type": "TYPE_FP32", "dims": ["128"]}]},
            "has no SLIDE, only EMBEDD",
        ),
        ({"input": []}, r"the graph has inputs \['TILES'\]"),
    ],
)
def test_a_configuration_that_the_cpp_backend_would_refuse_is_refused(
    toy_repository: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        open_session(toy_repository / "tile_encoder/1/model.onnx", config(**changes))


def test_a_graph_without_a_batch_dimension_can_not_batch(toy_repository: Path) -> None:
    slide = {"name": "SLIDE", "data_type": "TYPE_FP32", "dims": ["128"]}
    coords = {"name": "COORDS", "data_type": "TYPE_INT64", "dims": ["2"]}
    embeddings = {"name": "EMBEDDINGS", "data_type": "TYPE_FP32", "dims": ["128"]}
    with pytest.raises(ValueError, match="SLIDE is"):
        open_session(
            toy_repository / "slide_encoder/1/model.onnx", config(input=[embeddings, coords], output=[slide])
        )


def test_float32_products_are_exact_unless_a_configuration_names_tf32() -> None:
    assert cuda_options({}, 1) == {"use_tf32": "0", "device_id": "1"}
    accelerator = {"name": "cuda", "parameters": {"use_tf32": "1", "gpu_mem_limit": "4096"}}
    tf32 = {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}}
    assert cuda_options(tf32, 0) == {"use_tf32": "1", "gpu_mem_limit": "4096", "device_id": "0"}


@pytest.mark.parametrize("model", ["tile_encoder", "slide_encoder", "slide_occlusion"])
def test_the_committed_configurations_turn_tf32_off(model: str) -> None:
    """For NVIDIA's C++ backend, which passes the parameters of the accelerator `cuda` on, and for ours."""
    text = (ROOT / "model_repository" / model / "config.pbtxt").read_text()
    parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
    (accelerator,) = parsed.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
    as_json = json_format.MessageToDict(parsed, preserving_proto_field_name=True)
    assert cuda_options(as_json, 0) == {"use_tf32": "0", "device_id": "0"}


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="has CUDA")
def test_a_gpu_that_can_not_be_used_is_refused_in_one_line(toy_repository: Path) -> None:
    sentence = "sees GPU 0 .*install onnxruntime-gpu; .*CUDA_VISIBLE_DEVICES"
    with pytest.raises(RuntimeError, match=sentence) as error:
        open_session(toy_repository / "tile_encoder/1/model.onnx", config(), device=0)
    assert "\n" not in str(error.value)


def test_the_library_that_is_missing_is_named(tmp_path: Path) -> None:
    """A library away from what it links to, as ONNX Runtime's provider is without CUDA."""
    library = tmp_path / "provider.so"
    shutil.copy(TRITON / "pytriton/tritonserver/backends/python/libtriton_python.so", library)
    assert why_no_cuda(library).startswith("libtritonserver-")
    assert "cannot open shared object file" in why_no_cuda(library)
