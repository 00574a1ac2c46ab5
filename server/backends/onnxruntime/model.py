"""Triton backend `onnxruntime`, in Python: stands in for NVIDIA's C++ one where that isn't at hand.

It serves the same `config.pbtxt` and reads the same parameters (`intra_op_thread_count`,
`inter_op_thread_count`, `execution_mode`, `enable_mem_arena`, `enable_mem_pattern`,
`memory.enable_memory_arena_shrinkage`, `optimization.graph.level`); any further `session.*` parameter goes to
ONNX Runtime as it is.

Tensors cross the border as DLPack: this server's own NumPy conversion predates NumPy 2 and corrupts values
without an error.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

# ONNX Runtime's errors have no common base; ValueError and RuntimeError come from its Python side.
RUN_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    ort_errors.EPFail,
    ValueError,
    RuntimeError,
)
GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
SET_DESTRUCTOR = ctypes.pythonapi.PyCapsule_SetDestructor
SET_DESTRUCTOR.argtypes = [ctypes.py_object, ctypes.c_void_p]
Arrays = dict[str, np.ndarray]


def session_options(config: dict[str, Any]) -> ort.SessionOptions:
    """The ONNX Runtime options that a Triton model configuration asks for."""
    values = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    options = ort.SessionOptions()
    options.graph_optimization_level = GRAPH_LEVELS[
        int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    ]
    options.intra_op_num_threads = int(values.get("intra_op_thread_count", 0))
    options.inter_op_num_threads = int(values.get("inter_op_thread_count", 0))
    if values.get("execution_mode", "0") == "1":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.enable_cpu_mem_arena = values.get("enable_mem_arena", "1") == "1"
    options.enable_mem_pattern = values.get("enable_mem_pattern", "1") == "1"
    for key, value in values.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    return options


def run_options(config: dict[str, Any]) -> ort.RunOptions:
    """Options of every run: which arenas give their memory back afterwards."""
    options = ort.RunOptions()
    key = "memory.enable_memory_arena_shrinkage"
    if key in config.get("parameters", {}):
        options.add_run_config_entry(key, config["parameters"][key]["string_value"])
    return options


def providers(kind: str, device: str) -> list[Any]:
    """CUDA where the runtime has it and the instance isn't bound to the CPU, then the CPU."""
    cuda = []
    if "CUDAExecutionProvider" in ort.get_available_providers() and kind != "CPU":
        cuda = [("CUDAExecutionProvider", {"device_id": device})]
    return [*cuda, "CPUExecutionProvider"]


class TritonPythonModel:
    """One ONNX Runtime session a model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph; what is raised here becomes Triton's reason for the failed load."""
        config = json.loads(args["model_config"])
        self.batching = config["max_batch_size"] > 0
        self.run_options = run_options(config)
        self.session = ort.InferenceSession(
            Path(pb_utils.get_model_dir()) / (config.get("default_model_filename") or "model.onnx"),
            session_options(config),
            providers=providers(args["model_instance_kind"], args["model_instance_device_id"]),
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests as one batch; where that fails, one by one, so that only the guilty one fails."""
        if self.batching and len(requests) > 1:
            try:
                return self._run_together(requests)
            except RUN_ERRORS as error:
                pb_utils.Logger.log_warn(f"a batch failed, running its requests alone: {error}")
        return [self._run_alone(request) for request in requests]

    def _run_together(self, requests: list[Any]) -> list[Any]:
        inputs = [_arrays(request) for request in requests]
        batch = {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}
        wanted = sorted({name for request in requests for name in request.requested_output_names()})
        outputs = dict(zip(wanted, self.session.run(wanted, batch, self.run_options), strict=True))
        responses, start = [], 0
        for request, one in zip(requests, inputs, strict=True):
            stop = start + len(next(iter(one.values())))
            names = request.requested_output_names()
            responses.append(_response({name: outputs[name][start:stop] for name in names}))
            start = stop
        return responses

    def _run_alone(self, request: Any) -> Any:
        names = list(request.requested_output_names())
        try:
            outputs = self.session.run(names, _arrays(request), self.run_options)
        except RUN_ERRORS as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return _response(dict(zip(names, outputs, strict=True)))


def _arrays(request: Any) -> Arrays:
    return {tensor.name(): np.from_dlpack(tensor) for tensor in request.inputs()}


def _response(arrays: Arrays) -> Any:
    return pb_utils.InferenceResponse([_tensor(name, array) for name, array in arrays.items()])


def _tensor(name: str, array: np.ndarray) -> Any:
    capsule = array.__dlpack__()
    # This server takes the tensor over under a capsule name that NumPy's destructor doesn't know: left in
    # place, the destructor would write a traceback to the log for every output.
    SET_DESTRUCTOR(capsule, None)
    return pb_utils.Tensor.from_dlpack(name, capsule)
