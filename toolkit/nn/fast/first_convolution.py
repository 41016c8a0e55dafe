"""The first convolution, on the waveform itself, with its norm and GELU.

It makes the largest activations of the model (3200 x 512 numbers per second of audio in BASE) from windows of ten
samples, so nothing is kept but the output: backward computes the pre-activation again, block by block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.nn.fast.common import takes_fast_form, wants_gradient
from toolkit.nn.fast.linear import layer_norm

BLOCK = 2048
"""Frames at a time: a block of 512 channels in float32 stays in the second-level cache."""


def plain_group_norm(z: Tensor, weight: Tensor, bias: Tensor, frame_lengths: Tensor | None, eps: float) -> Tensor:
    """Norm of each channel over the frames of an utterance.

    Arguments
    ---------
    z : (batch, channels, frames).
    weight, bias : (channels,).
    frame_lengths : (batch,) real frames; None takes all frames.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    if frame_lengths is None:
        return F.group_norm(z.to(wide), z.shape[1], weight, bias, eps).to(z.dtype)
    real = torch.arange(z.shape[2], device=z.device)[None, None] < frame_lengths.to(z.device)[:, None, None]
    count = real.sum(2, keepdim=True).clamp(min=1)
    x = z.to(wide)
    mean = torch.where(real, x, 0).sum(2, keepdim=True) / count
    variance = torch.where(real, (x - mean).square(), 0).sum(2, keepdim=True) / count
    x = (x - mean) * torch.rsqrt(variance + eps) * weight[:, None] + bias[:, None]
    return torch.where(real, x, 0).to(z.dtype)


# ---------------------------------------------------------------- group norm


def convolution_group_norm_gelu(
    waveforms: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    frames: list[int],
    *,
    dtype: torch.dtype,
    eps: float = 1e-5,
    fast: bool = True,
) -> Tensor:
    """gelu(group_norm(convolution)) with one group per channel, statistics over each utterance's own frames.

    Arguments
    ---------
    waveforms : (batch, samples), float32 (or float64).
    weight : (channels, 1, kernel) in the format of the waveforms. A convolution bias would cancel in the norm.
    norm_weight, norm_bias : (channels,).
    stride : samples from one frame to the next.
    frames : real frames of each utterance.
    dtype : format of the result.
    fast : False takes the plain formula.

    Returns
    -------
    (batch, frames, channels), zero in the padding.
    """
    if not takes_fast_form(fast, waveforms, weight) or dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return plain_convolution_group_norm_gelu(
            waveforms, weight, norm_weight, norm_bias, stride, frames, dtype=dtype, eps=eps
        )
    windows, taps = _windows(waveforms, weight, stride)
    folded, shift = _fold_norm(windows, frames, taps, norm_weight, norm_bias, eps)
    return _windows_gelu(windows, folded, shift, frames, dtype)


def plain_convolution_group_norm_gelu(
    waveforms: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    frames: list[int],
    *,
    dtype: torch.dtype,
    eps: float = 1e-5,
) -> Tensor:
    """The formula of :func:`convolution_group_norm_gelu`."""
    z = F.conv1d(waveforms[:, None].to(dtype), weight.to(dtype), stride=stride)
    full = all(n == z.shape[2] for n in frames)
    z = F.gelu(plain_group_norm(z, norm_weight, norm_bias, None if full else torch.tensor(frames), eps))
    return z.transpose(1, 2).contiguous()


