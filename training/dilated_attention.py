"""Dilated attention through PyTorch's fused attention kernels, exact, on any device, in memory linear in the
tokens.

Branches are merged by their share of the softmax mass, for which each query's log-sum-exp is needed. Public
fused kernels don't return it, so one more key, the *null key*, is added to each segment, and two channels to
the values that count what the softmax gives to the null key and to all the others. With s the logits of the
real keys and c that of the null key, the two channels come out as R = sum e^s / (sum e^s + e^c) and Z = e^c /
(sum e^s + e^c), hence

    log-sum-exp = c + ln R - ln Z,    attention over the real keys = output / R.

Three things keep that exact for any weights:
  * Keys are centred on their mean first, which a softmax doesn't notice, so an offset common to all keys (a
  large key
    bias) can't drive R or Z out of float32's range. The offset q . mean is added back afterwards.
  * Logits spread upwards from their mean (Jensen: lse >= ln n + mean), so c is above the mean: c = 20 leaves
  room for a
    log-sum-exp from 45 below the mean of all keys to 105 above it.
  * The published zero-padded keys (logit 0, value 0) never go through the kernel: z of them change the
  log-sum-exp to
    ln(e^lse + z) and the output by the factor e^(old lse - new lse).

Half precision has too little range for that. There the kernels that return the log-sum-exp are called by
name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training.branches import Branch

NULL_LOGIT = 20.0
INVISIBLE = -30_000.0
"""Logit added to a key that must not be seen; it fits float16 and underflows to exactly 0 in the softmax."""
UNCOVERED = -1e8
"""Published log-sum-exp of a token that a branch's head skips."""


def dilated_attention(q: Tensor, k: Tensor, v: Tensor, branches: list[Branch], visible: Tensor) -> Tensor:
    """Merge the branches' attention of `q` [M, Q, H, d] over `k`, `v` [M, T, H, d] into [M, Q, H, d].

    Q is T, or 1 with branches made by `Branch.class_token_only`. `visible` bool [M, T]: a token that isn't is
    no key in any branch; every other token keeps its slot. The weights of the merge carry no gradient, as
    published.
    """
    if q.dtype in (torch.float32, torch.float64):
        attend = _null_key_attention(q, k, v, visible)
    elif _kernel_returns_lse(q.device):
        attend = _half_precision_attention(q, k, v, visible)
    else:
        return dilated_attention(q.float(), k.float(), v.float(), branches, visible).to(q.dtype)

    parts = []
    for branch in branches:
        out, factor, lse = attend(branch)
        rows = branch.outputs.flatten()
        covered = branch.covered.flatten()
        lse = torch.where(covered, lse.index_select(1, rows), UNCOVERED)
        factor = torch.where(covered, factor.index_select(1, rows), 0)
        parts.append((out, rows, factor, lse))
    weights = torch.stack([lse for *_, lse in parts]).detach().softmax(dim=0)

    merged = torch.zeros_like(q).flatten(1, 2)
    for (out, rows, factor, _), weight in zip(parts, weights.unbind(), strict=True):
        share = (weight * factor).to(q.dtype)
        merged = merged + out.index_select(1, rows)[..., : q.shape[-1]] * share.unsqueeze(-1)
    return merged.reshape(q.shape)


_Part = tuple[Tensor, Tensor, Tensor]
"""A branch's outputs [M, n * m * H, >= d], the factors [M, n * m * H] that they still lack, their
log-sum-exp."""


