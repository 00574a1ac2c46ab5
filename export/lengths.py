"""Make a slide's graph refuse inputs of unequal or no length, which ONNX Runtime by itself broadcasts.

That a dimension of two inputs has one name, N, makes TensorRT compare their lengths, but not ONNX Runtime.
"""

from __future__ import annotations

import numpy as np
import onnx_ir


def require_one_length(model: onnx_ir.Model) -> None:
    """Make COORDS [N, 2] and KEEP [M, N] fail unless EMBEDDINGS [N, D] has as many rows, and at least one.

    COORDS is reshaped to [N of EMBEDDINGS, 2], for no tiles to a shape that doesn't exist, and KEEP to
    [M, N of EMBEDDINGS]. Shapes are made by arithmetic: from a Concat with one unknown length ONNX Runtime
    makes [-1, 2], which fits anything.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    if "COORDS" not in inputs:
        return
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
    _check(model, inputs["COORDS"], [count, some, rows, shape, chosen, checked])
    if "KEEP" in inputs:
        last = _constant(model, "length_last", [0, 1])
        size = onnx_ir.node("Shape", [inputs["KEEP"]])
        masks = onnx_ir.node("Mul", [size.outputs[0], unit])
        columns = onnx_ir.node("Mul", [count.outputs[0], last])
        shape = onnx_ir.node("Add", [masks.outputs[0], columns.outputs[0]])
        checked = onnx_ir.node("Reshape", [inputs["KEEP"], shape.outputs[0]], name="KEEP_for_all_EMBEDDINGS")
        _check(model, inputs["KEEP"], [size, masks, columns, shape, checked], after=count)


def _check(
    model: onnx_ir.Model, value: onnx_ir.Value, nodes: list[onnx_ir.Node], after: onnx_ir.Node | None = None
) -> None:
    """Put `nodes` first, or behind `after`, and use what the last of them returns in place of `value`."""
    uses = [use for use in value.uses() if use.node not in nodes]
    if after is None:
        model.graph.insert_before(model.graph[0], nodes)
    else:
        model.graph.insert_after(after, nodes)
    for use in uses:
        use.node.replace_input_with(use.idx, nodes[-1].outputs[0])


def _constant(model: onnx_ir.Model, name: str, values: list[int]) -> onnx_ir.Value:
    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.array(values, np.int64), name=name))
    model.graph.register_initializer(value)
    return value
