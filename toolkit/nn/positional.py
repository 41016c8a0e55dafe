"""The convolution that gives the transformer its positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import ModelError
from toolkit.nn.fast.common import real_frames
from toolkit.nn.fast.first_convolution import zero_padding
from toolkit.nn.fast.linear import layer_norm
from toolkit.nn.fast.positional import window_convolution

FUSED_WEIGHT_NORM = ("cpu", "cuda", "mps")
"""The devices of which torch has a fused weight norm; others would pass it on to the host behind one's back."""


class PositionalBlock(nn.Module):
    """One grouped convolution: weight-normed (weight_g, weight_v) or plain (weight), and a bias."""

    def __init__(self, dim: int, kernel: int, groups: int, *, weight_norm: bool) -> None:
        super().__init__()
        shape = (dim, dim // groups, kernel)
        if weight_norm:
            self.weight_v = nn.Parameter(torch.empty(shape).normal_(std=(4 / (kernel * dim)) ** 0.5))
            self.weight_g = nn.Parameter(torch.linalg.vector_norm(self.weight_v.detach(), dim=(0, 1), keepdim=True))
            self.bias = nn.Parameter(torch.zeros(dim))
        else:
            bound = (shape[1] * kernel) ** -0.5  # torch's own default for a convolution
            self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def effective_weight(self) -> Tensor:
        """(dim, dim / groups, kernel): with weight norm, one length per tap."""
        if hasattr(self, "weight"):
            return self.weight
        if self.weight_v.device.type not in FUSED_WEIGHT_NORM:
            return self.weight_v * (self.weight_g / self.weight_v.square().sum((0, 1), keepdim=True).sqrt())
        # torch's fused kernel, a third of the time of the formula, both ways
        return torch._weight_norm(self.weight_v, self.weight_g, 2)


class PositionalConv(nn.Module):
    """gelu(convolution) over a long window, the same number of frames; the caller adds it to its input.

    Arguments
    ---------
    dim : channels.
    kernel : frames that one frame sees; with depth d above 1 each of the d convolutions sees max(3, kernel // d).
    groups : groups of channels.
    depth : 1 (wav2vec 2.0): a weight-normed convolution (weight_g (1, 1, kernel), weight_v (dim, dim / groups,
        kernel)). Above 1 (data2vec): a stack of plain convolutions, each followed by a norm without scale and shift.
    over_padding : True lets a stack compute in the padding too, so that its later convolutions see there what the
        earlier ones made of zeros, as in the originals. False: each utterance gets what it gets alone.

    Example
    -------
    >>> PositionalConv(8, kernel=4, groups=2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self, dim: int, kernel: int = 128, groups: int = 16, depth: int = 1, *, over_padding: bool = False
    ) -> None:
        super().__init__()
        if dim % groups or min(dim, kernel, groups, depth) < 1:
            raise ModelError(
                f"the positional convolution has dim {dim}, kernel {kernel}, {groups} groups and depth {depth}; "
                "all must be positive and dim a multiple of the groups."
            )
        self.groups, self.over_padding = groups, over_padding
        self.fast = True
        if depth > 1:
            kernel = max(3, kernel // depth)
        self.blocks = nn.ModuleList(PositionalBlock(dim, kernel, groups, weight_norm=depth == 1) for _ in range(depth))

    def forward(
        self, x: Tensor, frame_lengths: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Positions from the neighbourhood of each frame.

        Arguments
        ---------
        x : (batch, frames, dim).
        frame_lengths : (batch,) real frames; what ``x`` holds behind them is taken as zero. None: all are real.
        dtype : format of products; None takes that of ``x``.

        Returns
        -------
        (batch, frames, dim), in the padding zero.
        """
        dtype = dtype or x.dtype
        x = x.to(dtype)
        real = lengths = real_frames(frame_lengths, x)
        if self.over_padding and len(self.blocks) > 1:
            x, lengths = zero_padding(x, real), [x.shape[1]] * len(x)
        for block in self.blocks:
            weight, bias = block.effective_weight().to(dtype), block.bias.to(dtype)
            x = window_convolution(x, weight, bias, lengths, groups=self.groups, fast=self.fast)
            if len(self.blocks) > 1:
                x = layer_norm(x, None, None)
            x = F.gelu(x)
        return x if lengths is real else zero_padding(x, real)
