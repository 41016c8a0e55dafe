"""Self-attention with dropout on the probabilities, one utterance at a time."""

from __future__ import annotations

from collections.abc import Iterator

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
    queries: Tensor | None = None,
    query_lengths: list[int] | None = None,
    fast: bool = True,
) -> Tensor:
    """softmax(q k' / sqrt(head size)) v in each utterance and head, with dropout on the probabilities.

    Arguments
    ---------
    qkv : (rows, 3 * dim): queries, keys and values side by side; rows are the frames of all utterances in turn,
        and perhaps some more that belong to none. With ``queries`` (rows, 2 * dim): keys and values only.
    lengths : frames of each utterance.
    num_heads : heads, of dim / num_heads channels each.
    p : drop probability of the attention probabilities, used when ``bits`` is given.
    bits : where dropout decisions come from; None means evaluation.
    queries, query_lengths : (query rows, dim) and how many of them ask in each utterance, where not all frames do.
    fast : False takes the plain formula.

    Returns
    -------
    (rows, dim), or (query rows, dim): the heads side by side; zero in rows that belong to no utterance.
    """
    p = p if bits is not None else 0.0
    if query_lengths is None:
        query_lengths = lengths
    if takes_fast_form(fast, qkv, queries):
        if wants_gradient(qkv, queries):
            return _Attention.apply(qkv, queries, lengths, query_lengths, num_heads, p, bits)
        return _attend(qkv, queries, lengths, query_lengths, num_heads, p, bits, None)
    return plain_attention(qkv, lengths, num_heads, p=p, bits=bits, queries=queries, query_lengths=query_lengths)


