"""The slide encoder: tile embeddings and their places in, the pooled states of every layer out.

Prov-GigaPath's `LongNetViT`, a torchscale LongNet encoder with sub-layer norms (Xu et al. 2024; Ding et al.
2023), key for key state-dict compatible. Parameter names are the published ones, so that published weights
load.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from training.errors import TrainingError
from training.models.dilated_attention import AttentionBackend, DilatedAttention, plan_fused_attention
from training.models.positions import check_grid, embed_positions, sine_table
from training.models.presets import SlideEncoderConfig
from training.models.variant import EmbeddingVariant

BLOCK_EPS = 1e-5
FINAL_EPS = 1e-6


class SlideOutput(NamedTuple):
    """Pooled states of one slide, each through the final `norm`; on the pooling axis 0 is CLS, 1 the mean.

    Attributes:
        layers: [L + 1, 2, E] (or [M, L + 1, 2, E] under M masks), the states h_0 .. h_L through `norm` only.
        encoder_norm: [2, E] (or [M, 2, E]), h_L through the encoder's own final norm, pooled, then `norm`.
    """

    layers: Tensor
    encoder_norm: Tensor


class _TileEmbedding(nn.Module):
    """The projection of tile embeddings to tokens; a separate module for the key `patch_embed.proj`."""

    def __init__(self, config: SlideEncoderConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.in_chans, config.embed_dim)

    def forward(self, embeddings: Tensor) -> Tensor:
        tokens: Tensor = self.proj(embeddings)
        return tokens


class _SelfAttention(nn.Module):
    """Dilated self-attention with a norm before the output projection."""

    def __init__(self, config: SlideEncoderConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.heads = config.heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.inner_attn_ln = nn.LayerNorm(width, eps=BLOCK_EPS)

    def forward(
        self, queries: Tensor, tokens: Tensor, attention: DilatedAttention, visible: Tensor
    ) -> Tensor:
        """[M, Q, E] attended over [M, T, E]."""
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1))
            for projected in (self.q_proj(queries), self.k_proj(tokens), self.v_proj(tokens))
        )
        merged = attention(q, k, v, visible).flatten(2)
        out: Tensor = self.out_proj(self.inner_attn_ln(merged))
        return out


class _FeedForward(nn.Module):
    """GELU feed-forward with a norm before the output projection."""

    def __init__(self, config: SlideEncoderConfig) -> None:
        super().__init__()
        width, hidden = config.embed_dim, config.embed_dim * config.ffn_ratio
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=BLOCK_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.fc1(tokens)
        hidden = F.gelu(hidden.float()).to(hidden.dtype)  # in float32 also under autocast, as published
        out: Tensor = self.fc2(self.ffn_layernorm(hidden))
        return out


class _Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the tokens."""

    def __init__(self, config: SlideEncoderConfig, drop_path: float) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.embed_dim, eps=BLOCK_EPS)
        self.ffn = _FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.embed_dim, eps=BLOCK_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, tokens: Tensor, attention: DilatedAttention, visible: Tensor, queries: int | None = None
    ) -> Tensor:
        """[M, T, E] to the next state of the first `queries` tokens (None: of all)."""
        normed = self.self_attn_layer_norm(tokens)
        tokens = tokens[:, :queries]
        attended = self.self_attn(normed[:, :queries], normed, attention, visible)
        tokens = tokens + self.drop_path(self.dropout(attended))
        out: Tensor = tokens + self.drop_path(self.dropout(self.ffn(self.final_layer_norm(tokens))))
        return out


class _Encoder(nn.Module):
    """The stack of blocks and the norm after it."""

    def __init__(self, config: SlideEncoderConfig) -> None:
        super().__init__()
        last = max(config.depth - 1, 1)
        rates = [config.drop_path_rate * i / last for i in range(config.depth)]
        self.layers = nn.ModuleList(_Block(config, rate) for rate in rates)
        self.layer_norm = nn.LayerNorm(config.embed_dim, eps=BLOCK_EPS)


