"""Dropout decisions from one cheap stream of random bits.

On a CPU the decisions are most of what dropout costs: ``bernoulli_`` makes 0.2 decisions per nanosecond, a raw
64-bit generator read as four 16-bit numbers makes 2.5. A kept element's mask is -1 (all bits set), a dropped
one's 0, so that applying it is an AND on the bit pattern.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.seeds import Randomness

BIT_PATTERN = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""The integer format of the same width."""

RESOLUTION = 1 << 15
"""Drop probabilities are rounded to 1 / RESOLUTION."""


class DropoutBits:
    """The dropout decisions of one place in the model (a layer, the input), drawn in order.

    Two objects made from the same ``rng`` draw the same decisions, so that a recomputed block repeats its dropout.
    On devices other than the CPU the decisions are torch's own: fused kernels draw them from the device's generator.

    Arguments
    ---------
    rng : the place in the tree of random streams.
    device : where the masks are needed.

    Example
    -------
    >>> bits = DropoutBits(Randomness(1).child("layer", 0))
    >>> mask = bits.keep(0.1, 1000)
    >>> bool(((mask == 0) | (mask == -1)).all()), 860 < int(-mask.sum()) < 940
    (True, True)
    """

    def __init__(self, rng: Randomness, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._stream = np.random.SFC64(rng.integer("dropout")) if self.device.type == "cpu" else None

    def draw(self, *shape: int) -> Tensor:
        """Uniform 16-bit integers of the given shape (CPU only)."""
        if self._stream is None:
            raise RuntimeError(f"DropoutBits draws its own bits on the CPU only, not on {self.device}")
        count = math.prod(shape)
        words = self._stream.random_raw((count + 3) // 4)
        return torch.from_numpy(words.view(np.int16))[:count].view(shape)

    def keep(self, p: float, *shape: int) -> Tensor:
        """A mask of the given shape, int16: -1 where kept (probability 1 - p), 0 where dropped."""
        # r >> 1 is uniform in [-16384, 16384); it is below the threshold, so negative after the subtraction, with 1 - p
        threshold = round((1 - p) * RESOLUTION) - RESOLUTION // 2
        return (self.draw(*shape) >> 1).sub_(threshold).bitwise_right_shift_(15)


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where ``mask`` is -1, zero where it is 0 (no scaling)."""
    return (x.view(BIT_PATTERN[x.dtype]) & mask).view(x.dtype)


def apply_mask_(x: Tensor, mask: Tensor) -> Tensor:
    """:func:`apply_mask` in place."""
    x.view(BIT_PATTERN[x.dtype]).bitwise_and_(mask)
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
