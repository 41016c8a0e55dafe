"""The convolutions as a module: fast against plain, padded against alone, and the originals' padding."""

import pytest
import torch

from toolkit.errors import ModelError
from toolkit.nn.fast import set_fast
from toolkit.nn.feature_extractor import BASE_CONV_LAYERS, FeatureExtractor

SMALL = [(6, 10, 5), (5, 3, 2), (4, 2, 2)]
TINY = [(8, 20, 10), (8, 4, 4), (8, 4, 4), (8, 2, 2)]


def build(layers=SMALL, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return FeatureExtractor(layers, **options).to(dtype)


def gradients(extractor, waveforms, lengths):
    out = extractor(waveforms, lengths)
    weights = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    loss = (out * weights).sum()
    parameters = [p for p in extractor.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return out, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


@pytest.mark.parametrize("layers", [SMALL, TINY])
@pytest.mark.parametrize("options", [{}, {"norm": "layer", "bias": True}, {"norm": "layer"}, {"bias": True}])
@pytest.mark.parametrize("lengths", [None, [900, 640], [900, 330]])
def test_fast_equals_plain(layers, options, lengths):
    extractor = build(layers, **options)
    waveforms = torch.randn(2, 900, dtype=torch.float64)
    lengths = None if lengths is None else torch.tensor(lengths)
    ours = gradients(extractor, waveforms, lengths)
    plain = gradients(set_fast(extractor, False), waveforms, lengths)
    assert torch.allclose(ours[0], plain[0], atol=1e-10)
    for a, b in zip(ours[1], plain[1], strict=True):
        # a bias in front of the group norm has no effect: its gradient is rounding noise in the plain formula
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("use_fast", [True, False])
@pytest.mark.parametrize("options", [{}, {"norm": "layer", "bias": True}])
def test_padding_changes_nothing(options, use_fast):
    extractor = set_fast(build(**options), use_fast)
    waveforms = torch.randn(2, 700, dtype=torch.float64)
    together = extractor(waveforms, torch.tensor([700, 423]))
    alone = extractor(waveforms[1:, :423])
    frames = int(extractor.frame_lengths(torch.tensor(423)))
    assert alone.shape[1] == frames
    assert torch.allclose(together[1, :frames], alone[0], atol=1e-12)
    assert not together[1, frames:].any()


def test_norm_over_padding_is_the_convolution_over_the_padded_batch():
    """The originals' mathematics written out: conv1d, group norm over all frames, GELU."""
    extractor = build(norm_over_padding=True)
    waveforms = torch.randn(2, 700, dtype=torch.float64)
    waveforms[1, 423:] = 0
    x = waveforms[:, None]
    for i, block in enumerate(extractor.blocks):
        x = torch.nn.functional.conv1d(x, block.weight, stride=block.stride)
        x = torch.nn.functional.gelu(block.norm(x) if i == 0 else x)
    assert torch.allclose(extractor(waveforms, torch.tensor([700, 423])), x.transpose(1, 2), atol=1e-10)


def test_base_frames():
    extractor = FeatureExtractor([(1, k, s) for _, k, s in BASE_CONV_LAYERS])
    assert (extractor.total_stride, extractor.receptive_field) == (320, 400)
    lengths = torch.tensor([400, 399, 16000, 250000, 320000, 0])
    assert extractor.frame_lengths(lengths).tolist() == [1, 0, 49, 781, 999, 0]
    assert extractor(torch.randn(1, 16000)).shape == (1, 49, 1)


@pytest.mark.parametrize("options", [{}, {"norm": "layer", "bias": True}])
def test_checkpointing_gives_the_same_gradients(options):
    waveforms, lengths = torch.randn(2, 700, dtype=torch.float64), torch.tensor([700, 423])
    usual = gradients(build(**options), waveforms, lengths)
    again = gradients(build(gradient_checkpointing=True, **options), waveforms, lengths)
    for a, b in zip(usual[1], again[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"norm": "layer", "bias": True}])
def test_bfloat16_is_near_float32(options):
    extractor = build(dtype=torch.float32, **options)
    waveforms = torch.randn(2, 4000)
    out = extractor(waveforms, dtype=torch.bfloat16)
    expected = extractor(waveforms)
    assert out.dtype == torch.bfloat16
    assert float(((out.float() - expected).norm() / expected.norm()).detach()) < 0.01
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in extractor.parameters() if p.grad is not None)


def test_kaiming_initialization():
    weight = FeatureExtractor([(256, 10, 5), (256, 3, 2)]).blocks[1].weight
    assert abs(float(weight.detach().std()) - (2 / (256 * 3)) ** 0.5) < 0.0005


def test_too_short_waveforms_are_refused():
    with pytest.raises(ModelError, match="one frame needs 30 samples"):
        build()(torch.randn(1, 29, dtype=torch.float64))
    assert build()(torch.randn(1, 30, dtype=torch.float64)).shape[1] == 1


@pytest.mark.parametrize("layers", [[], [(4, 3)], [(4, 0, 1)]])
def test_settings_are_checked(layers):
    with pytest.raises(ModelError, match="conv_layers"):
        FeatureExtractor(layers)
    with pytest.raises(ModelError, match="norm is 'batch'"):
        FeatureExtractor(norm="batch")
