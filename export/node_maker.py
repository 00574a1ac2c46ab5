"""Nodes and constants that are added to a graph after it was traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class NodeMaker:
    """Makes nodes with one output, in order, and initialisers of the outer graph."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self._graph = graph
        self._prefix = prefix
        self._constants = 0

    def __call__(self, operator: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes)
        node.outputs[0].name = f"{self._prefix}.{operator}.{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def sort(self, values: ir.Value, count: ir.Value, largest: int) -> tuple[ir.Value, ir.Value]:
        """All `count` values in order, the largest or the smallest first, and where they were."""
        node = ir.node("TopK", [values, count], {"axis": 0, "largest": largest}, num_outputs=2)
        ranked, order = node.outputs
        ranked.name, order.name = (f"{self._prefix}.{name}.{len(self.nodes)}" for name in ("ranked", "order"))
        self.nodes.append(node)
        return ranked, order

    def constant(self, value: Any, dtype: type = np.int64) -> ir.Value:
        array: NDArray[Any] = np.array(value, dtype)
        name = f"{self._prefix}.constant.{self._constants}"
        self._constants += 1
        made = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        made.shape, made.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self._graph.register_initializer(made)
        return made
