"""Dropout decisions from a cheap stream of random bits.

On a CPU the decisions are most of what dropout costs: ``bernoulli_`` makes 0.2 of them per nanosecond, a raw 64-bit
generator read as four 16-bit numbers makes 2.5. A mask holds 16-bit integers, 1 where an element is kept and 0 where
it is dropped, and multiplies the bit pattern: an integer product of one width is several times faster than a product
with a bool mask, which goes through type promotion.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import ModelError
from toolkit.seeds import Randomness

BIT_PATTERN = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""The integer format of the same width."""

RESOLUTION = 1 << 16
"""Drop probabilities are rounded to 1 / RESOLUTION."""

LARGE_DRAW = 1 << 18
"""Draws of at least so many decisions are made in two halves, by two threads where torch has two."""


def check_drop_probabilities(**values: float) -> None:
    """Refuse a drop probability outside [0, 1).

    Arguments
    ---------
    values : by the names that the message uses.

    Raises
    ------
    ModelError : one is outside.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ModelError(f"{name} is {value}; expected a drop probability from 0 to below 1.")


class DropoutBits:
    """The dropout decisions of one place in the model (a layer, the input), drawn in order.

    Two objects made from the same ``rng`` draw the same decisions, on any number of threads, so that a recomputed
    block repeats its dropout. On devices other than the CPU the decisions are torch's own: fused kernels draw them
    from the device's generator.

    Arguments
    ---------
    rng : the place in the tree of random streams.
    device : where the masks are needed.

    Example
    -------
    >>> mask = DropoutBits(Randomness(1).child("layer", 0)).keep(0.1, 1000)
    >>> mask.unique().tolist(), 860 < int(mask.sum()) < 940
    ([0, 1], True)
    """

    def __init__(self, rng: Randomness, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._streams: tuple[np.random.SFC64, ...] = ()
        if self.device.type == "cpu":
            self._streams = tuple(np.random.SFC64(rng.integer("dropout", half)) for half in range(2))

    def keep(self, p: float, *shape: int) -> Tensor:
        """A mask of the given shape, int16: 1 where kept (probability 1 - p), 0 where dropped. CPU only."""
        if not self._streams:
            raise RuntimeError(f"DropoutBits makes masks on the CPU only, not on {self.device}")
        # a draw r is uniform over all 16-bit integers, and kept below the threshold
        threshold = min(round((1 - p) * RESOLUTION) - RESOLUTION // 2, RESOLUTION // 2 - 1)
        count = math.prod(shape)
        if count < LARGE_DRAW:
            return _draw(self._streams[0], count).lt_(threshold).view(shape)
        mask = torch.empty(count, dtype=torch.int16)
        jobs = list(zip(self._streams, mask.tensor_split(2), strict=True))
        if torch.get_num_threads() > 1:
            # the generator works without the interpreter's lock
            draws: list[Tensor] = []
            helper = threading.Thread(target=lambda: draws.append(_draw(jobs[1][0], len(jobs[1][1]))))
            helper.start()
            first = _draw(jobs[0][0], len(jobs[0][1]))
            helper.join()
            draws.insert(0, first)
        else:
            draws = [_draw(stream, len(part)) for stream, part in jobs]
        for draw, (_, part) in zip(draws, jobs, strict=True):
            torch.lt(draw, threshold, out=part)
        return mask.view(shape)


def _draw(stream: np.random.SFC64, count: int) -> Tensor:
    """Uniform 16-bit integers, (count,) int16."""
    return torch.from_numpy(stream.random_raw((count + 3) // 4).view(np.int16))[:count]


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where ``mask`` is 1, zero where it is 0 (no scaling)."""
    return (x.view(BIT_PATTERN[x.dtype]) * mask).view(x.dtype)


def apply_mask_(x: Tensor, mask: Tensor) -> Tensor:
    """:func:`apply_mask` in place."""
    x.view(BIT_PATTERN[x.dtype]).mul_(mask)
    return x


class _MaskedScale(torch.autograd.Function):
    """mask * x / (1 - p), keeping two bytes per element and not x."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return apply_mask_(x * scale, mask)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (mask,) = ctx.saved_tensors
        return apply_mask_(grad * ctx.scale, mask), None, None


def dropout(x: Tensor, p: float, bits: DropoutBits | None) -> Tensor:
    """Zero each element with probability ``p`` and divide the rest by ``1 - p``.

    Arguments
    ---------
    x : any shape.
    p : drop probability in [0, 1).
    bits : where the decisions come from; None (evaluation) returns ``x`` itself.
    """
    if bits is None or p <= 0:
        return x
    if bits.device.type != "cpu":
        return F.dropout(x, p)
    return _MaskedScale.apply(x.contiguous(), bits.keep(p, *x.shape), 1 / (1 - p))
