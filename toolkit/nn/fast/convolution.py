"""Strided convolutions over (batch, frames, channels) as matrix products on views, with their norm and GELU.

Frame t of the output sees ``kernel`` input frames from ``t * stride`` on. Cut the kernel into chunks of ``stride``
taps: the input of one chunk, for all t, is a matrix whose rows are ``stride * channels`` numbers apart and at most
that wide, so it is a view of the input and each chunk is one accumulating product. No copies, in both directions.
BASE's layers (3 or 2 taps, stride 2) take two products or one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.nn.fast.common import takes_fast_form, utterance_groups, wants_gradient, zero_behind
from toolkit.nn.fast.first_convolution import zero_padding
from toolkit.nn.fast.linear import layer_norm

MAX_CHUNKS = 8
"""With more chunks (a long kernel at a small stride) the library's convolution is used instead."""


def convolution_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    frames: list[int] | Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    fast: bool = True,
) -> Tensor:
    """gelu(convolution + bias), or gelu(layer_norm(convolution + bias)) where the norm's parameters are given.

    Arguments
    ---------
    x : (batch, input frames, input channels).
    weight : (channels, input channels, kernel), in the format of ``x``.
    bias : (channels,) in the format of ``x``, or None.
    stride : input frames from one output frame to the next.
    frames : real output frames of each utterance, see :func:`toolkit.nn.fast.common.real_frames`.
    norm_weight, norm_bias : (channels,) float32 (or float64), a norm over the channels of each frame; or None.
    fast : False takes the plain formula.

    Returns
    -------
    (batch, frames, channels), zero in the padding. Where the input frames are a whole number of strides there can be a
    few more frames than the plain formula gives, all padding.
    """
    kernel = weight.shape[2]
    if takes_fast_form(fast, x, weight) and -(-kernel // stride) <= MAX_CHUNKS:
        # (channels, inputs, kernel) -> (channels, kernel * inputs): rows in the order in which frames lie in memory
        rows = weight.permute(0, 2, 1).reshape(weight.shape[0], -1)
        arguments = (x.contiguous(), rows, bias, norm_weight, norm_bias, kernel, stride, frames, eps)
        if wants_gradient(x, weight, bias, norm_weight):
            return _ConvolutionGelu.apply(*arguments)
        return _forward(*arguments, keep=False)[0]
    return plain_convolution_gelu(
        x, weight, bias, stride, frames, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps
    )


def plain_convolution_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    frames: list[int] | Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The formula of :func:`convolution_gelu`."""
    # convolutions of the library take and give (batch, channels, frames)
    z = F.conv1d(x.transpose(1, 2), weight, bias, stride=stride).transpose(1, 2)
    if norm_weight is not None:
        z = layer_norm(z, norm_weight, norm_bias, eps)
    return zero_padding(F.gelu(z), frames)


def _groups(x: Tensor, capacity: int, channels: int, stride: int) -> list[range]:
    """Utterances to take in one product: several short ones where they lie at a multiple of the stride, else one.

    A product of few rows is slow, and one of a new number of rows has to be set up; merged rows are many, and as many
    in every batch of one shape.
    """
    batch, inputs, _ = x.shape
    size = capacity * channels * x.element_size()
    return utterance_groups(batch, size) if inputs == capacity * stride else [range(b, b + 1) for b in range(batch)]


def _capacity(inputs: int, kernel: int, stride: int) -> int:
    """Output frames to make room for: where the input is a whole number of strides, rows of neighbors join up."""
    return inputs // stride if inputs % stride == 0 and kernel >= stride else (inputs - kernel) // stride + 1


def _rows(x: Tensor, group: range) -> Tensor:
    """(batch, frames, channels) -> (frames of the group's utterances, channels), a view."""
    return x[group.start : group.stop].flatten(0, 1)


def _real_rows(frames: list[int], group: range, capacity: int) -> int:
    """Rows to compute: those of one utterance; of several, all but what lies behind the last one's end."""
    return (len(group) - 1) * capacity + frames[group[-1]]


def _chunks(x: Tensor, n: int, kernel: int, stride: int) -> Iterator[tuple[Tensor, slice]]:
    """For each chunk of taps: its input as an (n, taps * channels) view of ``x`` (frames, channels), and the
    columns of the weight that belong to it. A view ends with ``x``, which can be a few rows before ``n``."""
    channels = x.shape[1]
    for first in range(0, kernel, stride):
        width = min(stride, kernel - first)
        rows = min(n, (len(x) - first - width) // stride + 1)
        view = x.as_strided((rows, width * channels), (stride * channels, 1), x.storage_offset() + first * channels)
        yield view, slice(first * channels, (first + width) * channels)


def _product(x: Tensor, rows: Tensor, bias: Tensor | None, kernel: int, stride: int, out: Tensor) -> None:
    """The convolution of utterances in turn: x (input frames, channels), out (n, channels)."""
    for i, (view, columns) in enumerate(_chunks(x, len(out), kernel, stride)):
        if i > 0:
            out[: len(view)].addmm_(view, rows[:, columns].t())
        elif bias is None:
            torch.mm(view, rows[:, columns].t(), out=out)
        else:
            torch.addmm(bias, view, rows[:, columns].t(), out=out)


def _forward(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kernel: int,
    stride: int,
    frames: list[int],
    eps: float,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Output, pre-activation before the norm (kept for backward if ``keep``), and the norm's statistics."""
    capacity = _capacity(x.shape[1], kernel, stride)
    out = x.new_empty(len(x), capacity, len(rows))
    z = torch.empty_like(out) if keep else None
    statistics: list[Tensor] = []
    for group in _groups(x, capacity, len(rows), stride):
        if n := _real_rows(frames, group, capacity):
            result = _rows(out, group)[:n]
            y = result if z is None else _rows(z, group)[:n]
            _product(_rows(x, group), rows, bias, kernel, stride, y)
            if norm_weight is not None:
                y, mean, rstd = torch.native_layer_norm(y, (len(rows),), norm_weight, norm_bias, eps)
                statistics += [mean, rstd]
            torch._C._nn.gelu(y, out=result)
        zero_behind(out, frames, group)
    return out, z, statistics


class _ConvolutionGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, bias, norm_weight, norm_bias, kernel: int, stride: int, frames: list[int], eps: float):
        out, z, statistics = _forward(x, rows, bias, norm_weight, norm_bias, kernel, stride, frames, eps)
        ctx.save_for_backward(x, rows, norm_weight, norm_bias, z, *statistics)
        ctx.settings = (kernel, stride, frames, bias is not None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, rows, norm_weight, norm_bias, z, *statistics = ctx.saved_tensors
        kernel, stride, frames, has_bias = ctx.settings
        needs_input = ctx.needs_input_grad[0]
        dx = torch.empty_like(x) if needs_input else None
        d_rows = torch.zeros_like(rows)
        d_bias = rows.new_zeros(len(rows)) if has_bias else None
        d_norm = [torch.zeros_like(norm_weight), torch.zeros_like(norm_bias)] if norm_weight is not None else None
        capacity, grad = z.shape[1], grad.contiguous()
        groups = _groups(x, capacity, len(rows), stride)
        buffer = z.new_empty(len(groups[0]), capacity, len(rows))
        statistics = iter(zip(statistics[::2], statistics[1::2], strict=True))
        for group in groups:
            n = _real_rows(frames, group, capacity)
            if n == 0:
                if needs_input:
                    dx[group.start : group.stop] = 0
                continue
            dz = _rows(buffer, range(len(group)))[:n]
            grad_rows, z_rows = _rows(grad, group)[:n], _rows(z, group)[:n]
            if len(group) > 1:
                # rows between the utterances hold what was computed across their seams: nothing comes back from there
                grad_rows = dz.copy_(grad_rows)
                zero_behind(buffer, [frames[b] for b in group], range(len(group)))
            if d_norm is None:
                torch.ops.aten.gelu_backward.grad_input(grad_rows, z_rows, approximate="none", grad_input=dz)
            else:
                dz = _norm_gelu_backward(grad_rows, z_rows, next(statistics), norm_weight, norm_bias, d_norm)
            if has_bias:
                d_bias.add_(dz.sum(0))
            group_x = _rows(x, group)
            for i, (view, columns) in enumerate(_chunks(group_x, n, kernel, stride)):
                d_rows[:, columns].addmm_(dz[: len(view)].t(), view)
                if needs_input:
                    _input_gradient(_rows(dx, group), dz[: len(view)], rows[:, columns], i, n, kernel, stride)
        return dx, d_rows, d_bias, *(d_norm or (None, None)), None, None, None, None


def _norm_gelu_backward(grad, z, statistics, norm_weight, norm_bias, d_norm: list[Tensor]) -> Tensor:
    """Gradient before the norm; adds the norm's own gradients to ``d_norm``."""
    mean, rstd = statistics
    shape = (z.shape[1],)
    # the norm is computed again from what is kept: cheaper than keeping another activation
    y = ((z - mean) * rstd * norm_weight + norm_bias).to(z.dtype)
    dy = torch.ops.aten.gelu_backward(grad, y)
    dz, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy, z, shape, mean, rstd, norm_weight, norm_bias, [True] * 3
    )
    d_norm[0].add_(dw)
    d_norm[1].add_(db)
    return dz


def _input_gradient(dx: Tensor, dz: Tensor, rows: Tensor, chunk: int, n: int, kernel: int, stride: int) -> None:
    """Add one chunk's gradient to ``dx`` (input frames, channels); the first chunk writes instead."""
    view, _ = next(_chunks(dx[chunk * stride :], len(dz), rows.shape[1] // dx.shape[1], stride))
    if chunk > 0:
        view.addmm_(dz, rows)
        return
    if kernel < stride:
        dx.zero_()  # frames between the windows
    else:
        dx[n * stride :].zero_()
    torch.mm(dz, rows, out=view)
