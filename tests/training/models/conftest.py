"""A slow, literal reading of the published slide encoder, in float64, to hold the fast one to.

Written from the description of what the published code does, step by step: padding is materialised, segments
and heads are looped over, scores are matrices. It shares nothing with `training`: both can't be wrong alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[..., Tensor]
Encoder = Callable[..., tuple[Tensor, Tensor]]
UNCOVERED = -1e8


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def published_attention() -> Attention:
    """(q, k, v [T, H, d], segment lengths, dilations, visible bool [T]) to the merged attention [T, H, d]."""
    return _dilated_attention


@pytest.fixture(scope="session")
def published_encoder() -> Encoder:
    """(state dict, heads, lengths, dilations, embeddings, coords, keep [N]) to layers and encoder_norm."""
    return _encoder


def _dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], dilations: tuple[int, ...], visible: Tensor
) -> Tensor:
    tokens, heads, d = q.shape
    outs, lses = [], []
    for segment, dilation in zip(lengths, dilations, strict=True):
        g = min(segment, tokens)
        count = math.ceil(tokens / g)
        whole = count * g - tokens
        more = -g % dilation
        group = math.ceil(heads / dilation)
        out = torch.zeros(count, g + more, heads, d, dtype=q.dtype)
        lse = torch.full((count, g + more, heads), UNCOVERED, dtype=q.dtype)
        for i in range(count):
            part = slice(i * g, (i + 1) * g)
            qs, ks, vs = (
                F.pad(F.pad(x, (0, 0, 0, 0, 0, whole))[part], (0, 0, 0, 0, 0, more)) for x in (q, k, v)
            )
            seen = F.pad(F.pad(visible, (0, whole), value=True)[part], (0, more), value=True)
            for j in range(heads):
                at = torch.arange(j // group, g + more, dilation)
                if not bool(seen[at].any()):
                    continue
                logits = (qs[at, j] @ ks[at, j].T / math.sqrt(d)).masked_fill(~seen[at], -math.inf)
                out[i, at, j] = logits.softmax(dim=1) @ vs[at, j]
                mass = logits.logsumexp(dim=1)
                # 0 in the published float32 is what rounds to 0 there.
                lse[i, at, j] = mass.masked_fill(mass.abs() < 2.0**-24, UNCOVERED)
        outs.append(out.flatten(0, 1)[:tokens])
        lses.append(lse.flatten(0, 1)[:tokens])
    weights = torch.stack(lses).detach().softmax(dim=0)
    return (weights.unsqueeze(-1) * torch.stack(outs)).sum(dim=0)


def _sine(index: Tensor, width: int) -> Tensor:
    frequencies = torch.tensor([10000 ** (-i / (width // 2)) for i in range(width // 2)], dtype=torch.float64)
    angles = index[:, None] * frequencies
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1).float().double()


def _encoder(
    state: Mapping[str, Tensor],
    heads: int,
    lengths: tuple[int, ...],
    dilations: tuple[int, ...],
    embeddings: Tensor,
    coords: Tensor,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    weights = {name: tensor.double() for name, tensor in state.items()}
    width = weights["cls_token"].shape[-1]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + eps)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    visible = torch.ones(len(embeddings), dtype=torch.bool) if keep is None else keep
    gx, gy = (torch.floor(coords[:, i].double() / 256) for i in (0, 1))
    place = torch.cat([_sine(gy, width // 2), _sine(gx, width // 2)], dim=1)
    x = torch.cat([weights["cls_token"][0], linear(embeddings.double(), "patch_embed.proj") + place])

    def pooled(x: Tensor) -> Tensor:
        mean = x[1:][visible].mean(dim=0) if bool(visible.any()) else torch.zeros_like(x[0])
        return norm(torch.stack([x[0], mean]), "norm", 1e-6)

    layers = [pooled(x)]
    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    for i in range(depth):
        block = f"encoder.layers.{i}"
        y = norm(x, f"{block}.self_attn_layer_norm", 1e-5)
        q, k, v = (linear(y, f"{block}.self_attn.{p}_proj").reshape(len(x), heads, -1) for p in "qkv")
        y = _dilated_attention(q, k, v, lengths, dilations, F.pad(visible, (1, 0), value=True)).flatten(1)
        x = x + linear(norm(y, f"{block}.self_attn.inner_attn_ln", 1e-5), f"{block}.self_attn.out_proj")
        y = linear(norm(x, f"{block}.final_layer_norm", 1e-5), f"{block}.ffn.fc1")
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        x = x + linear(norm(y, f"{block}.ffn.ffn_layernorm", 1e-5), f"{block}.ffn.fc2")
        layers.append(pooled(x))
    return torch.stack(layers), pooled(norm(x, "encoder.layer_norm", 1e-5))
