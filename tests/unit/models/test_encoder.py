"""The encoder: padding, masks, randomness, gradients, precision, refusals."""

import pytest
import torch

from tests.unit.models.tiny import batch, encoder
from toolkit.errors import ModelError
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.seeds import Randomness

RNG = Randomness(1).child("update", 4, 0)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_padded_batch_gives_what_each_utterance_gives_alone(norm, pre_norm):
    model = encoder(extractor_norm=norm, pre_norm=pre_norm, conv_bias=norm == "layer").eval()
    waveforms, lengths = batch(4000, 2500, 1203, 90, 20)  # the last is shorter than a frame
    together = model(waveforms, lengths)
    penalty = 0.0
    for row, length in enumerate(lengths.tolist()):
        alone = model(waveforms[row : row + 1, :length])
        frames = int(alone.frame_lengths)
        assert frames == int(together.frame_lengths[row])
        for name in ("features", "extractor_features"):
            ours = getattr(together, name)[row, :frames]
            torch.testing.assert_close(ours, getattr(alone, name)[0], rtol=0, atol=1e-5)
        penalty += float(alone.feature_penalty.detach()) * frames
    assert float(together.feature_penalty.detach()) == pytest.approx(
        penalty / int(together.frame_lengths.sum()), rel=1e-5
    )


def test_norm_over_padding_mixes_padding_in():
    """The originals' behavior is there for who asks, and differs."""
    waveforms, lengths = batch(4000, 1203)
    ours, theirs = (encoder(norm_over_padding=flag).eval()(waveforms, lengths).features for flag in (False, True))
    assert not torch.allclose(ours[1, :20], theirs[1, :20], atol=1e-2)


def test_what_lies_in_the_padding_does_not_matter():
    model = encoder().eval()
    waveforms, lengths = batch(4000, 1203)
    clean = model(waveforms, lengths)
    waveforms[1, 1203:] = 1e3
    dirty = model(waveforms, lengths)
    frames = int(clean.frame_lengths[1])
    assert torch.equal(clean.features[1, :frames], dirty.features[1, :frames])


def test_the_shortest_waveforms_still_have_a_frame():
    model = encoder().eval()
    out = model(*batch(1))
    assert out.features.shape == (1, 1, 24) and out.frame_lengths.tolist() == [1] and out.features.isfinite().all()
    mixed = model(*batch(900, 1))
    assert mixed.frame_lengths.tolist()[1] == 1 and mixed.features.isfinite().all()


def test_full_lengths_and_none_are_the_same():
    model = encoder()
    waveforms, lengths = batch(900, 900)
    for rng in (None, RNG):
        assert torch.equal(model(waveforms, lengths, rng=rng).features, model(waveforms, rng=rng).features)


def test_randomness_is_a_function_of_the_place():
    model = encoder(mask_channel_prob=0.5, mask_channel_length=4, activation_dropout=0.1, layerdrop=0.3)
    waveforms, lengths = batch(4000, 3000)
    torch.manual_seed(1)
    first = model(waveforms, lengths, rng=RNG)
    torch.manual_seed(2)
    second = model(waveforms, lengths, rng=RNG)
    assert torch.equal(first.features, second.features)
    other = model(waveforms, lengths, rng=Randomness(1).child("update", 5, 0))
    assert not torch.equal(first.features, other.features)


def test_evaluation_draws_nothing():
    model = encoder(mask_channel_prob=0.5, mask_channel_length=4)
    waveforms, lengths = batch(2000, 3000)
    quiet = model.eval()(waveforms, lengths)
    assert torch.equal(model(waveforms, lengths, rng=RNG).features, quiet.features) and quiet.masked is None
    assert torch.equal(model.train()(waveforms, lengths).features, quiet.features)


def test_masked_frames_hold_the_vector_and_masked_channels_zero():
    model = encoder(mask_prob=0.5, mask_length=5, mask_channel_prob=0.5, mask_channel_length=4, dropout_input=0.0)
    waveforms, lengths = batch(4000, 3000)
    out = model(waveforms, lengths, rng=RNG)
    time_mask = torch.from_numpy(out.masked.mask)
    channels = (out.projected == 0).all(1)
    assert 4 <= int(channels[0].sum()) < 24 and time_mask.any() and not time_mask.all()
    for row in range(2):
        kept = ~channels[row]
        assert torch.equal(
            out.projected[row][time_mask[row]][:, kept],
            model.mask_embedding[kept].expand(int(time_mask[row].sum()), -1),
        )
    plain = model(waveforms, lengths).projected
    free = ~time_mask
    expected = plain.masked_fill(channels[:, None], 0)
    assert torch.equal(out.projected[free], expected[free])


