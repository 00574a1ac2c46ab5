"""Two ways through a slide encoder in one graph: merged attention for short slides, branches for the others.

    fast = If(the slide fits into the shortest segment): merged way, else: NaN
    outputs = If(fast has a NaN): branches, else: fast

So a slide that merged attention can't compute (`export.merged_attention`) is computed by branches as well.
Both ways share their weights. TensorRT gets the branches alone (`export.plain`).

The merged way of `slide_occlusion` runs in a loop: masks are ordered by how many tiles they keep, and those
of like size are computed together, as many as keep activations small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from export.node_maker import NodeMaker

CHUNK_TOKENS = 8192
"""Tokens that are computed together: enough to fill a GPU, few enough for a CPU's caches."""
ALIKE = 0.75
"""The smallest mask of a chunk keeps at least this share of what its largest keeps ..."""
SLACK = 16.0
"""... or as many tiles fewer: small chunks cost more than small masks."""
BRANCHES = "branches_way"
"""Name of the `If` whose `then_branch` is the way that takes every slide."""


def by_length(branches: ir.Model, merged: ir.Model, shortest_segment: int) -> ir.Model:
    """`branches` with `merged` for slides of less than `shortest_segment` tiles, masks in a loop.

    Both have the inputs and outputs of `slide_occlusion`, and are used up.
    """
    graph, fast = branches.graph, merged.graph
    inputs = {str(value.name): value for value in graph.inputs}
    names = [str(value.name) for value in graph.outputs]
    for value in fast.inputs:
        ir.convenience.replace_all_uses_with(value, inputs[str(value.name)])
    for value in (*list(fast.initializers.values()), *(output for node in fast for output in node.outputs)):
        value.name = f"merged.{value.name}"
    for weight in list(fast.initializers.values()):
        del fast.initializers[str(weight.name)]
        graph.register_initializer(weight)

    slow_nodes, slow = _taken_apart(graph)
    fast_nodes, masked = _taken_apart(fast)
    for value in slow:
        value.name = f"branches.{value.name}"
    then, results = _loop(fast_nodes, masked, inputs["KEEP"], graph)
    nothing, passed, outer = NodeMaker(graph, "nothing"), NodeMaker(graph, "passed"), NodeMaker(graph, "ways")
    nan = ir.tensor(np.array([np.nan], np.float32))
    nans = [nothing("ConstantOfShape", [nothing.constant([1, 1])], value=nan) for _ in results]
    tiles = outer("Shape", [inputs["COORDS"]], start=0, end=1)
    short = outer("Squeeze", [outer("Less", [tiles, outer.constant([shortest_segment])])])
    fits = _if(short, _graph(then, results), _graph(nothing.nodes, nans), "merged_way")
    outer.nodes.append(fits)
    for value, name in zip(fits.outputs, names, strict=True):
        value.name = f"merged_way.{name}"
    failed = outer("Cast", [outer("IsNaN", [fits.outputs[names.index("SLIDE")]])], to=ir.DataType.FLOAT)
    failed = outer("Greater", [outer("ReduceMax", [failed], keepdims=0), outer.constant(0.5, np.float32)])
    same = [passed("Identity", [value]) for value in fits.outputs]
    chosen = _if(failed, _graph(slow_nodes, slow), _graph(passed.nodes, same), BRANCHES)
    for value, like, name in zip(chosen.outputs, slow, names, strict=True):
        value.name, value.type, value.shape = name, like.type, like.shape
    graph.extend([*outer.nodes, chosen])
    graph.outputs.extend(chosen.outputs)
    passes.DeduplicateInitializersPass(size_limit=1 << 62)(branches)
    passes.NameFixPass()(branches)
    return branches


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
    nodes: list[ir.Node], results: list[ir.Value], keep: ir.Value, graph: ir.Graph
) -> tuple[list[ir.Node], list[ir.Value]]:
    """`nodes` that compute `results` [M, ...] for the masks `keep` [M, N], as a loop over masks of like size.

    What does not depend on the masks is computed once, before the loop.
    """
    before, step, after = NodeMaker(graph, "before"), NodeMaker(graph, "step"), NodeMaker(graph, "after")
    masks = before("Shape", [keep], start=0, end=1)
    shown = before("Cast", [keep], to=ir.DataType.FLOAT)
    sizes = before("ReduceSum", [shown, before.constant([1])], keepdims=0)
    sizes, order = before.sort(sizes, masks, largest=1)
    ordered = before("Gather", [keep, order], axis=0)
    widths = [_width(value) for value in results]
    empty = [before("ConstantOfShape", [before.constant([0, width])]) for width in widths]

    number, going, start = (
        _value(f"step.{name}", kind, shape)
        for name, kind, shape in (
            ("number", ir.DataType.INT64, []),
            ("going", ir.DataType.BOOL, []),
            ("start", ir.DataType.INT64, [1]),
        )
    )
    done = [_value(f"step.done.{i}", ir.DataType.FLOAT, [None, width]) for i, width in enumerate(widths)]
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
    loop = ir.node("Loop", first, {"body": body}, num_outputs=1 + len(results), name="masks")
    for index, value in enumerate(loop.outputs):
        value.name = f"masks.{index}"
    _, back = after.sort(order, masks, largest=0)
    in_order = [after("Gather", [value, back], axis=0) for value in loop.outputs[1:]]
    return [*before.nodes, loop, *after.nodes], in_order


def _width(value: ir.Value) -> int:
    assert value.shape is not None
    width = value.shape[1]
    assert isinstance(width, int)
    return width


def _value(name: str, kind: ir.DataType, shape: Sequence[int | None]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
