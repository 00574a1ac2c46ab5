"""Make a slide's graph refuse inputs of unequal or no length, which ONNX Runtime by itself broadcasts.

That a dimension of two inputs has one name, N, makes TensorRT compare their lengths, but not ONNX Runtime.
"""

from __future__ import annotations

import onnx_ir

from export.node_maker import NodeMaker


def require_one_length(model: onnx_ir.Model) -> None:
    """Make COORDS [N, 2] and KEEP [M, N] fail unless EMBEDDINGS [N, D] has as many rows, and at least one.

    COORDS is reshaped to [N of EMBEDDINGS, 2], for no tiles to a shape that doesn't exist, and KEEP to
    [M, N of EMBEDDINGS]. Shapes are made by arithmetic: from a Concat with one unknown length ONNX Runtime
    makes [-1, 2], which fits anything.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    if "COORDS" not in inputs:
        return
    uses = {name: tuple(value.uses()) for name, value in inputs.items()}
    make = NodeMaker(model.graph, "lengths")
    unit = make.constant([1, 0])
    count = make("Shape", [inputs["EMBEDDINGS"]], start=0, end=1)
    some = make("Greater", [count, make.constant([0])])
    shape = make("Add", [make("Mul", [count, unit]), make.constant([0, 2])])
    shape = make("Where", [some, shape, make.constant([-2, -2])])
    checked = {"COORDS": make("Reshape", [inputs["COORDS"], shape])}
    if "KEEP" in inputs:
        masks = make("Mul", [make("Shape", [inputs["KEEP"]]), unit])
        shape = make("Add", [masks, make("Mul", [count, make.constant([0, 1])])])
        checked["KEEP"] = make("Reshape", [inputs["KEEP"], shape])
    model.graph.insert_before(model.graph[0], make.nodes)
    for name, value in checked.items():
        node = value.producer()
        assert node is not None
        node.name = f"as_many_{name}_as_EMBEDDINGS"  # an error of ONNX Runtime names the node that failed
        for use in uses[name]:
            use.node.replace_input_with(use.idx, value)
