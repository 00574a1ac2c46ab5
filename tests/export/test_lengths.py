"""N is one dimension: a graph refuses a slide whose inputs differ in length, or that has no tile."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from server.backends.onnxruntime.onnx_session import GRAPH_LEVELS

LENGTHS = (0, 1, 2, 5)
Fail = onnxruntime.capi.onnxruntime_pybind11_state.Fail


def session_of(path: Path, level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4  # errors are expected here
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("level", GRAPH_LEVELS.values(), ids=lambda level: level.name)
@pytest.mark.parametrize("model", ["slide_encoder", "slide_occlusion"])
def test_only_equal_lengths_are_answered(
    tiny_repository: Path, model: str, level: onnxruntime.GraphOptimizationLevel
) -> None:
    """At every level of optimisation: a runtime may fold what holds the lengths together."""
    session = session_of(tiny_repository / model / "1" / "model.onnx", level)
    masked = model == "slide_occlusion"
    for lengths in itertools.product(LENGTHS, repeat=3 if masked else 2):
        inputs = {
            "EMBEDDINGS": np.zeros((lengths[0], 32), np.float32),
            "COORDS": np.zeros((lengths[1], 2), np.int64),
        }
        if masked:
            inputs["KEEP"] = np.ones((2, lengths[2]), np.bool_)
        if len(set(lengths)) == 1 and lengths[0]:
            assert session.run(["SLIDE"], inputs)[0].shape == ((2, 64) if masked else (64,))
        else:
            with pytest.raises(Fail, match="Reshape"):
                session.run(None, inputs)
