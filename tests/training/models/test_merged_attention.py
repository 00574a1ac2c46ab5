"""One softmax for all branches, among the visible tokens alone, against the literal reading in `conftest`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.models.dilated_attention import Selection, plan_fused_attention
from training.models.merged_attention import merged_attention, overlaps, plan_merged

CPU = torch.device("cpu")
HEADS = 16
SEGMENT = 24
BRANCHES = {
    "published dilations": ((SEGMENT, 32, 64, 96, 400), (1, 2, 4, 8, 16)),
    "misaligned": ((SEGMENT, 29, 50, 90, 400), (1, 8, 4, 8, 16)),
    "no branch sees every token": ((30, SEGMENT, 40), (4, 8, 16)),
    "dilations that don't divide the heads": ((SEGMENT, SEGMENT, SEGMENT), (2, 3, 4)),
    "more dilation than heads": ((SEGMENT, 40), (32, 7)),
}


def draw(tokens: int, d: int = 6, seed: int = 0) -> list[Tensor]:
    """q, k and v [T, H, d] in float64, exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, HEADS, d, generator=generator).double() for _ in range(3)]


def masks(tokens: int) -> list[Tensor]:
    """All tokens, half of them, one in ten, and the first alone; always with the first."""
    shares = torch.rand(tokens, generator=torch.Generator().manual_seed(1))
    return [(shares < share) | (torch.arange(tokens) == 0) for share in (1, 0.5, 0.1, 0)]


@torch.inference_mode()
def among(
    qkv: list[Tensor],
    branches: tuple[tuple[int, ...], tuple[int, ...]],
    visible: Tensor,
    tolerance: float = 1e-6,
) -> Tensor:
    """Ours for the visible tokens, [K, H, d]; the first one's alone, within `tolerance`, is the same."""
    rows, seen, attention = select(len(visible), branches, visible)
    q, k, v = (x.float()[None] if rows is None else x.float()[rows] for x in qkv)
    out = attention(q, k, v, seen)
    first = attention.class_token_only()(q[:, :1], k, v, seen)
    assert (out[:, :1] - first).abs().max() < tolerance
    return out[seen]


def select(tokens: int, branches: tuple[tuple[int, ...], tuple[int, ...]], visible: Tensor) -> Selection:
    return plan_fused_attention(tokens, *branches, HEADS, CPU).among(visible[None])


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("tokens", [1, 2, 15, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 129])
def test_the_visible_tokens_alone_give_what_is_published(
    tokens: int, name: str, published_attention: Callable[..., Tensor]
) -> None:
    """The shortest segment's border is where one attention ends and branches begin."""
    qkv = draw(tokens)
    for visible in masks(tokens):
        got = among(qkv, BRANCHES[name], visible)
        want = published_attention(*qkv, *BRANCHES[name], visible)[visible]
        assert (got - want).abs().max() < 4e-6


@pytest.mark.parametrize(
    ("name", "tokens", "kept"),
    [
        ("published dilations", SEGMENT, 12),
        ("published dilations", SEGMENT + 1, 12),
        ("published dilations", 129, 12),
        ("misaligned", 29, 12),
        ("misaligned", 30, 30),
    ],
)
def test_masked_tokens_are_computed_where_misaligned_segments_need_them_only(
    name: str, tokens: int, kept: int
) -> None:
    visible = torch.arange(tokens) < 12
    with torch.inference_mode():
        rows, seen, _ = select(tokens, BRANCHES[name], visible)
    assert (tokens if rows is None else rows.shape[1]) == seen.shape[1] == kept
    assert select(tokens, BRANCHES[name], visible).rows is None, "under gradients all of them are"


@pytest.mark.parametrize("bias", [-500, -40, -8, 8, 500])
def test_the_published_quirk_is_noticed(bias: int, published_attention: Callable[..., Tensor]) -> None:
    """Keys with a common offset against the query: next to a padding key (e^0) they have no mass left."""
    q, k, v = draw(SEGMENT - 1, 24)
    direction = torch.nn.functional.normalize(draw(1, 24, seed=2)[0], dim=-1)
    q, k = (x.float().double() for x in (q * 0.1 + 5 * direction, k + bias * direction))
    branches = BRANCHES["published dilations"]
    tables = (q.float()[None], k.float()[None], v.float()[None])
    out = merged_attention(*tables, plan_merged(SEGMENT - 1, branches[1], HEADS, CPU))
    assert (out is None) == (bias in (-500, -40))
    for visible in masks(SEGMENT - 1):
        want = published_attention(q, k, v, *branches, visible)[visible]
        assert (among([q, k, v], branches, visible, 2e-4) - want).abs().max() < 2e-4


@pytest.mark.parametrize(("token", "padded"), [(7, True), (3, False)])
def test_one_query_that_hits_the_quirk_is_enough(token: int, padded: bool) -> None:
    """In head 7 of 23 tokens dilation 16 covers token 7 and one padding key, dilation 8 no padding."""
    q, k, v = (x.float()[None] for x in draw(SEGMENT - 1))
    layout = plan_merged(SEGMENT - 1, BRANCHES["published dilations"][1], HEADS, CPU)
    k[..., 0] = 1
    assert merged_attention(q, k, v, layout) is not None
    q[:, token, 7, 0] = -100
    assert (merged_attention(q, k, v, layout) is None) == padded


@pytest.mark.parametrize("dilations", [dilations for _, dilations in BRANCHES.values()])
@pytest.mark.parametrize("heads", [16, 6])
def test_the_channels_multiply_to_the_logarithm_of_the_counts(dilations: tuple[int, ...], heads: int) -> None:
    table = overlaps(dilations, heads)
    counts = torch.zeros(heads, table.period, table.period)
    for r in dilations:
        for head in range(heads):
            covered = torch.arange(table.period) % r == head // -(-heads // r)
            counts[head] += covered[:, None] & covered
    logs = torch.einsum("phc,qhc->hpq", torch.from_numpy(table.queries), torch.from_numpy(table.keys))
    assert torch.equal(logs.exp().round(decimals=5), counts)
    assert table.keys.shape[2] <= 6, "few classes, so few channels"
