"""Dilated attention against the literal reading in `conftest`: sizes, misalignment, masks, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.models import dilated_attention as module
from training.models.branches import plan_branches
from training.models.dilated_attention import dilated_attention
from training.models.fused_attention import kernel_attention, lse_kernel, null_key, null_key_attention

CPU = torch.device("cpu")
BRANCHES = {
    "aligned": ((8, 16, 32, 64, 128), (1, 2, 4, 8, 16)),
    "misaligned": ((7, 13, 30, 61, 100), (1, 2, 4, 8, 16)),
    "no branch sees every token": ((20, 14, 9), (4, 8, 16)),
    "dilations that don't divide the heads": ((5, 5, 5), (2, 3, 4)),
    "segments shorter than their dilation": ((3, 4), (4, 8)),
    "more dilation than heads": ((6, 40), (32, 7)),
}


@pytest.fixture(params=["kernel", "null key"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to a log-sum-exp: the kernel's own, and the null key (which other devices take)."""
    if request.param == "null key":
        monkeypatch.setattr(module, "lse_kernel", lambda q: None)
    return str(request.param)


def draw(tokens: int, heads: int, d: int, seed: int = 0) -> list[Tensor]:
    """q, k and v [T, H, d] in float64, exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, heads, d, generator=generator).double() for _ in range(3)]


def attend(
    qkv: list[Tensor],
    branches: tuple[tuple[int, ...], tuple[int, ...]],
    visible: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Ours for one mask, [T, H, d]."""
    tokens, heads, _ = qkv[0].shape
    q, k, v = (x.to(dtype)[None] for x in qkv)
    shown = torch.ones(tokens, dtype=torch.bool) if visible is None else visible
    return dilated_attention(q, k, v, plan_branches(tokens, *branches, heads, CPU), shown[None])[0]


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("heads", [16, 6])
@pytest.mark.parametrize("tokens", [2, 9, 64, 129])
def test_agrees_with_the_published_definition(
    way: str, tokens: int, heads: int, name: str, published_attention: Callable[..., Tensor]
) -> None:
    qkv = draw(tokens, heads, 4)
    every = torch.ones(tokens, dtype=torch.bool)
    some = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) > 0.5
    first = torch.arange(tokens) == 0
    for visible in (every, some | first, first):
        got = attend(qkv, BRANCHES[name], visible)
        want = published_attention(*qkv, *BRANCHES[name], visible)
        # What a token that isn't visible becomes is nobody's business, as long as it is a number.
        assert (got - want)[visible].abs().max() < 4e-6
        assert got.isfinite().all()


@pytest.mark.parametrize("bias", [-500, -100, 100, 500])
def test_survives_an_offset_common_to_all_keys(
    way: str, bias: int, published_attention: Callable[..., Tensor]
) -> None:
    """A key bias moves all real logits, by hundreds here, away from those of the zero padding."""
    q, k, v = draw(150, 16, 24)
    direction = torch.nn.functional.normalize(draw(1, 16, 24, seed=2)[0], dim=-1)
    qkv = [x.float().double() for x in (q + 2 * direction, k + bias * direction, v)]
    lengths = (16, 40, 64, 100, 200), (1, 2, 4, 8, 16)
    want = published_attention(*qkv, *lengths, torch.ones(150, dtype=torch.bool))
    assert (attend(qkv, lengths) - want).abs().max() < 2e-4


@pytest.mark.parametrize(("spread", "tolerance"), [(4, 3e-5), (20, 1e-3)])
def test_survives_peaked_attention(
    spread: int, tolerance: float, published_attention: Callable[..., Tensor]
) -> None:
    """Logits with a standard deviation of 16 and of 400: the softmax is one key's."""
    q, k, v = draw(150, 16, 24)
    qkv = [q * spread, k * spread, v]
    lengths = (16, 40, 64, 100, 200), (1, 2, 4, 8, 16)
    want = published_attention(*qkv, *lengths, torch.ones(150, dtype=torch.bool))
    assert (attend(qkv, lengths) - want).abs().max() < tolerance


def test_the_null_key_survives_logits_a_hundred_above_their_mean(
    published_attention: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "lse_kernel", lambda q: None)
    q, k, v = draw(150, 16, 24)
    qkv = [q * 4.4, k * 4.4, v]
    logits = torch.einsum("qhd,khd->hqk", qkv[0], qkv[1]) / 24**0.5
    assert 95 < (logits.logsumexp(dim=2) - logits.mean(dim=2)).max() < 105
    lengths = (16, 40, 64, 100, 200), (1, 2, 4, 8, 16)
    want = published_attention(*qkv, *lengths, torch.ones(150, dtype=torch.bool))
    assert (attend(qkv, lengths) - want).abs().max() < 5e-5


