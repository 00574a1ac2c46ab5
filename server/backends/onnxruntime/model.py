"""Triton backend `onnxruntime` in Python: replaces NVIDIA's C++ backend where that is not available.

Tensors are exchanged as DLPack: this server's own NumPy conversion predates NumPy 2 and corrupts values
without an error.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from onnx_session import describe, open_session, run_options
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from request_limits import check_lengths, check_limits, read_limits

# ONNX Runtime's errors have no base of their own; ValueError and RuntimeError come from its Python side.
BAD_INPUT = (ort_errors.InvalidArgument, ValueError)
RUN_ERRORS = (
    *BAD_INPUT,
    ort_errors.Fail,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    ort_errors.EPFail,
    RuntimeError,
)
SET_DESTRUCTOR = ctypes.pythonapi.PyCapsule_SetDestructor
SET_DESTRUCTOR.argtypes = [ctypes.py_object, ctypes.c_void_p]


class TritonPythonModel:
    """One ONNX Runtime session per model instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph; the message of an error becomes Triton's reason for the failed load."""
        config = json.loads(args["model_config"])
        self.batching = config["max_batch_size"] > 0
        self.run_options = run_options(config)
        self.limits = read_limits(config)
        self.session = open_session(
            Path(pb_utils.get_model_dir()) / (config["default_model_filename"] or "model.onnx"),
            config,
            None if args["model_instance_kind"] == "CPU" else int(args["model_instance_device_id"]),
        )
        self.shapes = {node.name: node.shape for node in self.session.get_inputs()}
        pb_utils.Logger.log_info(f"{args['model_name']}: {describe(self.session)}")
        python = shutil.which("python3") or "python3"  # sys.executable is the stub here
        beat = Path(__file__).with_name("heartbeat.py")
        self.heartbeat = subprocess.Popen([python, "-I", "-S", beat, str(os.getpid()), args["model_name"]])

    def finalize(self) -> None:
        """End the heartbeat, which takes any later end of this process for its death."""
        self.heartbeat.kill()
        self.heartbeat.wait()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests as one batch; if that fails, one by one, so that only the faulty request fails."""
        if self.batching and len(requests) > 1:
            try:
                return self._run_together(requests)
            except RUN_ERRORS as error:
                pb_utils.Logger.log_warn(f"a batch failed, its requests are run one by one: {error}")
        return [self._run_alone(request) for request in requests]

    def _run_together(self, requests: list[Any]) -> list[Any]:
        inputs = [self._inputs(request) for request in requests]
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
            outputs = self.session.run(names, self._inputs(request), self.run_options)
        except RUN_ERRORS as error:
            code = (
                pb_utils.TritonError.INVALID_ARG
                if isinstance(error, BAD_INPUT)
                else pb_utils.TritonError.INTERNAL
            )
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
        return _response(dict(zip(names, outputs, strict=True)))

    def _inputs(self, request: Any) -> dict[str, np.ndarray]:
        """The request's tensors by name; ValueError where they are not to be run."""
        arrays = {tensor.name(): np.from_dlpack(tensor) for tensor in request.inputs()}
        check_lengths(arrays, self.shapes)
        if self.limits is not None:
            check_limits(arrays, self.limits)
        return arrays


def _response(arrays: dict[str, np.ndarray]) -> Any:
    return pb_utils.InferenceResponse([_tensor(name, array) for name, array in arrays.items()])


def _tensor(name: str, array: np.ndarray) -> Any:
    if array.size == 0:  # refused as DLPack; without values there is nothing to corrupt
        return pb_utils.Tensor(name, array)
    capsule = array.__dlpack__()
    # This server takes the tensor over under a capsule name that NumPy's destructor doesn't know: left in
    # place, the destructor would write a traceback to the log for every output.
    SET_DESTRUCTOR(capsule, None)
    return pb_utils.Tensor.from_dlpack(name, capsule)
