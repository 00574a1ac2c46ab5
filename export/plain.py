"""A graph without the operators that are ONNX Runtime's alone, for TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from onnx import NodeProto, helper

from export.ways import BRANCHES


def expanded(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` without `SkipLayerNormalization`, `QuickGelu` and biases of `MultiHeadAttention`.

    `MultiHeadAttention` itself stays: TensorRT parses it into its own attention, if it adds no biases. Of the
    two ways of `export.ways` the branches are left, whose shapes depend on those of the inputs alone.
    """
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.node[:]
    for node in one_way(model.graph):
        plain.graph.node.extend(_EXPANSIONS.get(node.op_type, _unchanged)(node))
    used = {name for node in plain.graph.node for name in node.input}
    weights = [weight for weight in plain.graph.initializer if weight.name in used]
    del plain.graph.initializer[:]
    plain.graph.initializer.extend(weights)
    return plain


def one_way(graph: onnx.GraphProto) -> list[NodeProto]:
    """The nodes of `graph`, or of its way by branches with what that needs, with the graph's own outputs."""
    chosen = next((node for node in graph.node if node.name == BRANCHES), None)
    if chosen is None:
        return list(graph.node)
    way = _attributes(chosen)["then_branch"]
    names = {inner.name: outer for inner, outer in zip(way.output, chosen.output, strict=True)}
    nodes = []
    for node in way.node:
        renamed = NodeProto()
        renamed.CopyFrom(node)
        for tensors in (renamed.input, renamed.output):
            tensors[:] = [names.get(name, name) for name in tensors]
        nodes.append(renamed)
    needed = {name for node in nodes for name in node.input}
    before: list[NodeProto] = []
    for node in reversed(graph.node):
        if node.name != BRANCHES and not needed.isdisjoint(node.output):
            before.insert(0, node)
            needed.update(node.input)
    return [*before, *nodes]


def _unchanged(node: NodeProto) -> Iterator[NodeProto]:
    yield node


def _skip_norm(node: NodeProto) -> Iterator[NodeProto]:
    x, residual, weight, norm_bias, bias = node.input
    normed, *_, total = node.output
    yield _node("Add", [x, bias], f"{node.name}.biased")
    yield _node("Add", [f"{node.name}.biased", residual], total)
    yield _node(
        "LayerNormalization",
        [total, weight, norm_bias],
        normed,
        axis=-1,
        epsilon=_attributes(node)["epsilon"],
    )


def _quick_gelu(node: NodeProto) -> Iterator[NodeProto]:
    """x * sigmoid(alpha * x), where alpha is 1."""
    assert _attributes(node)["alpha"] == 1
    yield _node("Sigmoid", node.input, f"{node.name}.sigmoid")
    yield _node("Mul", [*node.input, f"{node.name}.sigmoid"], node.output[0])


def _attention(node: NodeProto) -> Iterator[NodeProto]:
    if len(node.input) < 4:
        yield node
        return
    *inputs, bias = node.input
    biases, biased = ([f"{node.name}.{part}.{what}" for part in "qkv"] for what in ("bias", "biased"))
    yield helper.make_node("Split", [bias], biases, name=f"{node.name}.biases", num_outputs=3, axis=0)
    for pair, total in zip(zip(inputs, biases, strict=True), biased, strict=True):
        yield _node("Add", pair, total)
    yield helper.make_node(
        node.op_type, biased, node.output, name=node.name, domain=node.domain, **_attributes(node)
    )


_EXPANSIONS = {
    "SkipLayerNormalization": _skip_norm,
    "QuickGelu": _quick_gelu,
    "MultiHeadAttention": _attention,
}


def _node(operator: str, inputs: Any, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, [output], name=output, **attributes)


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
