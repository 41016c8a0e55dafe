"""Self-attention over a padded batch of short utterances, all of them in one product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.nn.fast.bits import DropoutBits, apply_mask
from toolkit.nn.fast.common import takes_fast_form, wants_gradient

SHORT_FRAMES = 192
"""Up to this many frames the matrices of a batch are small, and setting up products for each utterance costs more."""


def batched_attention(
    qkv: Tensor,
    padding: Tensor | None,
    batch: int,
    num_heads: int,
    *,
    p: float = 0.0,
    bits: DropoutBits | None = None,
    fast: bool = True,
) -> Tensor:
    """softmax(q k' / sqrt(head size)) v in each utterance and head; keys in the padding count nothing (CPU).

    Arguments
    ---------
    qkv : (batch * frames, 3 * dim): queries, keys and values side by side.
    padding : (batch, frames) bool, True in the padding (no utterance wholly); None where there is none.
    batch : utterances.
    num_heads : heads, of dim / num_heads channels each.
    p : drop probability of the attention probabilities, used when ``bits`` is given.
    bits : where dropout decisions come from; None means evaluation.
    fast : False takes the plain formula.

    Returns
    -------
    (batch * frames, dim), the heads side by side. Rows in the padding hold numbers without meaning.
    """
    keep = None
    if p > 0 and bits is not None:
        frames = len(qkv) // batch
        keep = bits.keep(p, batch * num_heads, frames, frames)
    if not takes_fast_form(fast, qkv):
        return plain_batched_attention(qkv, padding, batch, num_heads, p, keep)
    if wants_gradient(qkv):
        return _BatchedAttention.apply(qkv, padding, batch, num_heads, p, keep)
    return _attend(qkv, padding, batch, num_heads, p, keep)[0]


def plain_batched_attention(
    qkv: Tensor, padding: Tensor | None, batch: int, num_heads: int, p: float, keep: Tensor | None
) -> Tensor:
    """The formula of :func:`batched_attention`; ``keep`` is the mask of `DropoutBits.keep`, or None."""
    # (batch * frames, 3 * dim) -> three of (batch, heads, frames, channels of a head)
    q, k, v = qkv.view(batch, -1, 3, num_heads, qkv.shape[1] // 3 // num_heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], float("-inf"))
    probabilities = torch.softmax(scores, -1)
    if keep is not None:
        probabilities = probabilities.masked_fill(keep.view(scores.shape) == 0, 0.0) / (1 - p)
    return (probabilities @ v).transpose(1, 2).reshape(len(qkv), -1)


def _heads(qkv: Tensor, batch: int, num_heads: int) -> Tensor:
    """(batch * frames, 3 * dim) -> (3, batch * heads, frames, channels of a head), a copy.

    A copy also of a single utterance, for which ``reshape`` would give a view: the queries are scaled in place.
    """
    frames, size = len(qkv) // batch, qkv.shape[1] // 3 // num_heads
    x = qkv.view(batch, frames, 3, num_heads, size).permute(2, 0, 3, 1, 4)
    return x.clone(memory_format=torch.contiguous_format).view(3, batch * num_heads, frames, size)


def _attend(
    qkv: Tensor, padding: Tensor | None, batch: int, num_heads: int, p: float, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the probabilities (batch * heads, frames, frames) before and after dropout (without scale)."""
    q, k, v = _heads(qkv, batch, num_heads)
    scores = torch.bmm(q.mul_(q.shape[-1] ** -0.5), k.transpose(1, 2))
    if padding is not None:
        scores.view(batch, num_heads, *scores.shape[1:]).masked_fill_(padding[:, None, None], float("-inf"))
    probabilities = torch.softmax(scores, -1)
    dropped = probabilities if keep is None else apply_mask(probabilities, keep)
    out = torch.bmm(dropped, v)
    if keep is not None:
        out.mul_(1 / (1 - p))
    out = out.view(batch, num_heads, -1, out.shape[2]).transpose(1, 2).reshape(len(qkv), -1)
    return out, probabilities, dropped


class _BatchedAttention(torch.autograd.Function):
    """Backward as in `attention`: grad scores = d * (c grad_o v') - p * rowsum(grad_o * o)."""

    @staticmethod
    def forward(ctx, qkv: Tensor, padding: Tensor | None, batch: int, num_heads: int, p: float, keep: Tensor | None):
        out, probabilities, dropped = _attend(qkv, padding, batch, num_heads, p, keep)
        ctx.save_for_backward(qkv, out, probabilities, dropped)
        ctx.settings = (batch, num_heads, 1.0 if keep is None else 1 / (1 - p))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        qkv, out, probabilities, dropped = ctx.saved_tensors
        batch, num_heads, keep_scale = ctx.settings
        q, k, v = _heads(qkv, batch, num_heads)
        frames, size = q.shape[1:]
        scale = size**-0.5
        wide = torch.float32 if qkv.dtype == torch.bfloat16 else qkv.dtype
        # (batch * frames, dim) -> (batch * heads, frames, channels of a head)
        by_head = (batch, frames, num_heads, size)
        delta = (grad.to(wide).reshape(by_head) * out.view(by_head)).sum(-1)
        delta = delta.transpose(1, 2).reshape(batch * num_heads, frames, 1).to(qkv.dtype)
        do = (grad.reshape(by_head) * keep_scale).transpose(1, 2).reshape(batch * num_heads, frames, size)
        ds = torch.bmm(do, v.transpose(1, 2)).mul_(dropped).addcmul_(probabilities, delta, value=-1)
        grads = torch.stack(
            [
                torch.bmm(ds, k).mul_(scale),
                torch.bmm(ds.transpose(1, 2), q).mul_(scale),
                torch.bmm(dropped.transpose(1, 2), do),
            ]
        )
        # (3, batch * heads, frames, channels of a head) -> (batch * frames, 3 * dim)
        grads = grads.view(3, batch, num_heads, frames, size).permute(1, 3, 0, 2, 4).reshape(len(qkv), -1)
        return grads, None, None, None, None, None
