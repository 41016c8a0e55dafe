"""Products of the transformer with what follows them: dropout, residual, norm, GELU.

All take rows (frames, channels) in the format that products run in; norms' scale and shift stay float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.nn.fast.bits import DropoutBits, apply_mask, apply_mask_, dropout
from toolkit.nn.fast.common import takes_fast_form, wants_gradient


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Norm over the last dimension in float32 or wider, the result in the format of ``x``.

    Arguments
    ---------
    x : (..., channels).
    weight, bias : (channels,) in float32 (or float64), or None.
    """
    shape = (x.shape[-1],)
    if x.device.type == "cpu" and (weight is not None or x.dtype == torch.float32):
        # the CPU kernel takes bfloat16 rows with float32 scale and shift, and computes in float32
        return F.layer_norm(x, shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), shape, weight, bias, eps).to(x.dtype)


# ---------------------------------------------------------------- linear, GELU, dropout


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, *, p: float = 0.0, bits: DropoutBits | None = None, fast: bool = True
) -> Tensor:
    """dropout(gelu(x weight' + bias)).

    Arguments
    ---------
    x : (rows, inputs).
    weight, bias : (outputs, inputs) and (outputs,), in the format of ``x``.
    p, bits : activation dropout; ``bits`` None means evaluation.
    fast : False takes the plain formula.
    """
    p = p if bits is not None else 0.0
    if takes_fast_form(fast, x, weight) and wants_gradient(x, weight, bias):
        return _LinearGelu.apply(x, weight, bias, bits.keep(p, len(x), len(weight)) if p > 0 else None, 1 / (1 - p))
    return plain_linear_gelu(x, weight, bias, p=p, bits=bits)


def plain_linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, *, p: float = 0.0, bits: DropoutBits | None = None
) -> Tensor:
    """The formula of :func:`linear_gelu`."""
    return dropout(F.gelu(F.linear(x, weight, bias)), p, bits)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        z = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, z, mask)
        ctx.scale = scale
        out = F.gelu(z)
        return out if mask is None else apply_mask_(out.mul_(scale), mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, z, mask = ctx.saved_tensors
        if mask is not None:
            grad = apply_mask_(grad * ctx.scale, mask)
        dz = torch.ops.aten.gelu_backward(grad, z)
        return dz @ weight, dz.t() @ x, dz.sum(0), None, None


# ---------------------------------------------------------------- linear, dropout, residual (pre-norm blocks)


def linear_residual(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    p: float = 0.0,
    bits: DropoutBits | None = None,
    fast: bool = True,
) -> Tensor:
    """residual + dropout(x weight' + bias).

    Arguments
    ---------
    residual : (rows, outputs).
    x : (rows, inputs).
    weight, bias : (outputs, inputs) and (outputs,), in the format of ``x``.
    p, bits : dropout; ``bits`` None means evaluation.
    fast : False takes the plain formula.
    """
    p = p if bits is not None else 0.0
    if takes_fast_form(fast, residual, x, weight) and wants_gradient(residual, x, weight, bias):
        return _LinearResidual.apply(residual, x, weight, bias, p, bits)
    return plain_linear_residual(residual, x, weight, bias, p=p, bits=bits)


def plain_linear_residual(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *, p: float = 0.0, bits: DropoutBits | None = None
) -> Tensor:
    """The formula of :func:`linear_residual`."""
    return residual + dropout(F.linear(x, weight, bias), p, bits)


def _dropped_sum(residual: Tensor, y: Tensor, p: float, bits: DropoutBits | None) -> tuple[Tensor, Tensor | None]:
    """residual + dropout(y), written over ``y``, and the mask."""
    mask = None
    if p > 0:
        mask = bits.keep(p, *y.shape)
        apply_mask_(y, mask)
    return torch.add(residual, y, alpha=1 / (1 - p), out=y), mask


class _LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, x, weight, bias, p: float, bits: DropoutBits | None) -> Tensor:
        out, mask = _dropped_sum(residual, F.linear(x, weight, bias), p, bits)
        ctx.save_for_backward(x, weight, mask)
        ctx.scale = 1 / (1 - p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, mask = ctx.saved_tensors
        dy = grad if mask is None else apply_mask_(grad * ctx.scale, mask)
        return grad, dy @ weight, dy.t() @ x, dy.sum(0), None, None


# ---------------------------------------------------------------- linear, dropout, residual, norm (post-norm blocks)


def linear_residual_norm(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    p: float = 0.0,
    bits: DropoutBits | None = None,
    eps: float = 1e-5,
    fast: bool = True,
) -> Tensor:
    """layer_norm(residual + dropout(x weight' + bias)).

    Arguments
    ---------
    residual : (rows, outputs).
    x : (rows, inputs).
    weight, bias : (outputs, inputs) and (outputs,), in the format of ``x``.
    norm_weight, norm_bias : (outputs,), float32 (or float64).
    p, bits : dropout; ``bits`` None means evaluation.
    fast : False takes the plain formula.
    """
    p = p if bits is not None else 0.0
    if takes_fast_form(fast, residual, x, weight) and wants_gradient(residual, x, weight, bias, norm_weight):
        return _LinearResidualNorm.apply(residual, x, weight, bias, norm_weight, norm_bias, p, bits, eps)
    return plain_linear_residual_norm(residual, x, weight, bias, norm_weight, norm_bias, p=p, bits=bits, eps=eps)


def plain_linear_residual_norm(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    p: float = 0.0,
    bits: DropoutBits | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The formula of :func:`linear_residual_norm`."""
    return layer_norm(residual + dropout(F.linear(x, weight, bias), p, bits), norm_weight, norm_bias, eps)


class _LinearResidualNorm(torch.autograd.Function):
    """Keeps the sum before the norm and a two-byte mask; the library's norm kernels do both directions."""

    @staticmethod
    def forward(ctx, residual, x, weight, bias, norm_weight, norm_bias, p: float, bits, eps: float) -> Tensor:
        total, mask = _dropped_sum(residual, F.linear(x, weight, bias), p, bits)
        out, mean, rstd = torch.native_layer_norm(total, (total.shape[1],), norm_weight, norm_bias, eps)
        ctx.save_for_backward(x, weight, total, mean, rstd, mask, norm_weight, norm_bias)
        ctx.scale = 1 / (1 - p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, total, mean, rstd, mask, norm_weight, norm_bias = ctx.saved_tensors
        d_total, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), total, (total.shape[1],), mean, rstd, norm_weight, norm_bias, [True] * 3
        )
        dy = d_total if mask is None else apply_mask(d_total * ctx.scale, mask)
        return d_total, dy @ weight, dy.t() @ x, dy.sum(0), d_norm_weight, d_norm_bias, None, None, None
