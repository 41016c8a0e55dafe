"""The first convolution, on the waveform itself, with its norm and GELU.

It makes the largest activations of the model (3200 x 512 numbers per second of audio in BASE) from windows of ten
samples, so nothing is kept but the output: backward computes the pre-activation again, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.nn.fast.common import takes_fast_form, utterance_groups, wants_gradient, zero_behind
from toolkit.nn.fast.linear import layer_norm
from toolkit.nn.transfer import to_device

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
    frames: list[int] | Tensor,
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
    frames : real frames of each utterance, see :func:`toolkit.nn.fast.common.real_frames`.
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
    windows = _windows(waveforms, weight.shape[2], stride)
    folded = _fold_norm(windows, frames, weight[:, 0].t(), norm_weight, norm_bias, eps)
    if wants_gradient(folded):
        return _WindowsGelu.apply(windows, folded, frames, dtype)
    return _windows_gelu(windows, folded, frames, dtype)


def plain_convolution_group_norm_gelu(
    waveforms: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    frames: list[int] | Tensor,
    *,
    dtype: torch.dtype,
    eps: float = 1e-5,
) -> Tensor:
    """The formula of :func:`convolution_group_norm_gelu`."""
    z = F.conv1d(waveforms[:, None].to(dtype), weight.to(dtype), stride=stride)
    if isinstance(frames, list):
        frames = None if all(n == z.shape[2] for n in frames) else to_device(torch.tensor(frames), z.device)
    z = F.gelu(plain_group_norm(z, norm_weight, norm_bias, frames, eps))
    return z.transpose(1, 2).contiguous()


def _windows(waveforms: Tensor, kernel: int, stride: int) -> Tensor:
    """Windows of the waveform and a one behind each: (batch, frames, kernel + 1).

    With the shift as one more row of the weight, shift and its gradient come out of the same products.
    """
    windows = waveforms.unfold(1, kernel, stride)
    out = waveforms.new_ones(*windows.shape[:2], kernel + 1)
    out[..., :kernel] = windows
    return out


def _fold_norm(
    windows: Tensor, frames: list[int], taps: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """Weights with the norm folded in, and the shift as the last row: (batch, kernel + 1, channels).

    Mean and variance over time of windows @ taps are mean @ taps and taps' covariance taps, exactly, with a
    kernel x kernel covariance of the windows; so autograd runs on small matrices, in float64, and not on activations.
    """
    with torch.no_grad():  # nothing comes back to the waveform
        moments = [_moments(x[: max(n, 1), :-1].double()) for x, n in zip(windows, frames, strict=True)]
        means, covariances = (torch.stack(part) for part in zip(*moments, strict=True))
    wide = taps.double()
    # (batch, kernel, kernel) @ (kernel, channels) -> (batch, kernel, channels); its diagonal form over the kernel
    variance = (covariances @ wide).mul(wide).sum(1)
    scaled = wide * (norm_weight.double() * torch.rsqrt(variance + eps))[:, None]
    shift = norm_bias.double() - (means[:, None] @ scaled)[:, 0]
    return torch.cat([scaled, shift[:, None]], 1).to(taps.dtype)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (kernel,) and covariance (kernel, kernel) over the rows of (frames, kernel)."""
    mean = x.mean(0)
    x = x - mean
    return mean, x.t() @ x / len(x)


def _blocks(frames: list[int], longest: int, channels: int) -> Iterator[tuple[slice, slice]]:
    """Utterances and frames to take at a time: a block of one long utterance, or several short ones as they lie."""
    for group in utterance_groups(len(frames), longest * channels * 4):
        end = max(frames[b] for b in group)
        step = BLOCK if len(group) == 1 else longest
        for start in range(0, end, step):
            yield slice(group.start, group.stop), slice(start, min(start + step, end))


def _buffer(windows: Tensor, frames: list[int], channels: int) -> Tensor:
    """Room for one block's activations, (numbers,)."""
    sizes = [(u.stop - u.start) * (t.stop - t.start) for u, t in _blocks(frames, windows.shape[1], channels)]
    return windows.new_empty(max(sizes, default=0) * channels)


def _windows_gelu(windows: Tensor, folded: Tensor, frames: list[int], dtype: torch.dtype) -> Tensor:
    """gelu(windows @ folded) per utterance; windows (batch, frames, kernel + 1)."""
    batch, longest, _ = windows.shape
    channels = folded.shape[2]
    out = windows.new_empty(batch, longest, channels, dtype=dtype)
    buffer = _buffer(windows, frames, channels)
    for utterances, rows in _blocks(frames, longest, channels):
        x, target = windows[utterances, rows], out[utterances, rows]
        z = torch.bmm(x, folded[utterances], out=buffer[: target.numel()].view(target.shape))
        if dtype == z.dtype and target.is_contiguous():  # torch's gelu does not write to strided results
            torch._C._nn.gelu(z, out=target)
        else:
            target.copy_(torch._C._nn.gelu(z, out=z))
    zero_behind(out, frames, range(batch))
    return out


