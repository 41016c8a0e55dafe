"""The grouped convolution over a long window that gives the transformer its positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.nn.fast.common import takes_fast_form, wants_gradient
from toolkit.nn.fast.first_convolution import zero_padding


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


def _copy_windows(grouped: Tensor, lengths: list[int], kernel: int, out: Tensor) -> Tensor:
    """One group's windows of all utterances, (sum of lengths, kernel * channels), from overlapping views to ``out``.

    One buffer for all groups stays in the cache: a fresh one for each is four times slower.
    """
    channels = grouped.shape[2]
    views = [
        x.as_strided((n, kernel * channels), (channels, 1), x.storage_offset())
        for x, n in zip(grouped, lengths, strict=True)
    ]
    return torch.cat(views, out=out)  # copies row by row, three times as fast as copy_ here


def _scatter_rows(rows: Tensor, out: Tensor, columns: slice, lengths: list[int]) -> None:
    """Write a group's rows (sum of lengths, channels) to its columns of ``out`` (batch, frames, dim)."""
    for b, part in enumerate(rows.split(lengths)):
        out[b, : len(part), columns] = part


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
    buffer = x.new_empty(sum(lengths), kernel * channels)
    for g in range(groups):
        columns = slice(g * channels, (g + 1) * channels)
        windows = _copy_windows(grouped[g], lengths, kernel, buffer)
        _scatter_rows(F.linear(windows, taps[g].view(channels, -1), bias[columns]), out, columns, lengths)
    return out, grouped


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
        dx, d_taps = _empty_output(grad, lengths), torch.empty_like(taps)
        buffer = grad.new_empty(sum(lengths), kernel * channels)
        for g in range(groups):
            columns = slice(g * channels, (g + 1) * channels)
            windows = _copy_windows(grad_grouped[g], lengths, kernel, buffer)
            _scatter_rows(windows @ reversed_taps[g].view(-1, channels), dx, columns, lengths)
            rows = torch.cat([grad_grouped[g, b, before : before + n] for b, n in enumerate(lengths)])
            windows = _copy_windows(grouped[g], lengths, kernel, buffer)
            torch.mm(rows.t(), windows, out=d_taps[g].view(channels, -1))
        d_bias = sum(grad[b, :n].sum(0) for b, n in enumerate(lengths))
        return dx, d_taps, d_bias, None
