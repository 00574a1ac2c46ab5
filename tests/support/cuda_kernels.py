"""Which operators of a graph lack a kernel of ONNX Runtime's CUDA provider, found without a GPU.

A node without a kernel for its types runs on the CPU, and its values are copied there and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import GraphProto, NodeProto, TensorProto

OPSETS = {"": 18, "com.microsoft": 1}
FLOATS = "float16 float double"
NUMBERS = f"{FLOATS} int32 int64"
ANY = f"{NUMBERS} bool uint8"
KERNELS = {
    name: types.split()
    for names, types in {
        "Cast Concat ConstantOfShape Expand Gather GatherElements Identity If Loop Reshape": ANY,
        "ScatterElements Shape Slice Split Squeeze Transpose Unsqueeze": ANY,
        "Abs Add Div Mul Sub": f"{NUMBERS} uint8",
        "CumSum Greater GreaterOrEqual Less Max Min Mod ReduceMax ReduceSum TopK": NUMBERS,
        "Equal": f"{NUMBERS} bool",
        "Erf Exp Gemm IsNaN LayerNormalization Log MatMul QuickGelu Softmax": FLOATS,
        "And Not Or": "bool",
        "GatherND": f"{FLOATS} int64 bool",
        "MultiHeadAttention SkipLayerNormalization": "float16 float",
        "Pad": f"{FLOATS} bool",
        "Range": "float double int32 int64",
        "Where": f"{NUMBERS} uint8",
    }.items()
    for name in names.split()
}
"""Types of an operator's kernels at `OPSETS`, of those that occur here, by docs/OperatorKernels.md of
ONNX Runtime ("Operators implemented by CUDAExecutionProvider", read at commit 001d12d2623f)."""
INDICES = ("int32", "int64")
"""Types of shapes, axes and indices in every kernel that takes some."""
TO_BOOL = ("And", "Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "Not", "Or")


class Use(NamedTuple):
    """An operator with the type that decides its kernel, and the type of an index or shape."""

    operator: str
    kind: str
    indices: str = "int64"


def walk(graph: GraphProto, outer: Mapping[str, str]) -> tuple[set[Use], list[str]]:
    """The operators of a graph and its subgraphs, and the types of its outputs; `outer` are types by name."""
    types = {**outer, **{weight.name: type_name(weight.data_type) for weight in graph.initializer}}
    types |= {value.name: type_name(value.type.tensor_type.elem_type) for value in graph.input}
    found: set[Use] = set()
    for node in graph.node:
        inputs = [types[name] for name in node.input if name]
        if node.op_type == "Constant":
            types[node.output[0]] = type_name(node.attribute[0].t.data_type)
            continue
        inner = [walk(attribute.g, types) for attribute in node.attribute if attribute.HasField("g")]
        results = inner[0][1] if inner else outputs_of(node, inputs)
        types.update(zip(node.output, results[1:] if node.op_type == "Loop" else results, strict=False))
        found = found.union(*(uses for uses, _ in inner))
        if inner or node.op_type in ("ConstantOfShape", "Where"):
            found |= {Use(node.op_type, kind) for kind in results}
        else:
            found |= {
                Use(node.op_type, inputs[0], kind) for kind in {*inputs[1:]} - {inputs[0]} or ("int64",)
            }
        if node.op_type == "Cast":
            found.add(Use("Cast", results[0]))
    return found, [types[value.name] for value in graph.output]


def outputs_of(node: NodeProto, inputs: list[str]) -> list[str]:
    """The types of a node's outputs."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Cast":
        return [type_name(attributes["to"].i)]
    if node.op_type == "ConstantOfShape":
        return [type_name(attributes["value"].t.data_type) if "value" in attributes else "float"]
    if node.op_type == "TopK":
        return [inputs[0], "int64"]
    fixed = {"Shape": "int64", "Where": inputs[-1], **dict.fromkeys(TO_BOOL, "bool")}
    return [fixed.get(node.op_type, inputs[0])] * len(node.output)


def type_name(kind: int) -> str:
    """ONNX's name of a type, such as float16."""
    return str(TensorProto.DataType.Name(kind)).lower()


def uses_of(path: Path) -> set[Use]:
    """The operators of a graph, whose opsets are those of the table."""
    model = onnx.load(path, load_external_data=False)
    assert {one.domain: one.version for one in model.opset_import} == OPSETS, "read the kernels' table again"
    return walk(model.graph, {})[0]


def without_kernel(uses: set[Use]) -> set[Use]:
    """Those that would run on the CPU."""
    known = {(operator, kind) for operator, kinds in KERNELS.items() for kind in kinds}
    return {use for use in uses if use[:2] not in known or use.indices not in INDICES}
