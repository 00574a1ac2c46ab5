"""Baseline: the same models in a local ONNX Runtime session, without a server."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from gigapath_contract.schema import Contract

from ..errors import ClientError
from .workloads import Workload

Baseline = Callable[[Workload, float], float]
"""Runs a workload for some seconds and returns its items per second."""


def local_sessions(repository: Path, contract: Contract) -> Baseline:
    """The baseline from a model repository's models, in the contract's version.

    An ensemble's steps run one after the other. Sessions are made at the first use of a model.

    Raises:
        ClientError: ONNX Runtime is not installed; later, that a model is not in the repository.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ClientError("--bare needs ONNX Runtime: pip install onnxruntime, or give a number") from error
    sessions: dict[str, ort.InferenceSession] = {}

    def session(model: str) -> ort.InferenceSession:
        if model not in sessions:
            path = repository / model / str(contract.version) / "model.onnx"
            if not path.is_file():
                raise ClientError(f"--bare: no {path}; give the served repository, or the rate as a number")
            sessions[model] = ort.InferenceSession(path, providers=ort.get_available_providers())
        return sessions[model]

    def run_once(workload: Workload) -> None:
        tensors = dict(workload.inputs)
        for step in workload.steps:
            run = session(step)
            inputs = {spec.name: tensors[spec.name] for spec in run.get_inputs()}
            names = [spec.name for spec in run.get_outputs()]
            tensors.update(zip(names, run.run(names, inputs), strict=True))

    def rate(workload: Workload, seconds: float) -> float:
        run_once(workload)
        began, count = time.perf_counter(), 0
        while not count or time.perf_counter() - began < seconds:
            run_once(workload)
            count += 1
        return workload.items * count / (time.perf_counter() - began)

    return rate
