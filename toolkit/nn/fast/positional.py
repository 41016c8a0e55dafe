"""The grouped convolution over a long window that gives the transformer its positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.nn.fast.common import takes_fast_form, wants_gradient
from toolkit.nn.fast.first_convolution import zero_padding

PIECE_BYTES = 25 << 19
"""Windows that are laid out at a time, 12.5 MB: 10 s of BASE's in float32. More leaves the cache, less makes the
products too small."""


def window_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, lengths: list[int], *, groups: int, fast: bool = True
) -> Tensor:
    """A grouped convolution of stride 1 that keeps the number of frames, each utterance on its own.

    Frame t sees the ``kernel`` frames from ``t - kernel // 2`` on; before the first and after an utterance's last
    frame there are zeros, whatever ``x`` holds there.

    Arguments
    ---------
    x : (batch, frames, dim).
    weight : (dim, dim / groups, kernel), in the format of ``x``.
    bias : (dim,), in the format of ``x``.
    lengths : real frames of each utterance.
    groups : groups of channels.
    fast : False takes the plain formula.

    Returns
    -------
    (batch, frames, dim), zero in the padding.
    """
    if takes_fast_form(fast, x, weight):
        # (dim, inputs, kernel) -> (groups, outputs, kernel, inputs)
        taps = weight.view(groups, -1, *weight.shape[1:]).transpose(2, 3).contiguous()
        if wants_gradient(x, weight, bias):
            return _WindowConvolution.apply(x, taps, bias, lengths)
        return _forward(x, taps, bias, lengths)[0]
    return plain_window_convolution(x, weight, bias, lengths, groups=groups)


def plain_window_convolution(x: Tensor, weight: Tensor, bias: Tensor, lengths: list[int], *, groups: int) -> Tensor:
    """The formula of :func:`window_convolution`."""
    kernel, frames = weight.shape[2], x.shape[1]
    # (batch, frames, dim) -> (batch, dim, frames); an even kernel gives one frame too many at the end
    z = F.conv1d(zero_padding(x, lengths).transpose(1, 2), weight, bias, padding=kernel // 2, groups=groups)
    return zero_padding(z[..., :frames].transpose(1, 2), lengths)


def _grouped(x: Tensor, lengths: list[int], groups: int, kernel: int, before: int) -> Tensor:
    """(batch, frames, dim) -> (groups, batch, frames + kernel, dim / groups), ``before`` zero frames in front and
    zeros behind each utterance: with a group's channels side by side, a window of the kernel is consecutive."""
    batch, frames, dim = x.shape
    out = x.new_empty(groups, batch, frames + kernel, dim // groups)
    out[:, :, :before] = 0
    for b, n in enumerate(lengths):
        # (n, groups, channels) -> (groups, n, channels)
        out[:, b, before : before + n] = x[b, :n].view(n, groups, dim // groups).transpose(0, 1)
        out[:, b, before + n :] = 0
    return out


def _pieces(lengths: list[int], row_bytes: int) -> list[slice]:
    """Neighboring utterances whose windows fit into PIECE_BYTES together, one utterance at least."""
    pieces: list[slice] = []
    rows = 0
    for b, n in enumerate(lengths):
        if pieces and (rows + n) * row_bytes <= PIECE_BYTES:
            pieces[-1] = slice(pieces[-1].start, b + 1)
            rows += n
        else:
            pieces.append(slice(b, b + 1))
            rows = n
    return pieces


def _copy_windows(grouped: Tensor, lengths: list[int], kernel: int, buffer: Tensor) -> Tensor:
    """One group's windows of a piece's utterances, (sum of lengths, kernel * channels), written to ``buffer``.

    The views overlap, and products do not take such: they would copy as well, each time to fresh memory.
    """
    channels = grouped.shape[2]
    views = [
        x.as_strided((n, kernel * channels), (channels, 1), x.storage_offset())
        for x, n in zip(grouped, lengths, strict=True)
    ]
    return torch.cat(views, out=buffer[: sum(lengths)])


def _scatter_rows(rows: Tensor, out: Tensor, lengths: list[int]) -> None:
    """Write rows (sum of lengths, channels) to their utterances in ``out`` (batch, frames, channels)."""
    for target, part in zip(out, rows.split(lengths), strict=True):
        target[: len(part)] = part


def _empty_output(like: Tensor, lengths: list[int]) -> Tensor:
    """A result (batch, frames, dim) to be written, already zero in the padding."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    for b, n in enumerate(lengths):
        out[b, n:] = 0
    return out


def _forward(x: Tensor, taps: Tensor, bias: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The result, and the input in the grouped layout."""
    groups, channels, kernel, _ = taps.shape
    grouped = _grouped(x, lengths, groups, kernel, kernel // 2)
    out = _empty_output(x, lengths)
    pieces = _pieces(lengths, kernel * channels * x.element_size())
    buffer = _buffer(x, lengths, pieces, kernel * channels)
    for g in range(groups):
        columns = slice(g * channels, (g + 1) * channels)
        for piece in pieces:
            windows = _copy_windows(grouped[g, piece], lengths[piece], kernel, buffer)
            y = F.linear(windows, taps[g].view(channels, -1), bias[columns])
            _scatter_rows(y, out[piece, :, columns], lengths[piece])
    return out, grouped


def _buffer(like: Tensor, lengths: list[int], pieces: list[slice], width: int) -> Tensor:
    """Room for the windows of the largest piece."""
    return like.new_empty(max((sum(lengths[piece]) for piece in pieces), default=0), width)


class _WindowConvolution(torch.autograd.Function):
    """One product per group on copied windows. The gradient of the input is a convolution with the reversed taps."""

    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor, bias: Tensor, lengths: list[int]) -> Tensor:
        out, grouped = _forward(x, taps, bias, lengths)
        ctx.save_for_backward(grouped, taps)
        ctx.lengths = lengths
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grouped, taps = ctx.saved_tensors
        lengths = ctx.lengths
        groups, channels, kernel, _ = taps.shape
        # input frame s feeds output t through tap s - t + kernel // 2
        before = kernel - 1 - kernel // 2
        grad_grouped = _grouped(grad, lengths, groups, kernel, before)
        # (groups, outputs, kernel, inputs) -> (groups, kernel, outputs, inputs)
        reversed_taps = taps.transpose(1, 2).contiguous().flip(1)
        dx, d_taps = _empty_output(grad, lengths), torch.zeros_like(taps)
        pieces = _pieces(lengths, kernel * channels * grad.element_size())
        buffer = _buffer(grad, lengths, pieces, kernel * channels)
        for g in range(groups):
            columns = slice(g * channels, (g + 1) * channels)
            for piece in pieces:
                sizes = lengths[piece]
                windows = _copy_windows(grad_grouped[g, piece], sizes, kernel, buffer)
                _scatter_rows(windows @ reversed_taps[g].view(-1, channels), dx[piece, :, columns], sizes)
                ends = [before + n for n in sizes]
                rows = torch.cat([x[before:end] for x, end in zip(grad_grouped[g, piece], ends, strict=True)])
                windows = _copy_windows(grouped[g, piece], sizes, kernel, buffer)
                d_taps[g].view(channels, -1).addmm_(rows.t(), windows)
        d_bias = sum(grad[b, :n].sum(0) for b, n in enumerate(lengths))
        return dx, d_taps, d_bias, None
