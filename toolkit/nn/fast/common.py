"""What the fast forms share: when they apply, and how a padded batch is laid out as rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toolkit.nn.transfer import to_device

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


def real_frames(frame_lengths: Tensor | Sequence[int] | None, x: Tensor) -> list[int] | Tensor:
    """Frames of each utterance of x (batch, frames, ...) in the form that the convolutions take.

    On a CPU, and where all are full, Python integers; else a (batch,) tensor on the device: then neither shapes nor
    the operations that are made depend on its values, and nobody has to know them.
    """
    if frame_lengths is None or x.device.type == "cpu":
        return full_lengths(frame_lengths, *x.shape[:2])
    return to_device(torch.as_tensor(frame_lengths), x.device).clamp(0, x.shape[1])


GROUP_BYTES = 4 << 20
"""Short utterances are taken together up to this many bytes of activations, which stay in the caches of a core."""


def utterance_groups(batch: int, utterance_bytes: int) -> list[range]:
    """Neighboring utterances to work on in one product: as many as fit into GROUP_BYTES, one at least.

    A product of few rows is slow, and one of a number of rows not seen before has to be set up first; several short
    utterances, with their padding, make many rows, and equally many in every batch of one shape.
    """
    size = max(1, GROUP_BYTES // max(utterance_bytes, 1))
    return [range(first, min(first + size, batch)) for first in range(0, batch, size)]


def zero_behind(x: Tensor, frames: Sequence[int], group: range) -> None:
    """Zeros behind the real frames of the group's utterances, in place; x (batch, frames, ...)."""
    for b in group:
        x[b, frames[b] :] = 0


def padding_mask(frame_lengths: Tensor, frames: int) -> Tensor:
    """(batch, frames) bool, True where there is padding."""
    return torch.arange(frames, device=frame_lengths.device)[None] >= frame_lengths[:, None]


class _Pack(torch.autograd.Function):
    """(batch, frames, dim) -> (rows, dim): the real frames of all utterances, one after the other, then zeros."""

    @staticmethod
    def forward(ctx, x: Tensor, lengths: list[int], rows: int) -> Tensor:
        ctx.lengths, ctx.frames = lengths, x.shape[1]
        return _pack(x, lengths, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _unpack(grad, ctx.lengths, ctx.frames), None, None


class _Unpack(torch.autograd.Function):
    """The way back; padding frames become zero."""

    @staticmethod
    def forward(ctx, rows: Tensor, lengths: list[int], frames: int) -> Tensor:
        ctx.lengths, ctx.rows = lengths, len(rows)
        return _unpack(rows, lengths, frames)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _pack(grad, ctx.lengths, ctx.rows), None, None


def _pack(x: Tensor, lengths: list[int], rows: int) -> Tensor:
    out = x.new_empty(rows, x.shape[2])
    start = 0
    for b, n in enumerate(lengths):
        out[start : start + n] = x[b, :n]
        start += n
    out[start:] = 0
    return out


def _unpack(rows: Tensor, lengths: list[int], frames: int) -> Tensor:
    out = rows.new_empty(len(lengths), frames, rows.shape[1])
    start = 0
    for b, n in enumerate(lengths):
        out[b, :n] = rows[start : start + n]
        out[b, n:] = 0
        start += n
    return out


def pack_rows(x: Tensor, lengths: list[int], multiple: int = 1) -> Tensor:
    """(batch, frames, dim) -> (rows, dim) with the real frames only, then zero rows up to a ``multiple``.

    Matrix products on a CPU are 3 to 5 % faster where the number of rows is a multiple of 8.
    """
    real = sum(lengths)
    rows = -(-real // multiple) * multiple
    if rows == real == x.shape[0] * x.shape[1]:
        return x.reshape(-1, x.shape[2])
    return _Pack.apply(x, lengths, rows)


def unpack_rows(rows: Tensor, lengths: list[int], frames: int) -> Tensor:
    """(rows, dim) -> (batch, frames, dim), zero in the padding; a view where there is none."""
    if all(n == frames for n in lengths) and len(rows) == sum(lengths):
        return rows.view(len(lengths), frames, rows.shape[1])
    return _Unpack.apply(rows, lengths, frames)
