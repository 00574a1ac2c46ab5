"""Several ways through a slide encoder in one graph: merged attention for short slides, branches for others.

    short = If(the slide fits into the shortest segment): merged way, else: NaN
    outputs = If(short has a NaN and kept can't be): branches, else: If(the slide fits): short, else: kept way

So a short slide that merged attention can't compute (`export.merged_attention`) is computed by branches. The
kept way (`export.kept_branches`) is for longer slides under masks, unless segments are misaligned;
`slide_encoder` takes the branches there. The ways share their weights. TensorRT gets the branches alone
(`export.plain`).

Masks run in a loop, but for those of the branches: they are ordered by how many tiles they keep, and those of
like size are computed together, as many as keep activations small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from export.node_maker import NodeMaker

CHUNK_TOKENS = 8192
"""Tokens that are computed together: enough to fill a GPU, few enough for a CPU's caches."""
ALIKE = 0.85
"""The smallest mask of a chunk keeps at least this share of what its largest keeps ..."""
SLACK = 6.0
"""... or as many tiles fewer: small chunks cost more than small masks."""
LONGEST_SHAPE = 64
"""Elements of the largest index or shape: every subgraph has its own."""
BRANCHES = "branches_way"
"""Name of the `If` whose `then_branch` is the way that takes every slide."""


def by_length(
    branches: ir.Model,
    merged: ir.Model,
    shortest_segment: int,
    kept: ir.Model | None = None,
    longest_aligned: int | None = None,
) -> ir.Model:
    """`branches` with `merged` for slides of less than `shortest_segment` tiles, and `kept` for longer ones.

    All have the inputs and outputs of `slide_occlusion`, or of `slide_encoder`, and are used up. `kept` is
    for slides of less than `longest_aligned` tiles, None: of any number.
    """
    graph = branches.graph
    slow_nodes, slow = _taken_apart(graph)
    names = [str(value.name) for value in slow]
    for value in slow:
        value.name = f"branches.{value.name}"
    then, results = _another_way(merged, "merged", graph)
    nothing, passed, outer = NodeMaker(graph, "nothing"), NodeMaker(graph, "passed"), NodeMaker(graph, "ways")
    nan = ir.tensor(np.array([np.nan], np.float32))
    shapes = [nothing.constant([1] * _rank(value)) for value in slow]
    nans = [nothing("ConstantOfShape", [shape], value=nan) for shape in shapes]
    tiles = outer("Shape", [graph.inputs[1]], start=0, end=1)

    def fewer(count: int) -> ir.Value:
        return outer("Squeeze", [outer("Less", [tiles, outer.constant([count])])])

    short = fewer(shortest_segment)
    first = _if(short, _graph(then, results), _graph(nothing.nodes, nans), "merged_way")
    outer.nodes.append(first)
    for value, name in zip(first.outputs, names, strict=True):
        value.name = f"merged_way.{name}"
    # Of SLIDE or of all LAYERS.
    slow_way = outer("Cast", [outer("IsNaN", [first.outputs[0]])], to=ir.DataType.FLOAT)
    slow_way = outer("Greater", [outer("ReduceMax", [slow_way], keepdims=0), outer.constant(0.5, np.float32)])
    same = [passed("Identity", [value]) for value in first.outputs]
    otherwise = _graph(passed.nodes, same)
    if kept is not None:
        nodes, values = _another_way(kept, "kept", graph)
        other = _if(short, otherwise, _graph(nodes, values), "kept_way")
        for value, name in zip(other.outputs, names, strict=True):
            value.name = f"kept_way.{name}"
        otherwise = _graph([other], other.outputs)
        served = outer("Not", [short])
        if longest_aligned is not None:
            served = outer("And", [served, fewer(longest_aligned)])
        slow_way = outer("And", [slow_way, outer("Not", [served])])
    chosen = _if(slow_way, _graph(slow_nodes, slow), otherwise, BRANCHES)
    for value, like, name in zip(chosen.outputs, slow, names, strict=True):
        value.name, value.type, value.shape = name, like.type, like.shape
    graph.extend([*outer.nodes, chosen])
    graph.outputs.extend(chosen.outputs)
    passes.DeduplicateInitializersPass(size_limit=1 << 62)(branches)
    _repeat_indices(graph)
    passes.NameFixPass()(branches)
    return branches


def _repeat_indices(graph: ir.Graph) -> None:
    """Give every subgraph its own indices, shapes and single numbers; weights stay shared.

    ONNX Runtime keeps an initialiser of the outer graph in one memory. An index that one subgraph needs on
    the CPU and another on the GPU was in the GPU's, and opening a session (1.31) ended the process.
    """
    for constant in list(graph.initializers.values()):
        assert constant.const_value is not None
        longest = 1 if constant.const_value.dtype.is_floating_point() else LONGEST_SHAPE
        if constant.const_value.size > longest:
            continue
        copies: dict[ir.Graph, ir.Value] = {}
        for node, index in list(constant.uses()):
            inner = node.graph
            assert isinstance(inner, ir.Graph)
            if inner is graph:
                continue
            if inner not in copies:
                copy = ir.node("Constant", [], {"value": constant.const_value})
                copies[inner], copies[inner].name = copy.outputs[0], f"{constant.name}.{inner.name}"
                inner.insert_before(inner[0], copy)
            node.replace_input_with(index, copies[inner])
        if not constant.uses():
            del graph.initializers[str(constant.name)]


