"""Attention of one branch through PyTorch's fused kernels, with the log-sum-exp that merging branches needs.

Two ways, which agree. `kernel_attention` calls the fused kernel by name, which hands out its log-sum-exp:
exact for any weights. `null_key_attention` needs nothing but `scaled_dot_product_attention`, so it runs on
any device, and in ONNX (`export/` writes it there); it is exact within a range of logits that is given there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from training.models.branches import Branch

NULL_VALUE = 4096.0
"""What the null key's value counts 1 as: its share may be small, and half precision ends at 6e-8."""
UNCOVERED = -1e8
"""Published log-sum-exp of a token that a branch's head skips; and ours of one that sees no key at all."""


class Part(NamedTuple):
    """One branch's attention under M masks, a row per (slot, head).

    Attributes:
        out: [M, n * m * H, d or more], outputs up to a factor, in the first d channels.
        factor: [M, n * m * H], that factor.
        lse: [M, n * m * H], natural log of the summed exponentials, padding keys included.
    """

    out: Tensor
    factor: Tensor
    lse: Tensor


Attend = Callable[[Branch], Part]
Kernel = Callable[..., tuple[Tensor, ...]]


def lse_kernel(q: Tensor) -> Kernel | None:
    """The fused kernel that returns its log-sum-exp for tensors like `q`; None where there is none."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return cast(Kernel, aten._scaled_dot_product_flash_attention_for_cpu)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if half and q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) >= (8, 0):
        return cast(Kernel, aten._scaled_dot_product_flash_attention)
    return None


def kernel_attention(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Attend:
    """Attention through `kernel`. The published padding takes part as what it is, zero keys and zero values.

    Shapes: q [M, Q, H, d]; k, v [M, T, H, d]; visible bool [M, T].
    """
    masks, _, heads, d = q.shape
    spare = -(d + 1) % 8  # kernels want head sizes in multiples of 8
    invisible = -3e4 if q.dtype == torch.float16 else -1e20

    def table(x: Tensor, channel: Tensor, padding: float) -> Tensor:
        """`x` with a channel added that carries visibility, and then the padding token, as rows."""
        channel = channel.to(x.dtype).expand(masks, x.shape[1], heads, 1)
        x = F.pad(torch.cat([x, channel], dim=-1), (0, spare))
        token = F.pad(x.new_tensor([padding]), (d, spare)).expand(masks, 1, heads, -1)
        return torch.cat([x, token], dim=1).flatten(1, 2)

    one = q.new_ones(1, 1, 1, 1)
    queries = table(q, one, 1)
    keys = table(k, torch.where(visible, 0, invisible)[:, :, None, None], 0)
    values = table(v, one, 0)

    def attend(branch: Branch) -> Part:
        kept = branch.keys[:, :-1]  # the last one is the null key
        q, k, v = (
            _slots(x, rows, heads) for x, rows in ((queries, branch.queries), (keys, kept), (values, kept))
        )
        out, lse, *_ = kernel(q, k, v, scale=d**-0.5)
        lse = lse[..., : q.shape[2]].transpose(1, 2).reshape(masks, -1)  # a kernel may round the length up
        seeing = lse > invisible * d**-0.5 / 2
        lse = torch.where(seeing, lse, UNCOVERED)
        return Part(out.transpose(1, 2).reshape(masks, lse.shape[1], -1), seeing.to(lse.dtype), lse)

    return attend


def null_key(head_dim: int, dtype: torch.dtype) -> int:
    """The null key's one channel: its logit c times the square root of `head_dim`, about 20 (in half 8).

    It is rounded to what float16, bfloat16 and TF32 hold exactly, so that c is the same in every precision.
    """
    logit, step = (8, 8) if dtype in (torch.float16, torch.bfloat16) else (20, 16)
    return step * max(1, round(logit * math.sqrt(head_dim) / step))


def null_key_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Attend:
    """Attention through `scaled_dot_product_attention` with an additional key per segment, in any precision.

    The *null key* has the constant logit c, and two channels of the values count what the softmax gives to it
    and to all the others. With s the others' logits these come out as Z = e^c / (sum e^s + e^c) and
    R = sum e^s / (sum e^s + e^c), so the attention over the others is output / R, and its log-sum-exp is
    c + ln R - ln Z. What keeps that exact:

    * Keys are centred on their mean first, which a softmax doesn't notice. An offset common to all keys (a
      large key bias) could drive R or Z out of float32's range; it is added back afterwards, as q . mean.
    * Logits spread upwards from their mean (Jensen: lse >= ln n + mean), so c is above it. In float32, c = 20
      is good for a log-sum-exp from 45 below the mean logit over all keys to 105 above it. In float16 kernels
      hold e^(s - max) in 24 binary digits: c = 8 is good for a largest logit from 5 below the mean to 18
      above it; beyond 24 above it the log-sum-exp saturates (outputs stay exact, the merge doesn't).
    * The published zero-padded keys (logit 0, value 0) don't go through the kernel: z of them turn the
      log-sum-exp into ln(e^lse + z), and the output is multiplied by e^(lse before - lse after).

    Shapes as for `kernel_attention`.
    """
    masks, _, heads, d = q.shape
    spare = -(d + 2) % 8  # kernels want head sizes in multiples of 8
    scale, null_channel = d**-0.5, null_key(d, q.dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    shown = visible.to(wide)[:, :, None, None]
    # The mean cancels out of the results, so nothing has to flow back through it.
    centre = ((k * shown).sum(dim=1, keepdim=True) / shown.sum(dim=1, keepdim=True)).detach().to(k.dtype)
    offset = (q * centre).sum(dim=-1, keepdim=True) * scale

    def table(x: Tensor, first: Tensor, second: Tensor, *made_up: tuple[float, float]) -> Tensor:
        """`x` with two channels added, and then the made-up tokens, which have nothing but these, as rows."""
        channels = [each.to(x.dtype).expand(masks, x.shape[1], heads, 1) for each in (first, second)]
        x = F.pad(torch.cat([x, *channels], dim=-1), (0, spare))
        tokens = F.pad(x.new_tensor(made_up), (d, spare))[None, :, None, :]
        return torch.cat([x, tokens.expand(masks, -1, heads, -1)], dim=1).flatten(1, 2)

    one, zero = q.new_ones(1, 1, 1, 1), q.new_zeros(1, 1, 1, 1)
    invisible = -3e4 if q.dtype == torch.float16 else -1e20
    # First channel: what a key adds to its logits. Second: the query's offset travels along, unseen by keys.
    queries = table(q, one, offset, (1, 0))
    keys = table(k - centre, (1 - shown) * invisible, zero, (invisible, 0), (null_channel, 0))
    values = table(v, one, zero, (0, 0), (0, NULL_VALUE))

    def attend(branch: Branch) -> Part:
        q, k, v = (
            _slots(x, rows, heads)
            for x, rows in ((queries, branch.queries), (keys, branch.keys), (values, branch.keys))
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        out, q = (x.transpose(1, 2).reshape(masks, *branch.queries.shape, -1) for x in (out, q))
        smallest = max(
            torch.finfo(out.dtype).tiny * torch.finfo(out.dtype).eps, torch.finfo(torch.float).tiny
        )
        real, null, offset = (x.to(wide) for x in (out[..., d], out[..., d + 1], q[..., d + 1]))
        some, null = real.clamp(min=smallest), null.clamp(min=smallest) / NULL_VALUE
        before = torch.where(real > 0, null_channel * scale + some.log() - null.log() + offset, UNCOVERED)
        lse = torch.logaddexp(before, branch.log_padding.to(before.dtype))
        factor = (before - lse).exp() / some
        return Part(out.flatten(1, 3), factor.flatten(1), lse.flatten(1))

    return attend


def _slots(table: Tensor, rows: Tensor, heads: int) -> Tensor:
    """Gather `rows` [n, m, H] of `table` [M, rows, channels] into [M * n, H, m, channels], for kernels."""
    gathered = table.index_select(1, rows.flatten())
    return gathered.reshape(-1, rows.shape[1], heads, table.shape[2]).transpose(1, 2)
