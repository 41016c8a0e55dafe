"""The transformer as a module: order of operations, padding, dropout that repeats, layers left out."""

import pytest
import torch
import torch.nn.functional as F

from toolkit.errors import ModelError
from toolkit.nn.fast import set_fast
from toolkit.nn.positional import PositionalConv
from toolkit.nn.transformer import TransformerEncoder
from toolkit.seeds import Randomness

BOTH_LAYOUTS = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
RNG = Randomness(5).child("update", 3, 0)
DOUBLE = torch.float64


def build(dtype=DOUBLE, *, packed=True, **options):
    torch.manual_seed(0)
    settings = {"num_layers": 3, "dim": 16, "ffn_dim": 24, "num_heads": 2, "pos_kernel": 6, "pos_groups": 4}
    encoder = TransformerEncoder(**settings | {"layerdrop": 0.0} | options).to(dtype)
    encoder.short_frames = 0 if packed else 1000
    for parameter in encoder.parameters():  # away from zero biases and unit norms, so that each matters
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder


def gradients(encoder, x, lengths=None, rng=RNG):
    x = x.clone().requires_grad_()
    out = encoder(x, lengths, rng=rng)
    loss = (out * torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)).sum()
    wanted = [x, *encoder.parameters()]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return out, [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, grads, strict=True)]


def reference(encoder, x):
    """The order of the published model, written with torch's own functions."""
    block = encoder.positional.blocks[0]
    length = torch.stack([block.weight_v[:, :, j].norm() for j in range(block.weight_v.shape[2])])
    weight = block.weight_v / length * block.weight_g
    kernel = weight.shape[2]
    conv = F.conv1d(x.transpose(1, 2), weight, block.bias, padding=kernel // 2, groups=4)
    x = x + F.gelu(conv[..., : x.shape[1]]).transpose(1, 2)
    if not encoder.pre_norm:
        x = encoder.norm(x)
    outputs = []
    for layer in encoder.layers:
        def attend(y, layer=layer):
            q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in layer.qkv(y).chunk(3, -1))
            return layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        def feed_forward(y, layer=layer):
            return layer.fc2(F.gelu(layer.fc1(y)))

        if encoder.pre_norm:
            x = x + attend(layer.attention_norm(x))
            ffn = feed_forward(layer.final_norm(x))
            x = x + ffn
        else:
            x = layer.attention_norm(x + attend(x))
            ffn = feed_forward(x)
            x = layer.final_norm(x + ffn)
        outputs.append((x, ffn))
    return (encoder.norm(x) if encoder.pre_norm else x), outputs


@BOTH_LAYOUTS
@pytest.mark.parametrize("use_fast", [True, False])
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("frames", [1, 8, 9])
def test_order_of_operations(pre_norm, use_fast, frames, packed):
    encoder = set_fast(build(pre_norm=pre_norm, packed=packed), use_fast)
    x = torch.randn(2, frames, 16, dtype=DOUBLE)
    expected, layers = reference(encoder, x)
    assert torch.allclose(encoder(x), expected)
    out, ours = encoder(x, layers=True)
    assert torch.allclose(out, expected)
    assert len(ours) == len(layers)
    for (output, ffn), (expected_output, expected_ffn) in zip(ours, layers, strict=True):
        assert torch.allclose(output, expected_output)
        assert torch.allclose(ffn, expected_ffn)