def test_injected_masks_take_the_way_of_drawn_ones():
    settings = {"mask_channel_prob": 0.5, "mask_channel_length": 4, "dropout": 0.0, "attention_dropout": 0.0}
    model = encoder(**settings, dropout_input=0.0, layerdrop=0.0)
    waveforms, lengths = batch(4000, 3000)
    drawn = model(waveforms, lengths, rng=RNG)
    given = model(waveforms, lengths, time_mask=drawn.masked.mask, channel_mask=model.draw_channel_mask(2, RNG))
    assert torch.equal(drawn.features, given.features)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1.0), (0.1, 0.1)])
def test_feature_grad_mult_scales_the_extractor_only(factor, expected):
    waveforms, lengths = batch(900, 700)
    gradients = []
    for mult in (1.0, factor):
        model = encoder(feature_grad_mult=mult)
        out = model(waveforms, lengths)
        (out.features.square().sum() + 5 * out.feature_penalty).backward()
        gradients.append((model.feature_extractor.blocks[0].weight.grad, model.projection.weight.grad))
    torch.testing.assert_close(gradients[1][0], expected * gradients[0][0])
    torch.testing.assert_close(gradients[1][1], gradients[0][1])


def test_feature_grad_mult_zero_leaves_the_extractor_out():
    model = encoder(feature_grad_mult=0.0)
    model(*batch(900, 700)).features.sum().backward()
    assert all(p.grad is None for p in model.feature_extractor.parameters())
    assert model.feature_norm.weight.grad is not None


def test_gradient_checkpointing_changes_nothing():
    waveforms, lengths = batch(900, 700)
    gradients = []
    for flag in (False, True):
        model = encoder(gradient_checkpointing=flag)
        model(waveforms, lengths, rng=RNG).features.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        if grad is None:
            assert gradients[1][name] is None
        else:
            torch.testing.assert_close(gradients[1][name], grad)


def test_autocast_is_the_switch_of_precision():
    model = encoder()
    waveforms, lengths = batch(2000, 1500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(waveforms, lengths)
    assert out.features.dtype == torch.bfloat16 and out.extractor_features.dtype == torch.float32
    exact = model(waveforms, lengths)
    assert exact.features.dtype == torch.float32
    torch.testing.assert_close(out.features.float(), exact.features, rtol=0.1, atol=0.1)
    out.features.float().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_config_rebuilds_the_encoder():
    model = encoder(pre_norm=True, extractor_norm="layer", conv_bias=True, mask_prob=0.3)
    again = Wav2Vec2Encoder(**model.config)
    again.load_state_dict(model.state_dict())
    assert again.config == model.config and again.mask_prob == 0.3
    waveforms, lengths = batch(900, 700)
    assert torch.equal(again.eval()(waveforms, lengths).features, model.eval()(waveforms, lengths).features)


def test_features_of_the_transformers_width_need_no_projection():
    model = encoder(dim=16)
    assert model.projection is None and model(*batch(900)).features.shape[-1] == 16


@pytest.mark.parametrize("lengths", [[901, 700], [0, 900], [-1, 5]])
def test_wrong_lengths_are_refused(lengths):
    with pytest.raises(ModelError) as error:
        encoder()(torch.randn(2, 900), torch.tensor(lengths))
    assert str(error.value) == (
        f"lengths run from {min(lengths)} to {max(lengths)} samples, but the batch is padded to 900; lengths are "
        "absolute counts of samples, from 1 to the padded size."
    )


def test_negative_values_are_refused():
    with pytest.raises(ModelError, match="dropout_input is -1; expected a drop probability from 0 to below 1"):
        encoder(dropout_input=-1)
    with pytest.raises(ModelError) as error:
        encoder(feature_grad_mult=-1)
    assert str(error.value) == "feature_grad_mult is -1, expected 0 (frozen) or a positive factor."
