"""The same work without a server: ONNX Runtime alone, on this machine, is the line to reach."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from gigapath_contract.schema import Contract

from ..errors import ClientError
from .workloads import Load


def bare_rate(repository: Path, contract: Contract) -> Callable[[Load, float], float]:
    """A function that runs a load for some seconds in bare sessions of a repository's models, items a second.

    The models are those of the contract's version; an ensemble's steps run one after the other.

    Raises:
        ClientError: ONNX Runtime or a model is not there.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ClientError(
            "a bare session needs ONNX Runtime: pip install onnxruntime, or give --bare a number"
        ) from error
    sessions: dict[str, ort.InferenceSession] = {}

    def session(model: str) -> ort.InferenceSession:
        if model not in sessions:
            path = repository / model / str(contract.version) / "model.onnx"
            if not path.is_file():
                raise ClientError(f"--bare: no {path}; give the served repository, or the rate as a number")
            sessions[model] = ort.InferenceSession(path, providers=ort.get_available_providers())
        return sessions[model]

    def once(load: Load) -> None:
        tensors = dict(load.inputs)
        for step in load.steps:
            run = session(step)
            inputs = {spec.name: tensors[spec.name] for spec in run.get_inputs()}
            names = [spec.name for spec in run.get_outputs()]
            tensors.update(zip(names, run.run(names, inputs), strict=True))

    def rate(load: Load, seconds: float) -> float:
        once(load)
        began, count = time.perf_counter(), 0
        while not count or time.perf_counter() - began < seconds:
            once(load)
            count += 1
        return load.items * count / (time.perf_counter() - began)

    return rate
