"""What a stack of positional convolutions finds behind an utterance, against the formula written out."""

import pytest
import torch
import torch.nn.functional as F

from toolkit.nn import positional
from toolkit.nn.positional import PositionalConv

LENGTHS = torch.tensor([9, 5])


def stack(over_padding, fast=True, depth=3):
    torch.manual_seed(1)
    module = PositionalConv(8, kernel=9, groups=2, depth=depth, over_padding=over_padding).double()
    module.fast = fast
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return module, x


def written_out(module, x):
    """The originals: zeros behind an utterance once, then every convolution runs over all frames."""
    x = torch.where(torch.arange(9)[None, :, None] < LENGTHS[:, None, None], x, 0).transpose(1, 2)
    for block in module.blocks:
        x = F.conv1d(x, block.weight, block.bias, padding=block.weight.shape[2] // 2, groups=module.groups)[..., :9]
        x = F.gelu(F.layer_norm(x.transpose(1, 2), (8,)).transpose(1, 2))
    return x.transpose(1, 2)


@pytest.mark.parametrize("fast", [True, False])
def test_over_padding_is_the_originals_stack(fast):
    module, x = stack(True, fast)
    ours, theirs = module(x, LENGTHS), written_out(module, x)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours[1, :5], theirs[1, :5], rtol=0, atol=1e-12)
    assert not ours[1, 5:].any()


@pytest.mark.parametrize("fast", [True, False])
def test_without_it_an_utterance_gets_what_it_gets_alone(fast):
    module, x = stack(False, fast)
    alone = module(x[1:, :5])
    torch.testing.assert_close(module(x, LENGTHS)[1, :5], alone[0], rtol=0, atol=1e-12)
    # and over the padding it does not: its last frames see what the earlier convolutions left there
    other = stack(True, fast)[0](x, LENGTHS)[1, :5]
    assert (other - alone[0]).abs().max() > 0.01


def test_full_batches_and_single_convolutions_are_the_same_either_way():
    (one, x), (other, _) = stack(True), stack(False)
    assert torch.equal(one(x), other(x))
    (one, x), (other, _) = stack(True, depth=1), stack(False, depth=1)
    assert torch.equal(one(x, LENGTHS), other(x, LENGTHS))


def test_the_weight_norm_written_out_is_torchs_fused_one(monkeypatch):
    """The first runs on devices without a fused kernel."""
    torch.manual_seed(3)
    block = PositionalConv(8, kernel=5, groups=2).blocks[0]
    results = []
    for fused in (("cpu",), ()):
        monkeypatch.setattr(positional, "FUSED_WEIGHT_NORM", fused)
        weight = block.effective_weight()
        results.append([weight, *torch.autograd.grad(weight.sin().sum(), [block.weight_v, block.weight_g])])
    assert results[1][0].grad_fn.name() == "MulBackward0" != results[0][0].grad_fn.name()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