def _null_key_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Callable[[Branch], _Part]:
    """Attention through `scaled_dot_product_attention` with a null key a segment; see the top of this
    module.
    """
    masks, _, heads, d = q.shape
    spare = -(d + 2) % 8  # kernels want head sizes in multiples of 8
    shown = visible.to(k.dtype)[:, :, None, None]
    # The mean cancels out of the results, so nothing has to flow back through it.
    centre = ((k * shown).sum(dim=1, keepdim=True) / shown.sum(dim=1, keepdim=True)).detach()
    q = q * d**-0.5
    offset = (q * centre).sum(dim=-1, keepdim=True)

    def table(x: Tensor, first: Tensor, second: Tensor, *made_up: tuple[float, float]) -> Tensor:
        """`x` with two channels (and spare ones) added, and made-up tokens that have nothing but these, as
        rows.
        """
        channels = [channel.expand(masks, x.shape[1], heads, 1) for channel in (first, second)]
        x = F.pad(torch.cat([x, *channels], dim=-1), (0, spare))
        tokens = F.pad(x.new_tensor(made_up), (d, spare))[None, :, None, :]
        return torch.cat([x, tokens.expand(masks, -1, heads, -1)], dim=1).flatten(1, 2)

    one, zero = q.new_ones(1, 1, 1, 1), q.new_zeros(1, 1, 1, 1)
    # Channel 1: what the query adds to its logits, here and there. Channel 2 carries the query's offset
    # along, unused.
    queries = table(q, one, offset, (1, 0))
    keys = table(k - centre, (1 - shown) * INVISIBLE, zero, (INVISIBLE, 0), (NULL_LOGIT, 0))
    values = table(v, one, zero, (0, 0), (0, 1))

    def attend(branch: Branch) -> _Part:
        q, k, v = (
            x.index_select(1, rows.flatten()).reshape(-1, rows.shape[1], heads, x.shape[-1])
            for x, rows in ((queries, branch.queries), (keys, branch.keys), (values, branch.keys))
        )
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=1.0
        )
        out = out.transpose(1, 2).reshape(masks, -1, branch.queries.shape[1], heads, q.shape[-1])
        real, null = out[..., d], out[..., d + 1]
        tiny = torch.finfo(out.dtype).tiny
        offset = q[..., d + 1].reshape(real.shape)
        lse = NULL_LOGIT + real.clamp(min=tiny).log() - null.clamp(min=tiny).log()
        lse = torch.where(real > 0, lse, UNCOVERED)
        with_padding = torch.logaddexp(lse, branch.log_padding - offset)
        factor = (lse - with_padding).exp() / real.clamp(min=tiny)
        return out.flatten(1, 3), factor.flatten(1), (with_padding + offset).flatten(1)

    return attend


def _kernel_returns_lse(device: torch.device) -> bool:
    """Whether a fused half-precision kernel that returns its log-sum-exp runs on that device."""
    return device.type == "cpu" or (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _half_precision_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Callable[[Branch], _Part]:
    """Attention through the flash kernel itself, whose log-sum-exp (float32) is that of the published
    flash-attn path.
    """
    masks, _, heads, d = q.shape
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    if q.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    spare = -(d + 1) % 8

    def table(x: Tensor, channel: Tensor, padding: float) -> Tensor:
        x = F.pad(torch.cat([x, channel.to(x.dtype).expand(masks, x.shape[1], heads, 1)], dim=-1), (0, spare))
        token = F.pad(x.new_tensor([padding]), (d, spare)).expand(masks, 1, heads, -1)
        return torch.cat([x, token], dim=1).flatten(1, 2)

    one = q.new_ones(1, 1, 1, 1)
    # The published padding takes part here, as zero keys and values; only masked tokens are invisible.
    queries = table(q, one, 1)
    keys = table(k, ~visible[:, :, None, None] * INVISIBLE, 0)
    values = table(v, one, 0)

    def attend(branch: Branch) -> _Part:
        slots = branch.queries.shape[1]
        kept = branch.keys[:, :-1]
        q, k, v = (
            x.index_select(1, rows.flatten()).reshape(-1, rows.shape[1], heads, x.shape[-1]).transpose(1, 2)
            for x, rows in ((queries, branch.queries), (keys, kept), (values, kept))
        )
        out, lse, *_ = kernel(q, k, v, scale=d**-0.5)
        out = out.transpose(1, 2).reshape(masks, -1, slots, heads, q.shape[-1])
        lse = lse[..., :slots].transpose(1, 2).reshape(masks, -1)
        return out.flatten(1, 3), torch.ones_like(lse), lse

    return attend
