"""The tile encoder as an ONNX graph, written for the kernels that ONNX Runtime has for CUDA.

In a graph traced from PyTorch a GPU spends a third of its time between the matrix products: on casts around
every norm, LayerScale, a bias after each product, splits. Here larger operators take these along:

* Tokens are rows, [B * T, D], and get a batch axis for attention only.
* The pixels' normalisation is folded into the patch projection, that one's bias into the positions, and
  LayerScale into the projection before it: exact but for rounding.
* `SkipLayerNormalization` adds a projection, its bias and the residual, and returns the norm and the sum.
* `MultiHeadAttention` adds the biases of queries, keys and values; `QuickGelu` with alpha 1 is SiLU.
* The last block computes the class token alone, since nothing else reaches the embedding, unless PATCH_TOKENS
  are an output.

These operators of `com.microsoft` run on the CPU too. TensorRT gets them expanded (`export.plain`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from export.attention import DOMAIN
from export.precision import Precision
from training.models.head import ClassificationHead
from training.models.tile_encoder import TileEncoder

OPSET = 18
KINDS = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}


def tile_graph(
    encoder: TileEncoder,
    precision: Precision,
    head: ClassificationHead | None = None,
    *,
    patch_tokens: bool = False,
) -> ir.Model:
    """TILES uint8 [B, 224, 224, 3] to EMBEDDINGS float32 [B, D]; saving it reads the weights of `encoder`.

    With a `head` TILE_LOGITS float32 [B, C] follow, with `patch_tokens` PATCH_TOKENS float32 [B, T, D].
    """
    size, width = encoder.config.image_size, encoder.config.embed_dim
    tiles = ir.val("TILES", ir.DataType.UINT8, ("B", size, size, 3))
    writer = _Writer(encoder, precision)
    embeddings = ir.val("EMBEDDINGS", ir.DataType.FLOAT, ("B", width))
    outputs = [embeddings]
    tokens = ir.val("PATCH_TOKENS", ir.DataType.FLOAT, ("B", writer.tokens, width)) if patch_tokens else None
    writer.write(tiles, embeddings, tokens)
    if head is not None:
        logits = ir.val("TILE_LOGITS", ir.DataType.FLOAT, ("B", len(head.config.classes)))
        writer.head(head, embeddings, logits)
        outputs.append(logits)
    if tokens is not None:
        outputs.append(tokens)
    graph = ir.Graph(
        [tiles],
        outputs,
        nodes=writer.tape.nodes,
        initializers=writer.tape.initializers,
        opset_imports={"": OPSET, DOMAIN: 1},
        name="tile_encoder",
    )
    return ir.Model(graph, ir_version=10)


class _Writer:
    """Notes down operators and weights, by the names of PyTorch's modules."""

    def __init__(self, encoder: TileEncoder, precision: Precision) -> None:
        self.encoder, self.products, self.residual = encoder, precision.products, precision.residual
        self.vit: Any = encoder.vit  # timm's modules don't say what they hold
        self.width = encoder.config.embed_dim
        self.side = encoder.config.image_size // encoder.config.patch_size
        self.tokens = encoder.config.tokens
        self.tape = ir.tape.Tape()

    def write(self, tiles: ir.Value, embeddings: ir.Value, tokens: ir.Value | None) -> None:
        """Everything from `tiles` to `embeddings` and, where wanted, to all `tokens`."""
        blocks = self.vit.blocks
        norms = [(f"blocks.{i}.norm1", block.norm1) for i, block in enumerate(blocks)]
        norms.append(("norm", self.vit.norm))
        x = self.embed(tiles)
        name, norm = norms[0]
        normed = self.op(name, "LayerNormalization", x, *self.norm(name, norm), axis=-1, epsilon=norm.eps)
        for i, block in enumerate(blocks):
            last = i + 1 == len(blocks) and tokens is None
            normed, x = self.block(f"blocks.{i}", block, normed, x, norms[i + 1], last=last)
        if tokens is not None:
            dense = self.reshape("patch_tokens", normed, -1, self.tokens, self.width)
            self.op("PATCH_TOKENS", "Cast", dense, to=ir.DataType.FLOAT, output=tokens)
            normed = self.class_token(normed)
        self.op("EMBEDDINGS", "Cast", normed, to=ir.DataType.FLOAT, output=embeddings)

    def head(self, head: ClassificationHead, embeddings: ir.Value, logits: ir.Value) -> None:
        """A linear layer on the embeddings, in float32 whatever the encoder's precision is."""
        layer: Any = head.classifier[0]
        shape = (layer.in_features, layer.out_features)
        weight = self.weight("tile_head.weight", shape, lambda: layer.weight.T, torch.float32)
        bias = self.weight("tile_head.bias", shape[1:], lambda: layer.bias, torch.float32)
        self.op("TILE_LOGITS", "Gemm", embeddings, weight, bias, output=logits)

    def embed(self, tiles: ir.Value) -> ir.Value:
        """Pixels to tokens with their positions."""
        vit, edge, side, width = self.vit, self.encoder.config.patch_size, self.side, self.width
        projection, mean, std = vit.patch_embed.proj, self.encoder.mean, self.encoder.std

        def weight() -> Tensor:  # for 8-bit pixels, channels last
            levels: Tensor = projection.weight / (255 * std)
            return levels.permute(2, 3, 1, 0).flatten(0, 2)

        def positions() -> Tensor:
            bias = projection.bias - (projection.weight * (mean / std)).sum(dim=(1, 2, 3))
            added: Tensor = vit.pos_embed + torch.cat([vit.cls_token[0], bias.expand(side**2, -1)])
            return added

        pixels = 3 * edge**2
        # Cast first: TensorRT has no 8-bit integers to transpose.
        x = self.op("pixels", "Cast", tiles, to=KINDS[self.products])
        x = self.reshape("grid", x, -1, side, edge, side, edge, 3)
        x = self.op("patches", "Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        x = self.reshape("patches.rows", x, -1, pixels)
        x = self.op("patch_embed", "MatMul", x, self.weight("patch_embed.weight", (pixels, width), weight))
        x = self.reshape("patch_embed.tiles", self.widened(x), -1, side**2, width)
        # In front of the patches a place for the class token, which comes along with the positions.
        x = self.op("places", "Pad", x, self.integers("places.pads", 0, 1, 0, 0, 0, 0))
        added = self.weight("pos_embed", (1, self.tokens, width), positions, self.residual)
        return self.reshape("tokens", self.op("embedded", "Add", x, added), -1, width)

    def block(
        self, name: str, block: Any, normed: ir.Value, x: ir.Value, norm: tuple[str, Any], *, last: bool
    ) -> tuple[ir.Value, ir.Value]:
        """From the tokens `x` and their norm to the next block's, through its `norm`."""
        keys = queries = self.narrowed(normed)
        if last:
            queries, x = self.class_token(keys), self.class_token(x)
        attended = self.attention(f"{name}.attn", block.attn, queries, keys, 1 if last else self.tokens)
        norm2 = (f"{name}.norm2", block.norm2)
        normed, x = self.add(f"{name}.attn.proj", attended, block.attn.proj, block.ls1.gamma, x, norm2)
        gated = self.gated(f"{name}.mlp", self.narrowed(normed), block.mlp)
        return self.add(f"{name}.mlp.fc2", gated, block.mlp.fc2, block.ls2.gamma, x, norm)

    def attention(self, name: str, attn: Any, queries: ir.Value, keys: ir.Value, asking: int) -> ir.Value:
        """Attention of the first `asking` tokens of each tile to all of them."""
        width = self.width
        parts = (("q", queries, asking), ("k", keys, self.tokens), ("v", keys, self.tokens))
        qkv = []
        for i, (part, x, tokens) in enumerate(parts):
            x = self.product(f"{name}.{part}", x, attn.qkv, slice(i * width, (i + 1) * width))
            qkv.append(self.reshape(f"{name}.{part}.tiles", x, -1, tokens, width))
        bias = self.weight(f"{name}.qkv.bias", (3 * width,), lambda: attn.qkv.bias)
        x = self.op(name, "MultiHeadAttention", *qkv, bias, num_heads=attn.num_heads, scale=attn.scale)
        return self.reshape(f"{name}.rows", x, -1, width)

    def gated(self, name: str, x: ir.Value, mlp: Any) -> ir.Value:
        """The hidden layer of a SwiGLU."""
        hidden = mlp.fc2.in_features
        gate = self.product(f"{name}.gate", x, mlp.fc1, slice(hidden), bias=True)
        up = self.product(f"{name}.up", x, mlp.fc1, slice(hidden, None), bias=True)
        return self.op(f"{name}.gated", "Mul", self.op(f"{name}.silu", "QuickGelu", gate, alpha=1.0), up)

    def add(
        self, name: str, x: ir.Value, layer: Any, scale: Tensor, residual: ir.Value, norm: tuple[str, Any]
    ) -> tuple[ir.Value, ir.Value]:
        """Project `x`, scale that and add it to the residual: the norm of the sum, and the sum."""
        x = self.widened(self.product(name, x, layer, scale=scale))
        bias = self.weight(f"{name}.bias", (self.width,), lambda: layer.bias * scale, self.residual)
        outputs = [ir.Value(name=each) for each in (norm[0], "", "", f"{name}.sum")]
        self.tape.op_multi_out(
            "SkipLayerNormalization",
            [x, residual, *self.norm(*norm), bias],
            {"epsilon": norm[1].eps},
            outputs=outputs,
            domain=DOMAIN,
            name=norm[0],
        )
        return outputs[0], outputs[3]

    def product(
        self,
        name: str,
        x: ir.Value,
        layer: Any,
        rows: slice = slice(None),
        *,
        scale: Tensor | None = None,
        bias: bool = False,
    ) -> ir.Value:
        """`x` times the weight of a linear layer's outputs `rows`, with its LayerScale or its bias."""

        def values() -> Tensor:
            weight: Tensor = layer.weight[rows]
            return (weight if scale is None else weight * scale[:, None]).T

        outputs = len(range(layer.out_features)[rows])
        weight = self.weight(f"{name}.weight", (layer.in_features, outputs), values)
        if not bias:
            return self.op(name, "MatMul", x, weight)
        return self.op(
            name, "Gemm", x, weight, self.weight(f"{name}.bias", (outputs,), lambda: layer.bias[rows])
        )

    def norm(self, name: str, norm: Any) -> tuple[ir.Value, ir.Value]:
        """A norm's weight and bias."""
        return (
            self.weight(f"{name}.weight", (self.width,), lambda: norm.weight, self.residual),
            self.weight(f"{name}.bias", (self.width,), lambda: norm.bias, self.residual),
        )

    def class_token(self, x: ir.Value) -> ir.Value:
        """The class token's row of each tile."""
        tiles = self.reshape(f"{x.name}.tiles", x, -1, self.tokens, self.width)
        return self.op(
            f"{x.name}.class", "Gather", tiles, self.integers(f"{x.name}.first", 0, scalar=True), axis=1
        )

    def widened(self, x: ir.Value) -> ir.Value:
        """`x` from the products' type to the residual's."""
        return (
            x
            if self.products == self.residual
            else self.op(f"{x.name}.wide", "Cast", x, to=KINDS[self.residual])
        )

    def narrowed(self, x: ir.Value) -> ir.Value:
        """`x` from the residual's type to the products'."""
        return (
            x
            if self.products == self.residual
            else self.op(f"{x.name}.half", "Cast", x, to=KINDS[self.products])
        )

    def reshape(self, name: str, x: ir.Value, *shape: int) -> ir.Value:
        """`x` in another shape (-1: what is left)."""
        return self.op(name, "Reshape", x, self.integers(f"{name}.shape", *shape))

    def op(
        self, name: str, operator: str, *inputs: ir.Value, output: ir.Value | None = None, **attributes: Any
    ) -> ir.Value:
        """An operator; its node and its output are called `name`."""
        domain = DOMAIN if operator in ("MultiHeadAttention", "QuickGelu") else ""
        output = output or ir.Value(name=name)
        return self.tape.op(operator, inputs, attributes, domain=domain, name=name, output=output)

    def integers(self, name: str, *values: int, scalar: bool = False) -> ir.Value:
        """An int64 constant."""
        constant = torch.tensor(values[0] if scalar else values)
        return self.tape.initializer(ir.tensor(constant, name=name))

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        values: Callable[[], Tensor],
        dtype: torch.dtype | None = None,
    ) -> ir.Value:
        """A weight of the products' type, or `dtype`; computed when read, so that none is held twice."""
        dtype = dtype or self.products

        def read() -> ir.TensorProtocol:
            return ir.tensor(values().detach().to(dtype).contiguous())

        return self.tape.initializer(ir.LazyTensor(read, KINDS[dtype], ir.Shape(shape), name=name))
