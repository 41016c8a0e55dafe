"""What the fast forms share: when they apply, and how a padded batch is laid out as rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FAST_FORMATS = (torch.float32, torch.bfloat16, torch.float64)


def takes_fast_form(fast: bool, *tensors: Tensor | None) -> bool:
    """Whether the forms written for the CPU take these tensors: all there, in one of FAST_FORMATS."""
    return fast and all(t is None or (t.device.type == "cpu" and t.dtype in FAST_FORMATS) for t in tensors)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass can follow, so that a form must keep what it needs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def set_fast(module: nn.Module, fast: bool) -> nn.Module:
    """Let every part of ``module`` use its fast forms (the default) or only the plain formulas.

    Example
    -------
    >>> from toolkit.nn.positional import PositionalConv
    >>> set_fast(PositionalConv(8, kernel=4, groups=2), False).fast
    False
    """
    for part in module.modules():
        if hasattr(part, "fast"):
            part.fast = fast
    return module


def full_lengths(frame_lengths: Tensor | Sequence[int] | None, batch: int, frames: int) -> list[int]:
    """Frames of each utterance as Python integers, at most ``frames``; None means that all are full."""
    if frame_lengths is None:
        return [frames] * batch
    lengths = frame_lengths.tolist() if isinstance(frame_lengths, Tensor) else list(frame_lengths)
    return [max(0, min(int(n), frames)) for n in lengths]


def padding_mask(frame_lengths: Tensor, frames: int) -> Tensor:
    """(batch, frames) bool, True where there is padding."""
    return torch.arange(frames, device=frame_lengths.device)[None] >= frame_lengths[:, None]


class _Pack(torch.autograd.Function):
    """(batch, frames, dim) -> (sum of lengths, dim): the real frames of all utterances, one after the other."""

    @staticmethod
    def forward(ctx, x: Tensor, lengths: list[int]) -> Tensor:
        ctx.lengths, ctx.frames = lengths, x.shape[1]
        return torch.cat([x[b, :n] for b, n in enumerate(lengths)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _unpack(grad, ctx.lengths, ctx.frames), None


class _Unpack(torch.autograd.Function):
    """The way back; padding frames become zero."""

    @staticmethod
    def forward(ctx, rows: Tensor, lengths: list[int], frames: int) -> Tensor:
        ctx.lengths = lengths
        return _unpack(rows, lengths, frames)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return torch.cat([grad[b, :n] for b, n in enumerate(ctx.lengths)]), None, None


def _unpack(rows: Tensor, lengths: list[int], frames: int) -> Tensor:
    out = rows.new_empty(len(lengths), frames, rows.shape[1])
    start = 0
    for b, n in enumerate(lengths):
        out[b, :n] = rows[start : start + n]
        out[b, n:] = 0
        start += n
    return out


def pack_rows(x: Tensor, lengths: list[int]) -> Tensor:
    """(batch, frames, dim) -> (rows, dim) with the real frames only; a view where nothing is padded."""
    if all(n == x.shape[1] for n in lengths):
        return x.reshape(-1, x.shape[2])
    return _Pack.apply(x, lengths)


def unpack_rows(rows: Tensor, lengths: list[int], frames: int) -> Tensor:
    """(rows, dim) -> (batch, frames, dim), zero in the padding; a view where nothing is padded."""
    if all(n == frames for n in lengths):
        return rows.view(len(lengths), frames, rows.shape[1])
    return _Unpack.apply(rows, lengths, frames)