@BOTH_LAYOUTS
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("lengths", [None, [9, 9], [9, 4], [1, 9]])
@pytest.mark.parametrize("options", [{}, {"activation_dropout": 0.2}, {"dropout": 0.0, "attention_dropout": 0.0}])
def test_fast_equals_plain_with_dropout(pre_norm, lengths, options, packed):
    encoder = build(pre_norm=pre_norm, packed=packed, **options)
    x = torch.randn(2, 9, 16, dtype=DOUBLE)
    lengths = None if lengths is None else torch.tensor(lengths)
    ours = gradients(encoder, x, lengths)
    plain = gradients(set_fast(encoder, False), x, lengths)
    assert torch.allclose(ours[0], plain[0])
    for a, b in zip(ours[1], plain[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


@BOTH_LAYOUTS
@pytest.mark.parametrize("options", [{}, {"pre_norm": True}, {"pos_depth": 2}])
def test_padding_changes_nothing(options, packed):
    encoder = build(packed=packed, **options)
    x = torch.randn(2, 9, 16, dtype=DOUBLE)
    together = encoder(x, torch.tensor([9, 5]))
    alone = encoder(x[1:, :5])
    assert torch.allclose(together[1, :5], alone[0])
    assert not together[1, 5:].any()
    changed = x.clone()
    changed[1, 5:] = float("nan")
    assert torch.equal(encoder(changed, torch.tensor([9, 5])), together)


@BOTH_LAYOUTS
def test_layer_outputs_of_a_padded_batch(packed):
    encoder = build(packed=packed)
    x = torch.randn(2, 9, 16, dtype=DOUBLE)
    _, together = encoder(x, torch.tensor([9, 5]), layers=True)
    _, alone = encoder(x[1:, :5], layers=True)
    for ours, single in zip(together, alone, strict=True):
        for a, b in zip(ours, single, strict=True):
            assert a.shape == (2, 9, 16)
            assert torch.allclose(a[1, :5], b[0])
            assert not a[1, 5:].any()


@BOTH_LAYOUTS
@pytest.mark.parametrize("pre_norm", [False, True])
def test_checkpointing_draws_the_same_dropout(pre_norm, packed):
    x = torch.randn(2, 9, 16, dtype=DOUBLE)
    lengths = torch.tensor([9, 6])
    options = {"pre_norm": pre_norm, "activation_dropout": 0.2, "layerdrop": 0.3, "packed": packed}
    usual = gradients(build(**options), x, lengths)
    again = gradients(build(gradient_checkpointing=True, **options), x, lengths)
    for a, b in zip(usual[1], again[1], strict=True):
        assert torch.equal(a, b)


@BOTH_LAYOUTS
@pytest.mark.parametrize("use_fast", [True, False])
@pytest.mark.parametrize("options", [{}, {"pre_norm": True}, {"num_layers": 0}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize(("lengths", "positions"), [(None, [0, 3, 8, 9, 16]), ([9, 4, 2], [0, 8, 9, 12]), (None, [10])])
def test_wanted_positions_are_those_of_the_whole(options, use_fast, packed, lengths, positions):
    encoder = set_fast(build(packed=packed, **options), use_fast)
    x = torch.randn(2 if lengths is None else 3, 9, 16, dtype=DOUBLE).requires_grad_()
    lengths = None if lengths is None else torch.tensor(lengths)
    positions = torch.tensor(positions)
    wanted = [x, *encoder.parameters()]
    results = []
    for given in (None, positions):
        out = encoder(x, lengths, positions=given)
        out = out.flatten(0, 1)[positions] if given is None else out
        loss = (out * torch.cos(torch.arange(out.numel(), dtype=DOUBLE)).view(out.shape)).sum()
        results.append([out, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)])
    for whole, part in zip(*results, strict=True):
        assert torch.allclose(whole, part, atol=1e-12)
    layers_too, _ = encoder(x, lengths, positions=positions, layers=True)
    assert torch.allclose(layers_too, results[0][0])


def test_wanted_positions_in_the_padding_give_the_last_real_frame():
    encoder = build()
    x, lengths = torch.randn(2, 9, 16, dtype=DOUBLE), torch.tensor([4, 9])
    out = encoder(x, lengths, positions=torch.tensor([3, 7, 9]))
    assert torch.equal(out[0], out[1]) and not torch.allclose(out[1], out[2])


@pytest.mark.parametrize("use_fast", [True, False])
def test_wanted_positions_with_dropout_keep_the_mean(use_fast):
    """The decisions differ from those of the whole; what they average to does not."""
    encoder = set_fast(build(num_layers=1), use_fast)
    x, positions = torch.randn(1, 9, 16, dtype=DOUBLE), torch.tensor([1, 5])
    means = []
    for given in (None, positions):
        outs = [encoder(x, rng=Randomness(i), positions=given) for i in range(400)]
        out = torch.stack(outs).detach().mean(0)
        means.append(out.flatten(0, 1)[positions] if given is None else out)
    assert float((means[0] - means[1]).norm() / means[0].norm()) < 0.06


def test_dropout_follows_the_place_and_evaluation_has_none():
    encoder = build()
    x = torch.randn(1, 9, 16, dtype=DOUBLE)
    assert torch.equal(encoder(x, rng=RNG), encoder(x, rng=RNG))
    assert not torch.allclose(encoder(x, rng=RNG), encoder(x, rng=Randomness(5).child("update", 3, 1)))
    assert not torch.allclose(encoder(x, rng=RNG), encoder(x))
    assert torch.equal(encoder(x), encoder(x))


@BOTH_LAYOUTS
def test_each_layer_draws_its_own_dropout(packed):
    """Layers that only add dropout(1) twice: what they add shows their decisions."""
    encoder = build(pre_norm=True, packed=packed)
    for layer in encoder.layers:
        for linear in (layer.out, layer.fc2):
            linear.weight.data.zero_()
            linear.bias.data.fill_(1)
    _, outputs = encoder(torch.randn(1, 9, 16, dtype=DOUBLE), rng=RNG, layers=True)
    second, third = (outputs[i][0] - outputs[i - 1][0] for i in (1, 2))
    assert bool((second < 2).any()), "something is dropped"
    assert not torch.allclose(second, third)


def test_layerdrop_leaves_out_whole_layers():
    encoder = build(num_layers=8, layerdrop=0.5, dropout=0.0, attention_dropout=0.0)
    x = torch.randn(1, 5, 16, dtype=DOUBLE)
    with torch.no_grad():
        runs = [len(encoder(x, rng=Randomness(i), layers=True)[1]) for i in range(200)]
    assert 3.7 < sum(runs) / len(runs) < 4.3
    assert len(encoder(x, layers=True)[1]) == 8
    _, grads = gradients(encoder, x, rng=Randomness(0))
    moved = sum(bool(g.any()) for (name, _), g in zip(encoder.named_parameters(), grads[1:], strict=True)
                if name.endswith("fc1.weight"))
    assert moved == len(encoder(x, rng=Randomness(0), layers=True)[1])


def test_bfloat16_is_near_float32_and_its_gradients_are_float32():
    encoder = build(torch.float32)
    x = torch.randn(2, 30, 16)
    expected = gradients(encoder, x)
    out = encoder(x, rng=RNG, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert float(((out.float() - expected[0]).norm() / expected[0].norm()).detach()) < 0.03
    loss = (out * torch.cos(torch.arange(out.numel())).view(out.shape)).sum()
    loss.backward()
    for parameter, reference_gradient in zip(encoder.parameters(), expected[1][1:], strict=True):
        assert parameter.grad.dtype == torch.float32
        if reference_gradient.norm() > 1:
            assert float((parameter.grad - reference_gradient).norm() / reference_gradient.norm()) < 0.1


def test_initialization():
    encoder = TransformerEncoder(num_layers=1, dim=256, ffn_dim=256, num_heads=4, pos_kernel=32, pos_groups=4)
    layer, block = encoder.layers[0], encoder.positional.blocks[0]
    for linear in (layer.qkv, layer.out, layer.fc1, layer.fc2):
        assert abs(float(linear.weight.detach().std()) - 0.02) < 0.0005
        assert not linear.bias.any()
    assert abs(float(block.weight_v.detach().std()) - (4 / (32 * 256)) ** 0.5) < 0.0005
    assert torch.allclose(block.effective_weight(), block.weight_v), "at the start, weight norm changes nothing"
    assert block.weight_g.shape == (1, 1, 32) and block.weight_v.shape == (256, 64, 32)


@pytest.mark.parametrize("use_fast", [True, False])
def test_positional_stack_of_data2vec(use_fast):
    torch.manual_seed(0)
    conv = set_fast(PositionalConv(8, kernel=19, groups=2, depth=3).double(), use_fast)
    x = torch.randn(2, 11, 8, dtype=DOUBLE)
    y = x.transpose(1, 2)
    for block in conv.blocks:
        y = F.conv1d(y, block.weight, block.bias, padding=3, groups=2)[..., :11]
        y = F.gelu(F.layer_norm(y.transpose(1, 2), (8,))).transpose(1, 2)
    assert conv.blocks[0].weight.shape == (8, 4, 6)
    assert torch.allclose(conv(x), y.transpose(1, 2))


def test_the_last_layers_can_start_anew():
    model = TransformerEncoder(num_layers=3, dim=16, ffn_dim=24, num_heads=2, pos_kernel=6, pos_groups=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.reset_layers(0)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    model.reset_layers(2)
    for name, tensor in model.state_dict().items():
        if not name.startswith(("layers.1.", "layers.2.")):
            assert torch.equal(tensor, trained[name]), name
        elif "norm" in name or name.endswith("bias"):
            assert torch.equal(tensor, before[name]), name
        else:
            assert abs(float(tensor.mean())) < 0.01 and 0.015 < float(tensor.std()) < 0.025, name
    with pytest.raises(ModelError, match="4 layers cannot be reset; the encoder has 3"):
        model.reset_layers(4)


def test_settings_are_checked():
    with pytest.raises(ModelError, match="no multiple of its num_heads 3"):
        build(num_heads=3)
    with pytest.raises(ModelError, match=r"layerdrop is 1\.0"):
        build(layerdrop=1.0)
    with pytest.raises(ModelError, match="has -1 layers of inner width"):
        build(num_layers=-1)
    with pytest.raises(ModelError, match="5 groups"):
        PositionalConv(16, groups=5)
