"""Make a slide's graph refuse inputs of unequal or no length, which ONNX Runtime by itself broadcasts.

That a dimension of two inputs has one name, N, makes TensorRT compare their lengths, but not ONNX Runtime.
"""

from __future__ import annotations

import numpy as np
import onnx_ir


def require_one_length(model: onnx_ir.Model) -> None:
    """Make COORDS [N, 2] fail unless EMBEDDINGS [N, D] has as many rows, and at least one.

    COORDS is reshaped to [N of EMBEDDINGS, 2], for no tiles to a shape that doesn't exist. The shape is made
    by arithmetic: from a Concat with one unknown length ONNX Runtime makes [-1, 2], which fits anything.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    if "COORDS" not in inputs:
        return
    uses = tuple(inputs["COORDS"].uses())
    zero, unit, pair, impossible = (
        _constant(model, f"length_{name}", values)
        for name, values in (("zero", [0]), ("unit", [1, 0]), ("pair", [0, 2]), ("impossible", [-2, -2]))
    )
    count = onnx_ir.node("Shape", [inputs["EMBEDDINGS"]], {"start": 0, "end": 1})
    some = onnx_ir.node("Greater", [count.outputs[0], zero])
    rows = onnx_ir.node("Mul", [count.outputs[0], unit])
    shape = onnx_ir.node("Add", [rows.outputs[0], pair])
    chosen = onnx_ir.node("Where", [some.outputs[0], shape.outputs[0], impossible])
    # An error of ONNX Runtime names the node that failed.
    checked = onnx_ir.node(
        "Reshape", [inputs["COORDS"], chosen.outputs[0]], name="as_many_COORDS_as_EMBEDDINGS"
    )
    model.graph.insert_before(model.graph[0], [count, some, rows, shape, chosen, checked])
    for use in uses:
        use.node.replace_input_with(use.idx, checked.outputs[0])


def _constant(model: onnx_ir.Model, name: str, values: list[int]) -> onnx_ir.Value:
    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.array(values, np.int64), name=name))
    model.graph.register_initializer(value)
    return value