def _windows(waveforms: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Windows of the waveform (batch, frames, kernel), and the weight as (kernel, channels)."""
    return waveforms.unfold(1, weight.shape[2], stride).contiguous(), weight[:, 0].t()


def _fold_norm(
    windows: Tensor, frames: list[int], taps: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Weights (batch, kernel, channels) and shifts (batch, channels) with the norm folded in.

    Mean and variance over time of windows @ taps are mean @ taps and taps' covariance taps, exactly, with a
    kernel x kernel covariance of the windows; so autograd runs on small matrices, in float64, and not on activations.
    """
    wide = taps.double()
    folded, shifts = [], []
    for x, n in zip(windows, frames, strict=True):
        x = x[: max(n, 1)].double()
        mean = x.mean(0)
        x = x - mean
        variance = ((x.t() @ x / len(x)) @ wide).mul(wide).sum(0)
        scaled = wide * (norm_weight.double() * torch.rsqrt(variance + eps))
        folded.append(scaled)
        shifts.append(norm_bias.double() - mean @ scaled)
    return torch.stack(folded).to(taps.dtype), torch.stack(shifts).to(taps.dtype)


def _windows_gelu(windows: Tensor, folded: Tensor, shift: Tensor, frames: list[int], dtype: torch.dtype) -> Tensor:
    """gelu(windows @ folded + shift) per utterance; windows (batch, frames, kernel)."""
    if wants_gradient(folded, shift):
        return _WindowsGelu.apply(windows, folded, shift, frames, dtype)
    return _windows_gelu_forward(windows, folded, shift, frames, dtype)


def _windows_gelu_forward(
    windows: Tensor, folded: Tensor, shift: Tensor, frames: list[int], dtype: torch.dtype
) -> Tensor:
    batch, longest, _ = windows.shape
    out = windows.new_empty(batch, longest, folded.shape[2], dtype=dtype)
    buffer = windows.new_empty(min(BLOCK, longest), folded.shape[2])
    for b, n in enumerate(frames):
        for start in range(0, n, BLOCK):
            end = min(start + BLOCK, n)
            z = torch.addmm(shift[b], windows[b, start:end], folded[b], out=buffer[: end - start])
            if dtype == z.dtype:
                torch._C._nn.gelu(z, out=out[b, start:end])
            else:
                out[b, start:end] = torch._C._nn.gelu(z, out=z)
        out[b, n:] = 0
    return out


class _WindowsGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, windows, folded, shift, frames: list[int], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(windows, folded, shift)
        ctx.frames = frames
        return _windows_gelu_forward(windows, folded, shift, frames, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        windows, folded, shift = ctx.saved_tensors
        d_folded, d_shift = torch.zeros_like(folded), torch.zeros_like(shift)
        z_buffer = folded.new_empty(min(BLOCK, windows.shape[1]), folded.shape[2])
        grad_buffer = torch.empty_like(z_buffer) if grad.dtype != folded.dtype else None
        for b, n in enumerate(ctx.frames):
            for start in range(0, n, BLOCK):
                end = min(start + BLOCK, n)
                x, g = windows[b, start:end], grad[b, start:end]
                z = torch.addmm(shift[b], x, folded[b], out=z_buffer[: end - start])
                if grad_buffer is not None:
                    g = grad_buffer[: end - start].copy_(g)
                torch.ops.aten.gelu_backward.grad_input(g, z, approximate="none", grad_input=z)
                d_folded[b].addmm_(x.t(), z)
                d_shift[b].add_(z.sum(0))
        return None, d_folded, d_shift, None, None


# ---------------------------------------------------------------- layer norm


def convolution_layer_norm_gelu(
    waveforms: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    frames: list[int],
    *,
    dtype: torch.dtype,
    eps: float = 1e-5,
    fast: bool = True,
) -> Tensor:
    """gelu(layer_norm(convolution + bias)), the norm over the channels of each frame.

    Arguments and result are those of :func:`convolution_group_norm_gelu`, with a bias (channels,) or None.
    """
    if not takes_fast_form(fast, waveforms, weight) or dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return plain_convolution_layer_norm_gelu(
            waveforms, weight, bias, norm_weight, norm_bias, stride, frames, dtype=dtype, eps=eps
        )
    windows, taps = _windows(waveforms, weight, stride)
    shift = torch.zeros_like(norm_bias) if bias is None else bias
    if wants_gradient(taps, shift, norm_weight, norm_bias):
        return _WindowsNormGelu.apply(windows, taps, shift, norm_weight, norm_bias, frames, dtype, eps)
    return _windows_norm_gelu_forward(windows, taps, shift, norm_weight, norm_bias, frames, dtype, eps)


def plain_convolution_layer_norm_gelu(
    waveforms: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    frames: list[int],
    *,
    dtype: torch.dtype,
    eps: float = 1e-5,
) -> Tensor:
    """The formula of :func:`convolution_layer_norm_gelu`."""
    z = F.conv1d(
        waveforms[:, None].to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), stride=stride
    )
    out = F.gelu(layer_norm(z.transpose(1, 2).contiguous(), norm_weight, norm_bias, eps))
    return zero_padding(out, frames)


def zero_padding(x: Tensor, frames: list[int]) -> Tensor:
    """(batch, frames, channels) with zeros behind each utterance's own frames."""
    if all(n == x.shape[1] for n in frames):
        return x
    real = torch.arange(x.shape[1], device=x.device)[None] < torch.tensor(frames, device=x.device)[:, None]
    return torch.where(real[..., None], x, 0)


def _windows_norm_gelu_forward(windows, taps, shift, norm_weight, norm_bias, frames, dtype, eps) -> Tensor:
    batch, longest, _ = windows.shape
    out = windows.new_empty(batch, longest, taps.shape[1], dtype=dtype)
    for b, n in enumerate(frames):
        for start in range(0, n, BLOCK):
            end = min(start + BLOCK, n)
            z = torch.addmm(shift, windows[b, start:end], taps)
            out[b, start:end] = F.gelu(F.layer_norm(z, (z.shape[1],), norm_weight, norm_bias, eps))
        out[b, n:] = 0
    return out


class _WindowsNormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, windows, taps, shift, norm_weight, norm_bias, frames: list[int], dtype, eps: float) -> Tensor:
        ctx.save_for_backward(windows, taps, shift, norm_weight, norm_bias)
        ctx.frames, ctx.eps = frames, eps
        return _windows_norm_gelu_forward(windows, taps, shift, norm_weight, norm_bias, frames, dtype, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        windows, taps, shift, norm_weight, norm_bias = ctx.saved_tensors
        d_taps, d_shift, d_norm_weight, d_norm_bias = (
            torch.zeros_like(t) for t in (taps, shift, norm_weight, norm_bias)
        )
        shape = (taps.shape[1],)
        for b, n in enumerate(ctx.frames):
            for start in range(0, n, BLOCK):
                x = windows[b, start : min(start + BLOCK, n)]
                g = grad[b, start : start + len(x)].to(taps.dtype)
                z = torch.addmm(shift, x, taps)
                y, mean, rstd = torch.native_layer_norm(z, shape, norm_weight, norm_bias, ctx.eps)
                dy = torch.ops.aten.gelu_backward(g, y)
                dz, dw, db = torch.ops.aten.native_layer_norm_backward(
                    dy, z, shape, mean, rstd, norm_weight, norm_bias, [True] * 3
                )
                d_taps.addmm_(x.t(), dz)
                d_shift.add_(dz.sum(0))
                d_norm_weight.add_(dw)
                d_norm_bias.add_(db)
        return None, d_taps, d_shift, d_norm_weight, d_norm_bias, None, None, None