def _another_way(model: ir.Model, name: str, graph: ir.Graph) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes and outputs of `model`, masks in a loop, on the inputs of `graph`, which gets the weights."""
    way, inputs = model.graph, {str(value.name): value for value in graph.inputs}
    for value in way.inputs:
        ir.convenience.replace_all_uses_with(value, inputs[str(value.name)])
    for value in (*list(way.initializers.values()), *(output for node in way for output in node.outputs)):
        value.name = f"{name}.{value.name}"
    for weight in list(way.initializers.values()):
        del way.initializers[str(weight.name)]
        graph.register_initializer(weight)
    nodes, results = _taken_apart(way)
    return _loop(nodes, results, inputs["KEEP"], graph, name) if "KEEP" in inputs else (nodes, results)


def _taken_apart(graph: ir.Graph) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes and outputs of `graph`, which is left without."""
    nodes, outputs = list(graph), list(graph.outputs)
    graph.outputs.clear()
    graph.remove(nodes)
    return nodes, outputs


def _graph(
    nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], inputs: Sequence[ir.Value] = ()
) -> ir.Graph:
    return ir.Graph(list(inputs), list(outputs), nodes=list(nodes), name=f"{outputs[0].name}.graph")


def _if(condition: ir.Value, then: ir.Graph, otherwise: ir.Graph, name: str) -> ir.Node:
    return ir.node(
        "If",
        [condition],
        {"then_branch": then, "else_branch": otherwise},
        num_outputs=len(then.outputs),
        name=name,
    )


def _loop(
    nodes: list[ir.Node], results: list[ir.Value], keep: ir.Value, graph: ir.Graph, way: str
) -> tuple[list[ir.Node], list[ir.Value]]:
    """`nodes` that compute `results` [M, ...] for the masks `keep` [M, N], as a loop over masks of like size.

    What does not depend on the masks is computed once, before the loop.
    """
    before, step, after = (NodeMaker(graph, f"{way}.{part}") for part in ("before", "step", "after"))
    masks = before("Shape", [keep], start=0, end=1)
    shown = before("Cast", [keep], to=ir.DataType.FLOAT)
    sizes = before("ReduceSum", [shown, before.constant([1])], keepdims=0)
    sizes, order = before.sort(sizes, masks, largest=1)
    ordered = before("Gather", [keep, order], axis=0)
    widths = [_width(value) for value in results]
    empty = [before("ConstantOfShape", [before.constant([0, width])]) for width in widths]

    number, going, start = (
        _value(f"{way}.step.{name}", kind, shape)
        for name, kind, shape in (
            ("number", ir.DataType.INT64, []),
            ("going", ir.DataType.BOOL, []),
            ("start", ir.DataType.INT64, [1]),
        )
    )
    done = [
        _value(f"{way}.step.done.{i}", ir.DataType.FLOAT, [None, width]) for i, width in enumerate(widths)
    ]
    largest = step("Gather", [sizes, start])
    tokens = step("Add", [step("Cast", [largest], to=ir.DataType.INT64), step.constant([1])])
    count = step("Max", [step("Div", [step.constant([CHUNK_TOKENS]), tokens]), step.constant([1])])
    least = step("Mul", [largest, step.constant([ALIKE], np.float32)])
    least = step("Min", [least, step("Sub", [largest, step.constant([SLACK], np.float32)])])
    alike = step("Cast", [step("GreaterOrEqual", [sizes, least])], to=ir.DataType.INT64)
    alike = step("ReduceSum", [alike, step.constant([0])], keepdims=1)
    stop = step("Min", [step("Add", [start, count]), alike])
    chunk = step("Slice", [ordered, start, stop, step.constant([0])])

    of_masks: set[ir.Value | None] = {keep}
    for node in nodes:
        if not of_masks.isdisjoint(node.inputs):
            step.nodes.append(node)
            of_masks.update(node.outputs)
            for index, value in enumerate(node.inputs):
                if value is keep:
                    node.replace_input_with(index, chunk)
        else:
            before.nodes.append(node)
    total = [step("Concat", [old, new], axis=0) for old, new in zip(done, results, strict=True)]
    more = step("Squeeze", [step("Less", [stop, masks])])
    next_start = step("Identity", [stop])
    body = _graph(step.nodes, [more, next_start, *total], [number, going, start, *done])

    first = [None, before.constant(True, np.bool_), before.constant([0]), *empty]
    loop = ir.node("Loop", first, {"body": body}, num_outputs=1 + len(results), name=f"{way}.masks")
    for index, value in enumerate(loop.outputs):
        value.name = f"{way}.masks.{index}"
    _, back = after.sort(order, masks, largest=0)
    in_order = [after("Gather", [value, back], axis=0) for value in loop.outputs[1:]]
    return [*before.nodes, loop, *after.nodes], in_order


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _width(value: ir.Value) -> int:
    assert value.shape is not None
    width = value.shape[1]
    assert isinstance(width, int)
    return width


def _value(name: str, kind: ir.DataType, shape: Sequence[int | None]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