class _WindowsGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, windows: Tensor, folded: Tensor, frames: list[int], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(windows, folded)
        ctx.frames = frames
        return _windows_gelu(windows, folded, frames, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        windows, folded = ctx.saved_tensors
        d_folded = torch.zeros_like(folded)
        z_buffer = _buffer(windows, ctx.frames, folded.shape[2])
        grad_buffer = torch.empty_like(z_buffer)
        for utterances, rows in _blocks(ctx.frames, *grad.shape[1:]):
            x, g = windows[utterances, rows], grad[utterances, rows]
            z = torch.bmm(x, folded[utterances], out=z_buffer[: g.numel()].view(g.shape))
            if len(g) > 1:
                # several utterances with the padding between them, from where no gradient may come
                g = grad_buffer[: g.numel()].view(g.shape).copy_(g)
                zero_behind(g, ctx.frames[utterances], range(len(g)))
            elif g.dtype != z.dtype:
                g = grad_buffer[: g.numel()].view(g.shape).copy_(g)
            torch.ops.aten.gelu_backward.grad_input(g, z, approximate="none", grad_input=z)
            d_folded[utterances].baddbmm_(x.transpose(1, 2), z)
        return None, d_folded, None, None


# ---------------------------------------------------------------- layer norm


def convolution_layer_norm_gelu(
    waveforms: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    frames: list[int] | Tensor,
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
    windows = _windows(waveforms, weight.shape[2], stride)
    shift = torch.zeros_like(norm_bias) if bias is None else bias
    taps = torch.cat([weight[:, 0].t(), shift[None]])
    if wants_gradient(taps, norm_weight, norm_bias):
        return _WindowsNormGelu.apply(windows, taps, norm_weight, norm_bias, frames, dtype, eps)
    return _windows_norm_gelu(windows, taps, norm_weight, norm_bias, frames, dtype, eps)


def plain_convolution_layer_norm_gelu(
    waveforms: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    frames: list[int] | Tensor,
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


def zero_padding(x: Tensor, frames: list[int] | Tensor) -> Tensor:
    """(batch, frames, channels) with zeros behind each utterance's own frames, see
    :func:`toolkit.nn.fast.common.real_frames`."""
    if isinstance(frames, list):
        if all(n == x.shape[1] for n in frames):
            return x
        frames = to_device(torch.tensor(frames), x.device)
    real = torch.arange(x.shape[1], device=x.device)[None] < frames[:, None]
    return torch.where(real[..., None], x, 0)


def _windows_norm_gelu(windows, taps, norm_weight, norm_bias, frames, dtype, eps) -> Tensor:
    """gelu(layer_norm(windows @ taps)) per utterance."""
    batch, longest, _ = windows.shape
    out = windows.new_empty(batch, longest, taps.shape[1], dtype=dtype)
    for utterances, rows in _blocks(frames, longest, taps.shape[1]):
        z = windows[utterances, rows] @ taps
        out[utterances, rows] = F.gelu(F.layer_norm(z, (z.shape[2],), norm_weight, norm_bias, eps))
    zero_behind(out, frames, range(batch))
    return out


class _WindowsNormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, windows, taps, norm_weight, norm_bias, frames: list[int], dtype, eps: float) -> Tensor:
        ctx.save_for_backward(windows, taps, norm_weight, norm_bias)
        ctx.frames, ctx.eps = frames, eps
        return _windows_norm_gelu(windows, taps, norm_weight, norm_bias, frames, dtype, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        windows, taps, norm_weight, norm_bias = ctx.saved_tensors
        d_taps, d_norm_weight, d_norm_bias = (torch.zeros_like(t) for t in (taps, norm_weight, norm_bias))
        shape = (taps.shape[1],)
        for utterances, rows in _blocks(ctx.frames, *grad.shape[1:]):
            x, g = windows[utterances, rows], grad[utterances, rows].to(taps.dtype)
            if len(g) > 1:
                g = g.clone()
                zero_behind(g, ctx.frames[utterances], range(len(g)))
            z = x @ taps
            y, mean, rstd = torch.native_layer_norm(z, shape, norm_weight, norm_bias, ctx.eps)
            dy = torch.ops.aten.gelu_backward(g, y)
            dz, dw, db = torch.ops.aten.native_layer_norm_backward(
                dy, z, shape, mean, rstd, norm_weight, norm_bias, [True] * 3
            )
            d_taps.addmm_(x.flatten(0, 1).t(), dz.flatten(0, 1))
            d_norm_weight.add_(dw)
            d_norm_bias.add_(db)
        return None, d_taps, d_norm_weight, d_norm_bias, None, None, None