def plain_attention(
    qkv: Tensor,
    lengths: list[int],
    num_heads: int,
    *,
    p: float = 0.0,
    bits: DropoutBits | None = None,
    queries: Tensor | None = None,
    query_lengths: list[int] | None = None,
) -> Tensor:
    """The formula of :func:`attention`, utterance by utterance (CPU decisions are drawn in the same order)."""
    if queries is None:
        queries, qkv = qkv.split([qkv.shape[1] // 3, 2 * qkv.shape[1] // 3], 1)
    size = queries.shape[1] // num_heads
    outputs = []
    for asked, rows in _utterances(query_lengths or lengths, lengths):
        # (frames, heads * size) -> (heads, frames, size)
        q = queries[asked].view(-1, num_heads, size).transpose(0, 1)
        k, v = qkv[rows].view(-1, 2, num_heads, size).permute(1, 2, 0, 3)
        probabilities = torch.softmax(q @ k.transpose(1, 2) * size**-0.5, -1)
        if p > 0 and bits is not None:
            if bits.device.type == "cpu":
                keep = bits.keep(p, *probabilities.shape)
                probabilities = probabilities.masked_fill(keep == 0, 0.0) / (1 - p)
            else:
                probabilities = F.dropout(probabilities, p)
        outputs.append((probabilities @ v).transpose(0, 1).reshape(-1, num_heads * size))
    rest = len(queries) - sum(map(len, outputs))
    return torch.cat([*outputs, queries.new_zeros(rest, num_heads * size)])


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


def _utterances(query_lengths: list[int], lengths: list[int]) -> Iterator[tuple[slice, slice]]:
    """For each utterance with queries: where these are, and where its frames are."""
    first_query, first_row = 0, 0
    for m, n in zip(query_lengths, lengths, strict=True):
        if m:
            yield slice(first_query, first_query + m), slice(first_row, first_row + n)
        first_query += m
        first_row += n


def _by_head(rows: Tensor, parts: int, num_heads: int) -> Tensor:
    """(frames, parts * heads * size) -> (parts, heads, frames, size), copied.

    The copy costs a tenth of a product of one head and frame; products on strided rows lose two to four tenths.
    """
    size = rows.shape[1] // parts // num_heads
    by_head = rows.reshape(len(rows), parts, num_heads, size).permute(1, 2, 0, 3)
    return by_head.clone(memory_format=torch.contiguous_format)


def _head_view(rows: Tensor, part: int, num_heads: int, size: int) -> Tensor:
    """One part of rows (frames, parts * heads * size) as a view (heads, frames, size), to write products to."""
    columns = slice(part * num_heads * size, (part + 1) * num_heads * size)
    return rows[:, columns].view(len(rows), num_heads, size).transpose(0, 1)


def _attend(
    qkv: Tensor,
    queries: Tensor | None,
    lengths: list[int],
    query_lengths: list[int],
    num_heads: int,
    p: float,
    bits: DropoutBits | None,
    kept: list[Tensor] | None,
) -> Tensor:
    """The forward pass; appends what backward needs to ``kept``: queries (scaled), keys and values by head, then the
    probabilities before and after dropout of each utterance."""
    asking = qkv if queries is None else queries
    dim = qkv.shape[1] // 3 if queries is None else queries.shape[1]
    size = dim // num_heads
    out = qkv.new_empty(len(asking), dim)
    out[sum(query_lengths) :] = 0
    q = _by_head(asking[:, :dim], 1, num_heads).mul_(size**-0.5)
    kv = _by_head(qkv[:, -2 * dim :], 2, num_heads)
    if kept is not None:
        kept += [q, kv]
    for asked, rows in _utterances(query_lengths, lengths):
        probabilities = torch.softmax(torch.bmm(q[0, :, asked], kv[0, :, rows].transpose(1, 2)), -1)
        dropped = probabilities
        if p > 0:
            # without a backward pass the softmax may be overwritten: nobody needs it again
            mask = apply_mask_ if kept is None else apply_mask
            dropped = mask(probabilities, bits.keep(p, *probabilities.shape))
        torch.bmm(dropped, kv[1, :, rows], out=_head_view(out[asked], 0, num_heads, size))
        if kept is not None:
            kept += [probabilities, dropped]
    return out.mul_(1 / (1 - p)) if p > 0 else out


class _Attention(torch.autograd.Function):
    """With p the softmax, d = mask * p and o = c * d v, c = 1 / (1 - drop probability):

        grad scores = d * (c grad_o v') - p * rowsum(grad_o * o)

    so backward needs neither the mask nor a softmax backward. The matrices of one utterance stay in the cache
    (12 MB in bfloat16 at 10 s); flash attention has nothing to win at these lengths on a CPU.
    """

    @staticmethod
    def forward(ctx, qkv, queries, lengths: list[int], query_lengths: list[int], num_heads: int, p: float, bits):
        kept: list[Tensor] = []
        out = _attend(qkv, queries, lengths, query_lengths, num_heads, p, bits, kept)
        ctx.save_for_backward(out, *kept)
        ctx.settings = (lengths, query_lengths, num_heads, p, len(qkv), queries is not None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        out, q, kv, *kept = ctx.saved_tensors
        lengths, query_lengths, num_heads, p, total, separate = ctx.settings
        dim = out.shape[1]
        size = dim // num_heads
        d_qkv = out.new_empty(total, (2 if separate else 3) * dim)
        d_queries = torch.empty_like(out) if separate else d_qkv
        first = 0 if separate else 1
        by_head = (len(out), num_heads, size)
        delta = torch.linalg.vecdot(grad.reshape(by_head), out.view(by_head))
        d_out = _by_head(grad, 1, num_heads)
        if p > 0:
            d_out.mul_(1 / (1 - p))
        for i, (asked, rows) in enumerate(_utterances(query_lengths, lengths)):
            probabilities, dropped = kept[2 * i : 2 * i + 2]
            do = d_out[0, :, asked]
            dk, dv = (_head_view(d_qkv[rows], first + part, num_heads, size) for part in range(2))
            torch.bmm(dropped.transpose(1, 2), do, out=dv)
            ds = torch.bmm(do, kv[1, :, rows].transpose(1, 2)).mul_(dropped)
            ds.addcmul_(probabilities, delta[asked].t()[:, :, None], value=-1)
            torch.bmm(ds, kv[0, :, rows], out=_head_view(d_queries[asked], 0, num_heads, size))
            torch.bmm(ds.transpose(1, 2), q[0, :, asked], out=dk)
        _zero_unasked(d_qkv, d_queries, lengths, query_lengths)
        d_queries[:, :dim].mul_(size**-0.5)
        return d_qkv, (d_queries if separate else None), None, None, None, None, None


def _zero_unasked(d_qkv: Tensor, d_queries: Tensor, lengths: list[int], query_lengths: list[int]) -> None:
    """Zero gradients for rows behind the last utterance, and for the frames of utterances without a query."""
    d_qkv[sum(lengths) :] = 0
    d_queries[sum(query_lengths) :] = 0
    first = 0
    for m, n in zip(query_lengths, lengths, strict=True):
        if m == 0:
            d_qkv[first : first + n] = 0
        first += n
