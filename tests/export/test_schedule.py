"""The order in which ONNX Runtime computes a slide's states."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from export.plain import one_way


def test_a_state_is_pooled_before_the_next_layer(demo_repository: Path, tmp_path: Path) -> None:
    """So that only one is in memory: each pooled state comes right after its layers' five attentions."""
    path = demo_repository / "slide_encoder" / "1" / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(path, options)
    width = session.get_inputs()[0].shape[1]
    tiles = 1100  # fewer are merged into one attention
    inputs = {"EMBEDDINGS": np.zeros((tiles, width), np.float32), "COORDS": np.zeros((tiles, 2), np.int64)}
    session.run(None, inputs)
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["name"].removesuffix("_kernel_time") for e in events if e["name"].endswith("_kernel_time")]

    nodes = one_way(onnx.load(path, load_external_data=False).graph)
    made_by = {output: node for node in nodes for output in node.output}
    stack = made_by["LAYERS"]
    while stack.op_type != "Concat":
        stack = made_by[stack.input[0]]
    attention = [ran.index(node.name) for node in nodes if node.op_type == "MultiHeadAttention"]
    pooled = [ran.index(made_by[name].name) for name in stack.input]
    layers = len(pooled) - 1
    assert [sum(i < at for i in attention) for at in pooled] == [5 * layer for layer in range(layers + 1)]
