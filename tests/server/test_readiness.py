"""READY is not enough: with a model that loads and doesn't answer well, the server hasn't started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from server.errors import ServerError
from server.local import run_triton


def graph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(
        [*nodes, helper.make_node("ReduceMax", ["x"], ["SLIDE"], axes=[0], keepdims=0)],
        "slide_encoder",
        [
            helper.make_tensor_value_info("EMBEDDINGS", TensorProto.FLOAT, ["N", 128]),
            helper.make_tensor_value_info("COORDS", TensorProto.INT64, ["N", 2]),
        ],
        [
            helper.make_tensor_value_info("SLIDE", TensorProto.FLOAT, [128]),
            helper.make_tensor_value_info("LOGITS", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("LAYERS", TensorProto.FLOAT, [2, 2, 128]),
        ],
    )


COMMON = [
    helper.make_node("Constant", [], ["LOGITS"], value_floats=[0.0, 0.0]),
    helper.make_node("Constant", [], ["shape"], value_ints=[2, 2, 128]),
    helper.make_node("ConstantOfShape", ["shape"], ["LAYERS"]),
]


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        (
            [
                helper.make_node("Constant", [], ["wanted"], value_ints=[3, 128]),
                helper.make_node("Reshape", ["EMBEDDINGS", "wanted"], ["x"]),
            ],
            "model 'slide_encoder' is loaded but does not answer: .*Reshape",
        ),
        ([helper.make_node("Log", ["EMBEDDINGS"], ["x"])], "its output SLIDE has values that are not finite"),
    ],
)
def test_a_ready_model_that_answers_badly_is_named(
    toy_copy: Path, tmp_path: Path, save: Callable[..., None], nodes: list[onnx.NodeProto], sentence: str
) -> None:
    save(toy_copy, "slide_encoder", graph(*COMMON, *nodes))
    with pytest.raises(ServerError, match=sentence), run_triton(toy_copy, log=tmp_path / "log"):
        pass
