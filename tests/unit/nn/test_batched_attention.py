"""The fast form over a batch of short utterances: its input stays as it was, also that of a single utterance."""

import pytest
import torch

from toolkit.nn.fast.batched_attention import batched_attention
from toolkit.nn.fast.bits import DropoutBits
from toolkit.seeds import Randomness

FRAMES, DIM, HEADS = 7, 12, 3


def run(batch, fast, p):
    generator = torch.Generator().manual_seed(batch)
    qkv = torch.randn(batch * FRAMES, 3 * DIM, dtype=torch.float64, generator=generator)
    weights = torch.randn(batch * FRAMES, DIM, dtype=torch.float64, generator=generator)
    leaf = qkv.clone().requires_grad_()
    bits = DropoutBits(Randomness(3).child("layer"), torch.device("cpu")) if p else None
    out = batched_attention(leaf * 1, None, batch, HEADS, p=p, bits=bits, fast=fast)
    (gradient,) = torch.autograd.grad((out * weights).sum(), leaf)
    return qkv, out.detach(), gradient


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_gradient_is_the_formulas(batch, p):
    _, out, gradient = run(batch, True, p)
    _, plain_out, plain_gradient = run(batch, False, p)
    torch.testing.assert_close(out, plain_out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_input_is_left_alone(batch, trains):
    qkv = torch.randn(batch * FRAMES, 3 * DIM, dtype=torch.float64)
    before = qkv.clone()
    batched_attention(qkv.requires_grad_(trains), None, batch, HEADS)
    assert torch.equal(qkv.detach(), before)
