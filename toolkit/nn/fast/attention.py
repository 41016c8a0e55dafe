"""Self-attention with dropout on the probabilities, one utterance at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.nn.fast.bits import DropoutBits, apply_mask, apply_mask_
from toolkit.nn.fast.common import takes_fast_form, wants_gradient


def attention(
    qkv: Tensor,
    lengths: list[int],
    num_heads: int,
    *,
    p: float = 0.0,
    bits: DropoutBits | None = None,
    fast: bool = True,
) -> Tensor:
    """softmax(q k' / sqrt(head size)) v in each utterance and head, with dropout on the probabilities.

    Arguments
    ---------
    qkv : (rows, 3 * dim): queries, keys and values side by side; rows are the frames of all utterances in turn.
    lengths : frames of each utterance; they sum to rows.
    num_heads : heads, of dim / num_heads channels each.
    p : drop probability of the attention probabilities, used when ``bits`` is given.
    bits : where dropout decisions come from; None means evaluation.
    fast : False takes the plain formula.

    Returns
    -------
    (rows, dim), the heads side by side.
    """
    p = p if bits is not None else 0.0
    if takes_fast_form(fast, qkv):
        if wants_gradient(qkv):
            return _Attention.apply(qkv, lengths, num_heads, p, bits)
        return _attend(qkv, lengths, num_heads, p, bits, None)
    return plain_attention(qkv, lengths, num_heads, p=p, bits=bits)


def plain_attention(
    qkv: Tensor, lengths: list[int], num_heads: int, *, p: float = 0.0, bits: DropoutBits | None = None
) -> Tensor:
    """The formula of :func:`attention`, utterance by utterance (CPU decisions are drawn in the same order)."""
    outputs = []
    size = qkv.shape[1] // 3 // num_heads
    for rows in qkv.split(lengths):
        frames = len(rows)
        # (frames, 3 * dim) -> three of (heads, frames, channels of a head)
        q, k, v = rows.view(frames, 3, num_heads, size).permute(1, 2, 0, 3)
        probabilities = torch.softmax(q @ k.transpose(1, 2) * size**-0.5, -1)
        if p > 0 and bits is not None:
            if bits.device.type == "cpu":
                keep = bits.keep(p, *probabilities.shape)
                probabilities = probabilities.masked_fill(keep == 0, 0.0) / (1 - p)
            else:
                probabilities = F.dropout(probabilities, p)
        outputs.append((probabilities @ v).transpose(0, 1).reshape(frames, num_heads * size))
    return torch.cat(outputs)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, p: float) -> Tensor:
    """torch's own fused attention over a padded batch, for accelerators.

    Arguments
    ---------
    q, k, v : (batch, heads, frames, channels of a head).
    padding : (batch, frames) bool, True where a key is padding; None where nothing is.
    p : drop probability (0 in evaluation).
    """
    allowed = None if padding is None else ~padding[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p)


def _attend(
    qkv: Tensor, lengths: list[int], num_heads: int, p: float, bits: DropoutBits | None, kept: list[Tensor] | None
) -> Tensor:
    """The forward pass; appends probabilities before and after dropout of each utterance to ``kept``."""
    size = qkv.shape[1] // 3 // num_heads
    out = qkv.new_empty(qkv.shape[0], num_heads * size)
    scale, keep_scale = size**-0.5, 1 / (1 - p)
    for rows, target in zip(qkv.split(lengths), out.split(lengths), strict=True):
        frames = len(rows)
        x = rows.view(frames, 3, num_heads, size)
        scores = torch.bmm((x[:, 0] * scale).transpose(0, 1), x[:, 1].permute(1, 2, 0))
        probabilities = torch.softmax(scores, -1)
        if p > 0:
            # without a backward pass the softmax may be overwritten: nobody needs it again
            mask = apply_mask_ if kept is None else apply_mask
            dropped = mask(probabilities, bits.keep(p, num_heads, frames, frames))
        else:
            dropped = probabilities
        result = torch.bmm(dropped, x[:, 2].transpose(0, 1))
        if p > 0:
            result.mul_(keep_scale)
        target.view(frames, num_heads, size).copy_(result.transpose(0, 1))
        if kept is not None:
            kept += [probabilities, dropped]
    return out


class _Attention(torch.autograd.Function):
    """With p the softmax, d = mask * p and o = c * d v, c = 1 / (1 - drop probability):

        grad scores = d * (c grad_o v') - p * rowsum(grad_o * o)

    so backward needs neither the mask nor a softmax backward. The matrices of one utterance stay in the cache
    (12 MB in bfloat16 at 10 s); flash attention has nothing to win at these lengths on a CPU.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, lengths: list[int], num_heads: int, p: float, bits: DropoutBits | None) -> Tensor:
        kept: list[Tensor] = []
        out = _attend(qkv, lengths, num_heads, p, bits, kept)
        ctx.save_for_backward(qkv, out, *kept)
        ctx.settings = (lengths, num_heads, p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        qkv, out, *kept = ctx.saved_tensors
        lengths, num_heads, p = ctx.settings
        size = out.shape[1] // num_heads
        scale, keep_scale = size**-0.5, 1 / (1 - p)
        grad_qkv = torch.empty_like(qkv)
        parts = zip(*(t.split(lengths) for t in (qkv, grad_qkv, grad, out)), strict=True)
        for b, (rows, grad_rows, grad_out, out_rows) in enumerate(parts):
            probabilities, dropped = kept[2 * b : 2 * b + 2]
            frames = len(rows)
            # (frames, channels) -> (heads, frames, channels of a head)
            x = rows.view(frames, 3, num_heads, size)
            dx = grad_rows.view(frames, 3, num_heads, size)
            do = grad_out.reshape(frames, num_heads, size)
            wide = torch.float32 if qkv.dtype == torch.bfloat16 else qkv.dtype
            delta = (do.to(wide) * out_rows.view(frames, num_heads, size)).sum(-1).t().unsqueeze(-1).to(qkv.dtype)
            do = (do * keep_scale).transpose(0, 1)
            dx[:, 2].copy_(torch.bmm(dropped.transpose(1, 2), do).transpose(0, 1))
            ds = torch.bmm(do, x[:, 2].permute(1, 2, 0)).mul_(dropped).addcmul_(probabilities, delta, value=-1)
            dx[:, 0].copy_(torch.bmm(ds, x[:, 1].transpose(0, 1)).mul_(scale).transpose(0, 1))
            dx[:, 1].copy_(torch.bmm(ds.transpose(1, 2), x[:, 0].transpose(0, 1)).mul_(scale).transpose(0, 1))
        return grad_qkv, None, None, None, None