class LongNetSlideEncoder(nn.Module):
    """LongNet over the tiles of one slide, with a class token before them and 2-D sine positions.

    `attention` computes the same numbers whichever backend it is; the export passes its own.
    """

    position_table: Tensor

    def __init__(
        self, config: SlideEncoderConfig, attention: AttentionBackend = plan_fused_attention
    ) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.patch_embed = _TileEmbedding(config)
        self.encoder = _Encoder(config)
        self.norm = nn.LayerNorm(config.embed_dim, eps=FINAL_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer(
            "position_table", sine_table(config.grid, config.embed_dim // 2), persistent=False
        )

    def with_attention(self, attention: AttentionBackend) -> LongNetSlideEncoder:
        """This encoder with another attention; the two share their weights."""
        twin = copy.copy(self)
        twin.attention = attention
        return twin

    def forward(self, embeddings: Tensor, coords: Tensor, keep: Tensor | None = None) -> SlideOutput:
        """All pooled states of a slide.

        Args:
            embeddings: tile embeddings [N, D].
            coords: i64 [N, 2], (x, y) px of each tile in the frame of the variant's coordinate rule.
            keep: bool [M, N], M masks over the same tiles: a tile that isn't kept is invisible as a key in
                every branch and left out of the mean; every other tile keeps its slot and place. None is one
                mask that keeps all. (Without gradients a masked tile is not computed, unless misaligned
                segments need it as a query, see `training.models.branches.plan_branch`.)

        Raises:
            TrainingError: shapes or types that don't fit, no tile, or a tile outside the position grid.
        """
        parts = [self._states(*part) for part in self._embed(embeddings, coords, keep)]
        layers, encoder_norm = (torch.cat(states) for states in zip(*parts, strict=True))
        return (
            SlideOutput(layers, encoder_norm) if keep is not None else SlideOutput(layers[0], encoder_norm[0])
        )

    def embed(
        self, embeddings: Tensor, coords: Tensor, variant: EmbeddingVariant, keep: Tensor | None = None
    ) -> Tensor:
        """The one vector of `variant`, [E] (or [M, E] under M masks), without what it doesn't need.

        Blocks beyond the variant's layer aren't computed, and for CLS pooling the last block has the one
        query. Arguments and errors as for `forward`; the numbers are the same.
        """
        vectors = torch.cat([self._vector(*part, variant) for part in self._embed(embeddings, coords, keep)])
        return vectors if keep is not None else vectors[0]

    def _states(self, tokens: Tensor, visible: Tensor, attention: DilatedAttention) -> tuple[Tensor, Tensor]:
        """The output [M, ...], from h_0 `tokens` [M, K, E] under `visible` [M, K]."""
        tokens = self.dropout(tokens)
        pooled = [_pool(tokens, visible)]
        for block in self.encoder.layers:
            tokens = block(tokens, attention, visible)
            pooled.append(_pool(tokens, visible))
        encoder_norm = self.norm(_pool(self.encoder.layer_norm(tokens), visible))
        return self.norm(torch.stack(pooled, dim=1)), encoder_norm

    def _vector(
        self, tokens: Tensor, visible: Tensor, attention: DilatedAttention, variant: EmbeddingVariant
    ) -> Tensor:
        """The variant's vectors [M, E] of h_0 `tokens` [M, K, E] under `visible` [M, K]."""
        tokens = self.dropout(tokens)
        blocks = list(self.encoder.layers[: variant.layer])
        last = blocks.pop() if blocks and variant.pooling == "cls" else None
        for block in blocks:
            tokens = block(tokens, attention, visible)
        if last is not None:
            tokens = last(tokens, attention.class_token_only(), visible, queries=1)
        if variant.norm == "encoder_norm+norm":
            tokens = self.encoder.layer_norm(tokens)
        vector = tokens[:, 0] if variant.pooling == "cls" else _mean(tokens, visible)
        vectors: Tensor = self.norm(vector)
        return vectors

    def _embed(
        self, embeddings: Tensor, coords: Tensor, keep: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, DilatedAttention]]:
        """For each mask, or all in an export: tokens h_0 [M, K, E] of the K to compute, which of them are
        seen [M, K], and attention over them.

        A token that is not seen and not finite is replaced by zeros: its attention weight is 0, and 0 times
        NaN is NaN.
        """
        config = self.config
        if not torch.compiler.is_exporting():
            self._check(embeddings, coords, keep)
        kept = embeddings.new_ones((1, embeddings.shape[0]), dtype=torch.bool) if keep is None else keep
        tiles = self.patch_embed(embeddings) + embed_positions(coords, self.position_table, config.tile_size)
        # The class token's place is all zeros.
        tokens = torch.cat([self.cls_token[0], tiles])
        visible = F.pad(kept, (1, 0), value=True)
        attention = self.attention(
            embeddings.shape[0] + 1, config.segment_lengths, config.dilations, config.heads, embeddings.device
        )
        for masks in one_by_one(visible):
            rows, seen, among = attention.among(masks)
            h = tokens.expand(masks.shape[0], -1, -1) if rows is None else tokens[rows]
            if keep is not None:
                finite = (h * 0).sum(dim=-1) == 0
                h = torch.where((seen | finite).unsqueeze(-1), h, 0)
            yield h, seen, among

    def _check(self, embeddings: Tensor, coords: Tensor, keep: Tensor | None) -> None:
        """Raise a `TrainingError` for what can't be a slide."""
        tiles, width = embeddings.shape[0], self.config.in_chans
        if embeddings.ndim != 2 or embeddings.shape[1] != width:
            raise TrainingError(
                f"tile embeddings are {list(embeddings.shape)}; this encoder takes [N, {width}]"
            )
        if tiles == 0:
            raise TrainingError("a slide without tiles has no embedding; check its tissue mask")
        if coords.shape != (tiles, 2) or coords.is_floating_point():
            raise TrainingError(
                f"coordinates are {coords.dtype} {list(coords.shape)}; "
                f"they must be int64 [{tiles}, 2], (x, y) px"
            )
        if keep is not None and (keep.dtype != torch.bool or keep.ndim != 2 or keep.shape[1] != tiles):
            raise TrainingError(f"keep is {keep.dtype} {list(keep.shape)}; it must be bool [M, {tiles}]")
        check_grid(coords, self.config.tile_size, self.config.grid)


def one_by_one(rows: Tensor) -> tuple[Tensor, ...]:
    """`rows` [M, ...] as M tensors [1, ...], for each to be computed by itself; in an export as they are.

    Kernels split a batch by its size, and so sum in another order: only by itself does a mask give the same
    bits whatever the other masks of the request are. It also keeps memory independent of M.
    """
    return (rows,) if torch.compiler.is_exporting() else rows.unsqueeze(1).unbind()


def _mean(tokens: Tensor, visible: Tensor) -> Tensor:
    """Mean [M, E] over the visible tiles of `tokens` [M, T, E]; zeros if there is none."""
    weights = visible[:, 1:].to(tokens.dtype)
    total = (tokens[:, 1:] * weights.unsqueeze(-1)).sum(dim=1)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1)


def _pool(tokens: Tensor, visible: Tensor) -> Tensor:
    """CLS and mean pooling [M, 2, E] of `tokens` [M, T, E]."""
    return torch.stack([tokens[:, 0], _mean(tokens, visible)], dim=1)
