"""Every operator of the served graphs has a kernel of ONNX Runtime's CUDA provider for its types."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from gigapath_contract.schema import GRAPHS
from tests.support.cuda_kernels import Use, uses_of, without_kernel


@pytest.mark.parametrize("model", GRAPHS)
def test_no_operator_falls_back_to_the_cpu(demo_repository: Path, model: str) -> None:
    """Graphs in half precision have the same operators; those of real exports are in test_export.py."""
    uses = uses_of(demo_repository / model / "1" / "model.onnx")
    assert Use("MultiHeadAttention", "float") in uses
    in_half = {use._replace(kind="float16") for use in uses if use.kind == "float"}
    assert not without_kernel(uses | in_half)


def test_the_types_of_a_subgraph_are_seen(tmp_path: Path) -> None:
    """A selection of booleans, and an index that is no integer, in a branch."""
    nodes = [
        helper.make_node("Where", ["keep", "keep", "keep"], ["chosen"]),
        helper.make_node("Cast", ["chosen"], ["index"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["keep", "index"], ["found"]),
    ]
    branch = helper.make_graph(
        nodes, "branch", [], [helper.make_tensor_value_info("found", TensorProto.BOOL, None)]
    )
    keep = helper.make_tensor_value_info("keep", TensorProto.BOOL, [4])
    found = helper.make_tensor_value_info("out", TensorProto.BOOL, [4])
    choice = helper.make_node("If", ["keep"], ["out"], then_branch=branch, else_branch=branch)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([choice], "graph", [keep], [found])
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "model.onnx")
    assert without_kernel(uses_of(tmp_path / "model.onnx")) == {
        Use("Where", "bool"),
        Use("Gather", "bool", "float"),
    }
