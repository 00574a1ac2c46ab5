"""Force per-layer pooling order so that runtimes free hidden states early.

ONNX Runtime sorts nodes depth first from the outputs, so it would pool the hidden states of all layers at the
end and keep them until then: 13 x 3 kB per tile for `gigapath`, a quarter of the peak. Runtimes may reorder
nodes except along dependencies, so one is added.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

FIRST_NORM_BIAS = "encoder.layers.{}.self_attn_layer_norm.bias"


def pool_before_next_layer(model: onnx_ir.Model) -> None:
    """Make each block of a slide encoder that returns LAYERS depend on the pooling of its own input.

    0 times the pooled state is added to the bias of the block's first norm: no value changes if it is finite.
    """
    layers = next((value for value in model.graph.outputs if value.name == "LAYERS"), None)
    if layers is None:
        return
    stack = _producer(layers)
    while stack.op_type != "Concat":
        stack = _producer(stack.inputs[0])
    norms = {
        node.inputs[2].name or "": node
        for node in model.graph
        if node.op_type == "LayerNormalization" and node.inputs[2] is not None
    }
    constants = {}
    for name, array in (("pooled_axes", np.array([0, 1, 2])), ("nothing", np.array(0, np.float32))):
        constants[name] = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name))
        model.graph.register_initializer(constants[name])
    for layer, pooled in enumerate(stack.inputs[:-1]):
        (norm,) = (node for name, node in norms.items() if name.endswith(FIRST_NORM_BIAS.format(layer)))
        total = onnx_ir.node("ReduceSum", [pooled, constants["pooled_axes"]], {"keepdims": 0})
        nothing = onnx_ir.node("Mul", [total.outputs[0], constants["nothing"]])
        bias = onnx_ir.node("Add", [norm.inputs[2], nothing.outputs[0]])
        model.graph.insert_before(norm, [total, nothing, bias])
        norm.replace_input_with(2, bias.outputs[0])
    model.graph.sort()


def _producer(value: onnx_ir.Value | None) -> onnx_ir.Node:
    node = None if value is None else value.producer()
    assert node is not None
    return node
