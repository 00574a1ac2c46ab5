"""A toy repository for tests of the server itself: the four models' names and shapes, a few nodes each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from server.local import RunningServer, run_triton

ROOT = Path(__file__).resolve().parents[2]
DIMS = {"EMBEDDINGS": [128], "SLIDE": [128], "LOGITS": [2], "LAYERS": [2, 2, 128]}
Arrays = dict[str, np.ndarray]
Infer = Callable[..., Arrays]


@pytest.fixture(scope="session")
def toy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only. `tile_encoder` keeps its weights in an external file and fails where a tile's first value
    is 200 or more; it waits 200 ms for requests to join."""
    repository = tmp_path_factory.mktemp("toy") / "repository"
    shutil.copytree(
        ROOT / "model_repository", repository, ignore=shutil.ignore_patterns("[0-9]*", "onnxruntime.pbtxt")
    )
    save_model(repository, "tile_encoder", tile_graph(), external=True)
    save_model(repository, "slide_encoder", slide_graph())
    save_model(repository, "slide_occlusion", occlusion_graph())
    (repository / "slide_pipeline" / "1").mkdir()
    for model in repository.iterdir():
        config = text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        for tensor in (*config.input, *config.output):
            if tensor.name in DIMS:
                tensor.dims[-len(DIMS[tensor.name]) :] = DIMS[tensor.name]
        if model.name == "tile_encoder":
            config.dynamic_batching.max_queue_delay_microseconds = 200_000
        (model / "configs").mkdir(exist_ok=True)
        (model / "configs" / "onnxruntime.pbtxt").write_text(text_format.MessageToString(config))
    return repository


@pytest.fixture
def toy_copy(toy_repository: Path, tmp_path: Path) -> Path:
    """A copy of the toy repository, to break."""
    return Path(shutil.copytree(toy_repository, tmp_path / "repository"))


@pytest.fixture(scope="session")
def toy_server(toy_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real Triton over the toy repository."""
    with run_triton(toy_repository, log=tmp_path_factory.mktemp("log") / "toy.log") as server:
        yield server


@pytest.fixture(scope="session")
def infer() -> Infer:
    """`infer(url, model, **inputs)` sends one request and returns every output."""

    def send(url: str, model: str, **inputs: np.ndarray) -> Arrays:
        with triton.InferenceServerClient(url) as client:
            return outputs(client.infer(model, tensors(inputs)))

    return send


@pytest.fixture(scope="session")
def infer_later() -> Callable[..., Future[Arrays]]:
    """`infer_later(client, model, **inputs)`: without waiting; a small request may overtake a large one."""

    def send(client: triton.InferenceServerClient, model: str, **inputs: np.ndarray) -> Future[Arrays]:
        answer: Future[Arrays] = Future()

        def take(result: triton.InferResult, error: InferenceServerException | None) -> None:
            answer.set_exception(error) if error else answer.set_result(outputs(result))

        client.async_infer(model, tensors(inputs), take)
        return answer

    return send


def tensors(inputs: Arrays) -> list[triton.InferInput]:
    return [
        triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)).set_data_from_numpy(array)
        for name, array in inputs.items()
    ]


def outputs(result: triton.InferResult) -> Arrays:
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


@pytest.fixture(scope="session")
def save() -> Callable[..., None]:
    """`save(repository, model, graph)` replaces a model's graph."""
    return save_model


def save_model(repository: Path, name: str, graph: onnx.GraphProto, external: bool = False) -> None:
    folder = repository / name / "1"
    folder.mkdir(exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx", save_as_external_data=external, location="model.onnx.data")


def tile_graph() -> onnx.GraphProto:
    rng = np.random.default_rng(0)
    return helper.make_graph(
        [
            helper.make_node("Cast", ["TILES"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[1, 2], keepdims=0),
            helper.make_node("MatMul", ["mean", "weights"], ["projected"]),
            helper.make_node("Slice", ["TILES", "zeros", "ones", "axes"], ["corner"]),
            helper.make_node("Squeeze", ["corner", "axes"], ["first"]),
            helper.make_node("Cast", ["first"], ["row"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "row"], ["looked_up"]),
            helper.make_node("Add", ["projected", "looked_up"], ["EMBEDDINGS"]),
        ],
        "tile_encoder",
        [helper.make_tensor_value_info("TILES", TensorProto.UINT8, ["B", 224, 224, 3])],
        [helper.make_tensor_value_info("EMBEDDINGS", TensorProto.FLOAT, ["B", 128])],
        [
            constant("weights", rng.normal(size=(3, 128)).astype(np.float32)),
            constant("table", rng.normal(size=(200, 128)).astype(np.float32)),
            constant("zeros", np.zeros(3, np.int64)),
            constant("ones", np.ones(3, np.int64)),
            constant("axes", np.array([1, 2, 3])),
        ],
    )


def slide_graph() -> onnx.GraphProto:
    return helper.make_graph(
        [
            helper.make_node("ReduceMean", ["EMBEDDINGS"], ["SLIDE"], axes=[0], keepdims=0),
            helper.make_node("Cast", ["COORDS"], ["positions"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["positions"], ["LOGITS"], axes=[0], keepdims=0),
            helper.make_node("Concat", ["SLIDE"] * 4, ["copies"], axis=0),
            helper.make_node("Reshape", ["copies", "shape"], ["LAYERS"]),
        ],
        "slide_encoder",
        [
            helper.make_tensor_value_info("EMBEDDINGS", TensorProto.FLOAT, ["N", 128]),
            helper.make_tensor_value_info("COORDS", TensorProto.INT64, ["N", 2]),
        ],
        [
            helper.make_tensor_value_info("LAYERS", TensorProto.FLOAT, [2, 2, 128]),
            helper.make_tensor_value_info("SLIDE", TensorProto.FLOAT, [128]),
            helper.make_tensor_value_info("LOGITS", TensorProto.FLOAT, [2]),
        ],
        [constant("shape", np.array([2, 2, 128]))],
    )


def occlusion_graph() -> onnx.GraphProto:
    return helper.make_graph(
        [
            helper.make_node("Cast", ["KEEP"], ["kept"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["kept", "EMBEDDINGS"], ["SLIDE"]),
            helper.make_node("Cast", ["COORDS"], ["positions"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["kept", "positions"], ["LOGITS"]),
        ],
        "slide_occlusion",
        [
            helper.make_tensor_value_info("EMBEDDINGS", TensorProto.FLOAT, ["N", 128]),
            helper.make_tensor_value_info("COORDS", TensorProto.INT64, ["N", 2]),
            helper.make_tensor_value_info("KEEP", TensorProto.BOOL, ["M", "N"]),
        ],
        [
            helper.make_tensor_value_info("LOGITS", TensorProto.FLOAT, ["M", 2]),
            helper.make_tensor_value_info("SLIDE", TensorProto.FLOAT, ["M", 128]),
        ],
    )


def constant(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(value, name)
