"""Fused attention in ONNX: `scaled_dot_product_attention` as one `com.microsoft.MultiHeadAttention`.

ONNX Runtime runs that operator without a score matrix (a flash kernel on the CPU too), TensorRT and
TensorRT-RTX parse it into their own attention layers, and it needs no newer opset than 18.
"""

from __future__ import annotations

from typing import Any

import onnxscript
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

op: Any = onnxscript.opset18

DOMAIN = "com.microsoft"


def _schema() -> OpSchema:
    """The part of the operator's schema that is used here; the `onnx` package knows its own domain only."""
    tensor = OpSchema.FormalParameter
    return OpSchema(
        "MultiHeadAttention",
        DOMAIN,
        1,
        inputs=[tensor("query", "T"), tensor("key", "T"), tensor("value", "T")],
        outputs=[tensor("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[
            OpSchema.Attribute("num_heads", OpSchema.AttrType.INT, "", required=True),
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "", required=True),
        ],
    )


multi_head_attention = Op(Opset(DOMAIN, 1), "MultiHeadAttention", _schema())
"""query [B, S, H*d], key [B, T, H*d], value [B, T, H*e] -> [B, S, H*e]; attributes num_heads and scale."""


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`aten.scaled_dot_product_attention` without mask, [B, H, S, d] each, for the exporter's translation
    table.
    """
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        raise NotImplementedError("only plain attention is exported")
    heads, width = query.shape[1], query.shape[3]

    def flat(x: Any) -> Any:
        return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, heads * x.shape[3]])

    out = multi_head_attention(
        flat(query), flat(key), flat(value), num_heads=heads, scale=width**-0.5 if scale is None else scale
    )
    return op.Transpose(op.Reshape(out, [0, 0, heads, value.shape[3]]), perm=[0, 2, 1, 3])