@pytest.mark.parametrize("name", ["aligned", "misaligned"])
def test_gradients_are_those_of_detached_branch_weights(
    way: str, name: str, published_attention: Callable[..., Tensor]
) -> None:
    ours = [x.requires_grad_() for x in draw(129, 16, 4)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    into = draw(129, 16, 4, seed=3)[0]
    torch.autograd.backward(attend(ours, BRANCHES[name], dtype=torch.float64), into)
    every = torch.ones(129, dtype=torch.bool)
    torch.autograd.backward(published_attention(*theirs, *BRANCHES[name], every), into)
    for got, want in zip(ours, theirs, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert (got.grad - want.grad).abs().max() < 1e-6


def test_the_class_token_alone_is_the_first_row(way: str) -> None:
    q, k, v = (x.float()[None] for x in draw(129, 16, 4))
    visible = torch.rand(1, 129, generator=torch.Generator().manual_seed(4)) > 0.3
    for branches in BRANCHES.values():
        plan = plan_branches(129, *branches, 16, CPU)
        one = [branch.class_token_only() for branch in plan]
        got = dilated_attention(q[:, :1], k, v, one, visible)
        assert (got - dilated_attention(q, k, v, plan, visible)[:, :1]).abs().max() < 1e-6


@pytest.mark.parametrize("null_key_in_half", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_has_its_own_rounding_only(
    dtype: torch.dtype,
    tolerance: float,
    null_key_in_half: bool,
    published_attention: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if null_key_in_half:
        monkeypatch.setattr(module, "kernel_attention", lambda kernel, *qkv: null_key_attention(*qkv))
    qkv = [x.to(dtype).double() for x in draw(150, 16, 24)]
    visible = torch.rand(150, generator=torch.Generator().manual_seed(5)) > 0.3
    got = attend(qkv, BRANCHES["aligned"], visible, dtype)
    assert got.dtype == dtype
    want = published_attention(*qkv, *BRANCHES["aligned"], visible)
    assert (got.double() - want)[visible].abs().max() < tolerance


@pytest.mark.parametrize("head_dim", [4, 6, 24, 32, 48, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_null_keys_channel_is_exact_in_every_precision(head_dim: int, dtype: torch.dtype) -> None:
    channel = null_key(head_dim, dtype)
    for kind in (torch.float16, torch.bfloat16):
        assert torch.tensor(channel, dtype=kind).item() == channel
    assert channel < 2**11, "an integer of TF32's 11 binary digits"
    assert channel / head_dim**0.5 == pytest.approx(20 if dtype == torch.float32 else 8, rel=0.5)


@pytest.mark.parametrize("spread", [0.1, 1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 37, 3000])
def test_the_null_key_in_half_finds_the_log_sum_exp(tokens: int, spread: float) -> None:
    """Next to what PyTorch's kernel says of the same half-precision tensors, also where attention is flat."""
    q, k, v = (x.half()[None] for x in draw(tokens, 2, 48))
    q, visible = q * spread, torch.ones(1, tokens, dtype=torch.bool)
    (branch,) = plan_branches(tokens, (4096,), (1,), 2, CPU)
    kernel = lse_kernel(q)
    assert kernel is not None
    want = kernel_attention(kernel, q, k, v, visible)(branch)
    got = null_key_attention(q, k, v, visible)(branch)
    assert (got.lse - want.lse).abs().max() < 5e-3
    out, expected = (part.out[..., :48].float() * part.factor[..., None] for part in (got, want))
    assert (out - expected).abs().max() < 4e-3 * expected.abs().max()


def test_cudas_kernel_takes_the_same_call() -> None:
    """Shapes only, on the meta device: its numbers need a GPU."""
    q, k, v = torch.empty(3, 2, 129, 16, 24, dtype=torch.float16, device="meta").unbind()
    visible = torch.empty(2, 129, dtype=torch.bool, device="meta")
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    for branch in plan_branches(129, *BRANCHES["misaligned"], 16, torch.device("meta")):
        part = kernel_attention(kernel, q, k, v, visible)(branch)
        rows = branch.queries.numel()
        assert part.out.shape == (2, rows, 32)
        assert part.factor.shape == part.lse.shape == (2, rows)
        assert part.lse.dtype == torch.float32
