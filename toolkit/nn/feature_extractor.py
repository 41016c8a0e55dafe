"""The convolutions that turn a waveform into features, one every 20 ms with wav2vec 2.0's settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from toolkit.errors import ModelError
from toolkit.nn.fast.common import real_frames
from toolkit.nn.fast.convolution import convolution_gelu
from toolkit.nn.fast.first_convolution import convolution_group_norm_gelu, convolution_layer_norm_gelu

BASE_CONV_LAYERS = ((512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2), (512, 2, 2))
"""(channels, kernel, stride) of wav2vec 2.0: 400 samples per frame, 320 from one to the next."""


class ConvBlock(nn.Module):
    """The parameters of one convolution: weight (channels, input channels, kernel), bias, norm."""

    def __init__(self, inputs: int, channels: int, kernel: int, stride: int, *, norm: nn.Module | None, bias: bool):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels, inputs, kernel))
        nn.init.kaiming_normal_(self.weight)
        bound = (inputs * kernel) ** -0.5
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None
        self.norm = norm


class FeatureExtractor(nn.Module):
    """Strided convolutions with GELU over raw waveforms (wav2vec 2.0, section 2).

    Layout is (batch, frames, channels). Right-padded batches give each utterance what it would give alone, and zeros
    in the padding; ``norm_over_padding=True`` does what the originals do instead.

    Arguments
    ---------
    conv_layers : (channels, kernel, stride) of each convolution.
    norm : "group" (one norm per channel over time, after the first convolution; BASE) or "layer" (a norm over the
        channels of each frame after every convolution; LARGE).
    bias : whether the convolutions have biases (LARGE).
    norm_over_padding : group norm over the padded length, and convolutions that run on into the padding.
    gradient_checkpointing : recompute each convolution in the backward pass to save memory.

    Raises
    ------
    ModelError : settings out of range, or waveforms shorter than one frame.

    Example
    -------
    >>> extractor = FeatureExtractor([(8, 10, 5), (8, 3, 2)])
    >>> extractor(torch.randn(2, 400)).shape
    torch.Size([2, 39, 8])
    >>> extractor.frame_lengths(torch.tensor([400, 200])).tolist()
    [39, 19]
    """

    def __init__(
        self,
        conv_layers: Sequence[tuple[int, int, int]] = BASE_CONV_LAYERS,
        *,
        norm: str = "group",
        bias: bool = False,
        norm_over_padding: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        conv_layers = [tuple(int(n) for n in layer) for layer in conv_layers]
        if not conv_layers or any(len(layer) != 3 or min(layer) < 1 for layer in conv_layers):
            raise ModelError(
                f"conv_layers is {conv_layers}; expected at least one (channels, kernel, stride), all positive."
            )
        if norm not in ("group", "layer"):
            raise ModelError(f"the extractor's norm is {norm!r}; expected 'group' (BASE) or 'layer' (LARGE).")
        self.norm_mode, self.norm_over_padding = norm, norm_over_padding
        self.gradient_checkpointing = gradient_checkpointing
        self.fast = True
        blocks, inputs = [], 1
        for i, (channels, kernel, stride) in enumerate(conv_layers):
            block_norm = None
            if norm == "layer":
                block_norm = nn.LayerNorm(channels)
            elif i == 0:
                block_norm = nn.GroupNorm(channels, channels)
            blocks.append(ConvBlock(inputs, channels, kernel, stride, norm=block_norm, bias=bias))
            inputs = channels
        self.blocks = nn.ModuleList(blocks)
        self.output_dim = inputs
        self.total_stride, self.receptive_field = 1, 1
        for _, kernel, stride in conv_layers:
            self.receptive_field += (kernel - 1) * self.total_stride
            self.total_stride *= stride

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """Frames of utterances of ``lengths`` samples, (batch,) int64; 0 where shorter than one frame."""
        for block in self.blocks:
            lengths = _output_frames(lengths, block)
        return lengths.clamp(min=0)

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Features of a batch of waveforms.

        Arguments
        ---------
        waveforms : (batch, samples), float32.
        lengths : (batch,) samples of each utterance, best on the host; None means that all are full.
        dtype : format of products and result; None takes that of the weights. The first convolution always
            computes in the waveforms' own on a CPU.

        Returns
        -------
        (batch, frames, channels), zero in the padding.
        """
        samples = waveforms.shape[1]
        if samples < self.receptive_field:
            raise ModelError(
                f"waveforms of {samples} samples are too short: one frame needs {self.receptive_field} samples; "
                "leave such utterances out or pad the batch."
            )
        dtype = dtype or self.blocks[0].weight.dtype
        if self.norm_over_padding:
            lengths = None
        sizes = self._sizes(lengths, waveforms)
        frames = samples
        for block in self.blocks:
            frames = _output_frames(frames, block)
        x = self._rounded_up(waveforms) if self.fast and waveforms.device.type == "cpu" else waveforms
        for i in range(len(self.blocks)):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    self._run, i, x, sizes[i], dtype, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = self._run(i, x, sizes[i], dtype)
        return x[:, :frames]

    def _sizes(self, lengths: Tensor | None, waveforms: Tensor) -> list[list[int] | Tensor]:
        """Real frames after each convolution, in the form of :func:`toolkit.nn.fast.common.real_frames`."""
        sizes = real_frames(lengths, waveforms)
        table: list[list[int] | Tensor] = []
        for block in self.blocks:
            if isinstance(sizes, Tensor):
                sizes = _output_frames(sizes, block).clamp(min=0)
            else:
                sizes = [max(0, _output_frames(n, block)) for n in sizes]
            table.append(sizes)
        return table

    def _rounded_up(self, waveforms: Tensor) -> Tensor:
        """Zeros behind the waveforms, so that each convolution's input is a whole number of its strides.

        Then the rows of neighboring utterances join up, and short ones can be taken in one product. What the zeros
        give is padding: it counts nowhere and is cut off at the end.
        """
        first, *others = self.blocks
        multiple = math.prod(block.stride for block in others)
        windows = _output_frames(waveforms.shape[1], first)
        windows = -(-windows // multiple) * multiple
        samples = (windows - 1) * first.stride + first.weight.shape[2]
        return F.pad(waveforms, (0, samples - waveforms.shape[1])) if samples > waveforms.shape[1] else waveforms

    def _run(self, i: int, x: Tensor, frames: list[int] | Tensor, dtype: torch.dtype) -> Tensor:
        block = self.blocks[i]
        norm = block.norm
        if i > 0:
            return convolution_gelu(
                x,
                block.weight.to(dtype),
                None if block.bias is None else block.bias.to(dtype),
                block.stride,
                frames,
                norm_weight=None if norm is None else norm.weight,
                norm_bias=None if norm is None else norm.bias,
                fast=self.fast,
            )
        x = x.to(block.weight.dtype)
        if self.norm_mode == "group":
            return convolution_group_norm_gelu(
                x, block.weight, norm.weight, norm.bias, block.stride, frames, dtype=dtype, fast=self.fast
            )
        return convolution_layer_norm_gelu(
            x, block.weight, block.bias, norm.weight, norm.bias, block.stride, frames, dtype=dtype, fast=self.fast
        )


def _output_frames(inputs, block: ConvBlock):
    """Frames after a convolution of ``inputs`` frames (an int or a tensor)."""
    return (inputs - block.weight.shape[2]) // block.stride + 1
