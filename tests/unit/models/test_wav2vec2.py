"""The pretraining task beyond the recorded cases: sizes, ragged counts, randomness, empty batches."""

import math

import numpy as np
import pytest
import torch

from tests.unit.models.tiny import batch, pretraining
from toolkit.errors import ModelError
from toolkit.models.wav2vec2 import Wav2Vec2Encoder, Wav2Vec2Pretraining
from toolkit.nn.contrastive import sample_cross_negatives, sample_negatives
from toolkit.nn.fast.common import set_fast
from toolkit.nn.masking import MaskedFrames
from toolkit.seeds import Randomness

RNG = Randomness(1).child("update", 4, 0)


def test_base_has_the_size_of_the_originals():
    with torch.device("meta"):
        model = Wav2Vec2Pretraining(Wav2Vec2Encoder())
    assert sum(p.numel() for p in model.parameters()) == 95_044_608
    assert sum(p.numel() for p in model.encoder.parameters()) == 94_371_712


def test_large_has_the_size_of_the_originals():
    with torch.device("meta"):
        encoder = Wav2Vec2Encoder(
            extractor_norm="layer", conv_bias=True, dim=1024, num_layers=24, ffn_dim=4096, num_heads=16, pre_norm=True
        )
        model = Wav2Vec2Pretraining(encoder, final_dim=768)
    assert sum(p.numel() for p in model.parameters()) == 317_390_592
    assert sum(p.numel() for p in encoder.parameters()) == 315_438_720


def test_ragged_counts_equal_the_utterances_one_by_one():
    """A padded batch with unequal masked counts: the contrastive sum is that of its utterances alone."""
    model = pretraining({"equal_mask_counts": False, "extractor_norm": "layer"})
    waveforms, lengths = batch(4000, 2500, 1203)
    together = model.eval()(waveforms, lengths, rng=RNG)
    counts = together.encoded.masked.counts
    assert len(set(counts)) == 3
    negatives = sample_negatives(counts, 10, RNG)
    start = total = 0
    for row, length in enumerate(lengths.tolist()):
        frames = int(together.encoded.frame_lengths[row])
        alone = model(
            waveforms[row : row + 1, :length],
            time_mask=together.encoded.masked.mask[row : row + 1, :frames],
            negatives=negatives[start : start + counts[row]],
        )
        torch.testing.assert_close(alone.logits, together.logits[start : start + counts[row]], rtol=0, atol=1e-4)
        start, total = start + counts[row], total + float(alone.contrastive)
    assert float(together.contrastive) == pytest.approx(total, rel=1e-5)


