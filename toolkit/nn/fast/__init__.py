"""Fast forms of what the models compute, each beside its plain formula; modules call one name.

The forms here are written for CPUs: what costs there is passes over memory, random numbers and strided
convolutions. On any other device, in other formats, and where ``fast=False`` is asked for, the plain formula runs
with torch's own kernels; the tests hold the two against each other.
"""

from toolkit.nn.fast.attention import attention, padded_attention, plain_attention
from toolkit.nn.fast.batched_attention import batched_attention
from toolkit.nn.fast.bits import DropoutBits, dropout
from toolkit.nn.fast.common import full_lengths, pack_rows, padding_mask, set_fast, unpack_rows
from toolkit.nn.fast.convolution import convolution_gelu, plain_convolution_gelu
from toolkit.nn.fast.first_convolution import (
    convolution_group_norm_gelu,
    convolution_layer_norm_gelu,
    plain_convolution_group_norm_gelu,
    plain_convolution_layer_norm_gelu,
    zero_padding,
)
from toolkit.nn.fast.linear import (
    layer_norm,
    linear_gelu,
    linear_residual,
    linear_residual_norm,
    plain_linear_gelu,
    plain_linear_residual,
    plain_linear_residual_norm,
)
from toolkit.nn.fast.positional import plain_window_convolution, window_convolution

__all__ = [
    "DropoutBits",
    "attention",
    "batched_attention",
    "convolution_gelu",
    "convolution_group_norm_gelu",
    "convolution_layer_norm_gelu",
    "dropout",
    "full_lengths",
    "layer_norm",
    "linear_gelu",
    "linear_residual",
    "linear_residual_norm",
    "pack_rows",
    "padded_attention",
    "padding_mask",
    "plain_attention",
    "plain_convolution_gelu",
    "plain_convolution_group_norm_gelu",
    "plain_convolution_layer_norm_gelu",
    "plain_linear_gelu",
    "plain_linear_residual",
    "plain_linear_residual_norm",
    "plain_window_convolution",
    "set_fast",
    "unpack_rows",
    "window_convolution",
    "zero_padding",
]
