"""The grouped convolution over a long window that gives the transformer its positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.nn.fast.common import takes_fast_form, wants_gradient, zero_behind
from toolkit.nn.fast.first_convolution import zero_padding

PIECE_BYTES = 25 << 19
"""Windows that are laid out at a time, 12.5 MB: 10 s of BASE's in float32. More leaves the cache, less makes the
products too small."""


def window_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, lengths: list[int] | Tensor, *, groups: int, fast: bool = True
) -> Tensor:
    """A grouped convolution of stride 1 that keeps the number of frames, each utterance on its own.

    Frame t sees the ``kernel`` frames from ``t - kernel // 2`` on; before the first and after an utterance's last
    frame there are zeros, whatever ``x`` holds there.

    Arguments
    ---------
    x : (batch, frames, dim).
    weight : (dim, dim / groups, kernel), in the format of ``x``.
    bias : (dim,), in the format of ``x``.
    lengths : real frames of each utterance, see :func:`toolkit.nn.fast.common.real_frames`.
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


def plain_window_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, lengths: list[int] | Tensor, *, groups: int
) -> Tensor:
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
    # (batch, frames, groups, channels) -> (groups, batch, frames, channels)
    out[:, :, before : before + frames] = x.view(batch, frames, groups, -1).permute(2, 0, 1, 3)
    for b, n in enumerate(lengths):
        out[:, b, before + n :] = 0
    return out


def _pieces(batch: int, utterance_bytes: int) -> list[slice]:
    """Neighboring utterances whose windows fit into PIECE_BYTES together, one utterance at least."""
    size = max(1, PIECE_BYTES // max(utterance_bytes, 1))
    return [slice(first, min(first + size, batch)) for first in range(0, batch, size)]


def _copy_windows(grouped: Tensor, frames: int, kernel: int, buffer: Tensor) -> Tensor:
    """One group's windows of a piece's utterances, (utterances * frames, kernel * channels), written to ``buffer``.

    The view overlaps itself, and products do not take such: they would copy as well, each time to fresh memory.
    Padding takes part: with the sampler's buckets there is little, and one copy of a whole piece is several times
    faster than one for each short utterance.
    """
    utterances, rows, channels = grouped.shape
    width = kernel * channels
    view = grouped.as_strided((utterances, frames, width), (rows * channels, channels, 1), grouped.storage_offset())
    windows = buffer[: utterances * frames]
    windows.view(view.shape).copy_(view)
    return windows


def _forward(x: Tensor, taps: Tensor, bias: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The result, and the input in the grouped layout."""
    groups, channels, kernel, _ = taps.shape
    frames = x.shape[1]
    grouped = _grouped(x, lengths, groups, kernel, kernel // 2)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    pieces, buffer = _pieces_and_buffer(x, kernel * channels)
    for g in range(groups):
        columns = slice(g * channels, (g + 1) * channels)
        for piece in pieces:
            windows = _copy_windows(grouped[g, piece], frames, kernel, buffer)
            y = F.linear(windows, taps[g].view(channels, -1), bias[columns])
            out[piece, :, columns] = y.view(-1, frames, channels)
    zero_behind(out, lengths, range(len(out)))
    return out, grouped


def _pieces_and_buffer(x: Tensor, width: int) -> tuple[list[slice], Tensor]:
    """How the utterances of (batch, frames, dim) are taken, and room for the windows of one piece."""
    batch, frames, _ = x.shape
    pieces = _pieces(batch, frames * width * x.element_size())
    return pieces, x.new_empty((pieces[0].stop if pieces else 0) * frames, width)


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
        frames = grad.shape[1]
        # input frame s feeds output t through tap s - t + kernel // 2
        before = kernel - 1 - kernel // 2
        grad_grouped = _grouped(grad, lengths, groups, kernel, before)
        # (groups, outputs, kernel, inputs) -> (groups, kernel, outputs, inputs)
        reversed_taps = taps.transpose(1, 2).contiguous().flip(1)
        dx = torch.empty_like(grad, memory_format=torch.contiguous_format)
        d_taps = torch.zeros_like(taps)
        pieces, buffer = _pieces_and_buffer(grad, kernel * channels)
        for g in range(groups):
            columns = slice(g * channels, (g + 1) * channels)
            for piece in pieces:
                windows = _copy_windows(grad_grouped[g, piece], frames, kernel, buffer)
                products = windows @ reversed_taps[g].view(-1, channels)
                dx[piece, :, columns] = products.view(-1, frames, channels)
                # zero where there is padding, so that the windows there add nothing
                rows = grad_grouped[g, piece, before : before + frames].flatten(0, 1)
                windows = _copy_windows(grouped[g, piece], frames, kernel, buffer)
                d_taps[g].view(channels, -1).addmm_(rows.t(), windows)
        zero_behind(dx, lengths, range(len(dx)))
        # the real rows, of all groups: (groups, batch, frames, channels) -> (dim,)
        d_bias = grad_grouped[:, :, before : before + frames].sum((1, 2)).flatten()
        return dx, d_taps, d_bias, None