def test_fast_and_plain_forms_agree_with_all_randomness_on():
    results = []
    for fast in (True, False):
        model = set_fast(pretraining({"equal_mask_counts": False}), fast)
        out = model(*batch(4000, 2500), rng=RNG, update=3)
        out.loss_sum.backward()
        results.append((out.loss_sum.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    for name, grad in results[0][1].items():
        if grad is not None:
            torch.testing.assert_close(results[1][1][name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("own", [10, 0])
def test_negatives_of_the_whole_batch(own):
    """Their logits stand behind the others, in both forms, and with rows that fill up to a fixed number."""
    changes = {"num_negatives": own, "cross_sample_negatives": 4}
    model = pretraining({"equal_mask_counts": False}, **changes).eval()
    waveforms, lengths = batch(4000, 2500)
    out = model(waveforms, lengths, rng=RNG)
    assert out.logits.shape == (out.num_masked, 1 + own + 4)
    if own:
        without = pretraining({"equal_mask_counts": False}, num_negatives=own)
        without.load_state_dict(model.state_dict())
        fewer = without.eval()(waveforms, lengths, rng=RNG)
        torch.testing.assert_close(out.logits[:, : 1 + own], fewer.logits)
    set_fast(model, False)
    torch.testing.assert_close(model(waveforms, lengths, rng=RNG).logits, out.logits, rtol=0, atol=1e-4)
    masked = out.encoded.masked
    filled = MaskedFrames.of(masked.mask, "cpu", capacity=max(masked.counts) + 3)
    drawn = sample_cross_negatives(masked.counts, 4, RNG)
    rows = filled.spread_rows(drawn)
    assert torch.equal(filled.positions[rows][filled.slots], masked.positions[torch.from_numpy(drawn)])
    with pytest.raises(ModelError, match="needs masks and negatives in evaluation too"):
        model(waveforms, lengths, time_mask=masked.mask, negatives=sample_negatives(masked.counts, own, RNG))


def test_randomness_is_a_function_of_the_place():
    model = pretraining()
    waveforms, lengths = batch(4000, 4000)
    outs = []
    for seed, rng in ((1, RNG), (2, RNG), (3, Randomness(1).child("update", 5, 0))):
        torch.manual_seed(seed)
        np.random.seed(seed)
        outs.append(model(waveforms, lengths, rng=rng).loss_sum)
    assert outs[0] == outs[1] != outs[2]


def test_the_temperature_follows_the_update():
    model = pretraining()
    assert model(*batch(4000), rng=RNG, update=0).temperature == 2.0
    assert model(*batch(4000), rng=RNG, update=10**6).temperature == 0.5


def test_evaluation_masks_but_does_not_drop():
    model = pretraining().eval()
    first, second = model(*batch(4000), rng=RNG), model(*batch(4000), rng=RNG, update=10**6)
    assert first.num_masked > 20 and torch.equal(first.loss_sum, second.loss_sum)
    # The most probable codes, whatever the temperature
    assert torch.equal(first.codes, second.codes)


def test_terms_of_weight_zero_are_left_out():
    out = pretraining(diversity_weight=0.0, penalty_weight=0.0)(*batch(4000), rng=RNG)
    assert torch.equal(out.loss_sum.detach(), out.contrastive) and float(out.diversity) == float(out.penalty) == 0.0
    full = pretraining(diversity_weight=0.1, penalty_weight=10.0)(*batch(4000), rng=RNG)
    expected = full.contrastive + full.diversity + full.penalty
    torch.testing.assert_close(full.loss_sum.detach(), expected)
    share = (12 - float(full.prob_perplexity.sum())) / 12
    assert float(full.diversity) == pytest.approx(0.1 * full.num_masked * share, rel=1e-5)
    assert float(full.penalty) == pytest.approx(
        10 * full.num_masked * float(full.encoded.feature_penalty.detach()), rel=1e-5
    )


def test_features_are_dropped_before_the_quantizer():
    model = pretraining({"dropout_input": 0.0}, dropout_features=0.5)
    seen = []
    model.quantizer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    out = model(*batch(4000), rng=RNG)
    kept = seen[0] != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    targets = out.encoded.extractor_features.flatten(0, 1)[out.encoded.masked.positions]
    torch.testing.assert_close(seen[0][kept], 2 * targets[kept])


def test_one_short_utterance_does_not_spoil_the_batch():
    out = pretraining()(*batch(4000, 50), rng=RNG)
    assert out.encoded.masked.counts[0] > 20 and out.encoded.masked.counts[1] == 0
    assert out.loss_sum.isfinite()


def test_a_batch_without_masks_costs_zero_and_can_go_backward():
    model = pretraining()
    out = model(*batch(50, 40), rng=RNG)
    out.loss_sum.backward()
    assert float(out.loss_sum.detach()) == 0.0 and out.num_masked == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert all(float(total) == 0 == count for name, (total, count) in out.metrics().items() if name != "masked_share")


def test_metrics_are_sums_and_counts():
    out = pretraining()(*batch(4000, 3000), rng=RNG)
    metrics = {name: float(total) / count for name, (total, count) in out.metrics().items()}
    assert metrics["contrastive"] == pytest.approx(float(out.contrastive) / out.num_masked)
    assert 1 < metrics["contrastive"] < 3 * math.log(11)
    assert metrics["accuracy"] == int(out.correct) / out.num_masked
    groups = [metrics["code_perplexity_group0"], metrics["code_perplexity_group1"]]
    assert metrics["code_perplexity"] == pytest.approx(sum(groups)) and 1 <= min(groups) <= max(groups) <= 6
    assert 0.1 < metrics["masked_share"] < 0.6
    assert not any(t.requires_grad for t, _ in out.metrics().values() if isinstance(t, torch.Tensor))


def test_bfloat16_keeps_the_objective_in_float32():
    model = pretraining()
    waveforms, lengths = batch(4000, 3000)
    exact = model.eval()(waveforms, lengths, rng=RNG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(waveforms, lengths, rng=RNG)
    assert out.logits.dtype == out.loss_sum.dtype == torch.float32
    assert out.encoded.features.dtype == torch.bfloat16
    assert float(out.loss_sum.detach()) == pytest.approx(float(exact.loss_sum.detach()), rel=0.05)


def test_refusals():
    with pytest.raises(ModelError, match="dropout_features is 1; expected a drop probability from 0 to below 1"):
        pretraining(dropout_features=1)
    with pytest.raises(ModelError) as error:
        pretraining()(*batch(900))
    assert str(error.value) == (
        "pretraining needs masks and negatives in evaluation too: give rng, or time_mask and negatives."
    )
    with pytest.raises(ModelError) as error:
        pretraining(num_negatives=0)
    assert str(error.value) == (
        "num_negatives is 0 and logit_temperature 0.1; the first must be at least 1 and the second above 0, "
        "as 100 and 0.1."
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_codes": 0}, "num_codes is 0, expected a whole number, 1 or more."),
        ({"num_groups": 0}, "num_groups is 0, expected a whole number, 1 or more."),
        ({"num_groups": 2.0}, "num_groups is 2.0, expected a whole number, 1 or more."),
        ({"final_dim": 0}, "final_dim is 0, expected a whole number, 1 or more."),
        ({"code_dim": 2.5}, "code_dim is 2.5, expected a whole number, 1 or more."),
        ({"num_negatives": 2.5}, "num_negatives is 2.5, expected a whole number, 0 or more."),
        ({"penalty_weight": -1}, "penalty_weight is -1, expected 0 (the term is left out) or a positive number."),
        (
            {"diversity_weight": math.nan},
            "diversity_weight is nan, expected 0 (the term is left out) or a positive number.",
        ),
        (
            {"temperature": [1]},
            "temperature is [1], expected (start > 0, end > 0, decay in 0..1), as (2.0, 0.5, 0.999995).",
        ),
        ({"encoder_changes": {"pos_groups": 0}}, "pos_groups is 0, expected a whole number, 1 or more."),
        ({"encoder_changes": {"num_heads": 0}}, "num_heads is 0, expected a whole number, 1 or more."),
        ({"encoder_changes": {"num_layers": -1}}, "num_layers is -1, expected a whole number, 0 or more."),
        ({"encoder_changes": {"min_masks": 0.5}}, "min_masks is 0.5, expected a whole number, 0 or more."),
        (
            {"encoder_changes": {"feature_grad_mult": math.nan}},
            "feature_grad_mult is nan, expected 0 (frozen) or a positive factor.",
        ),
        (
            {"encoder_changes": {"conv_layers": [1]}},
            "conv_layers is [1]; expected at least one (channels, kernel, stride), all positive.",
        ),
        (
            {"encoder_changes": {"conv_layers": [["a", 1, 1]]}},
            "conv_layers is [['a', 1, 1]]; expected at least one (channels, kernel, stride), all positive.",
        ),
    ],
)
def test_settings_that_make_no_model(settings, sentence):
    with pytest.raises(ModelError) as error:
        pretraining(**settings)
    assert str(error.value) == sentence
