"""data2vec of speech and of text: targets, loss, timing of the teacher, padding, edge cases, settings."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from tests.unit.models.tiny import batch, encoder
from toolkit.errors import ModelError
from toolkit.models.data2vec import Data2VecAudio, Data2VecText
from toolkit.models.data2vec_targets import TargetRule, deviation, instance_norm
from toolkit.models.text_encoder import TextEncoder
from toolkit.nn.fast.common import set_fast
from toolkit.seeds import Randomness

RNG = Randomness(5).child("update", 3, 0)
SPEECH = {"extractor_norm": "layer", "pos_depth": 3, "pos_kernel": 9, "num_layers": 3, "min_masks": 1, "dropout": 0.0,
          "attention_dropout": 0.0, "dropout_input": 0.0, "layerdrop": 0.0, "mask_length": 3}  # fmt: skip
TEXT = {"vocab_size": 20, "dim": 16, "num_layers": 3, "ffn_dim": 24, "num_heads": 2, "max_positions": 12,
        "dropout": 0.0, "attention_dropout": 0.0}  # fmt: skip
MASK = 19
TOKENS = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 2], [0, 11, 12, 13, 2, 1, 1, 1], [0, 14, 2, 1, 1, 1, 1, 1]])
HIDDEN = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]).bool()


def stirred(model):
    """No parameter at its default, and a teacher that is not its student."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def audio(encoder_changes=None, **changes):
    return stirred(Data2VecAudio(encoder(**SPEECH | (encoder_changes or {})), **{"top_layers": 2} | changes))


def text(encoder_changes=None, **changes):
    torch.manual_seed(6)
    inner = TextEncoder(**TEXT | (encoder_changes or {}))
    return stirred(Data2VecText(inner, mask_id=MASK, **{"top_layers": 2} | changes))


def run_audio(model, rng=RNG, **options):
    """Two padded utterances with drawn masks."""
    return model(*batch(1500, 1100), rng=rng, **options)


def run_text(model, hidden=HIDDEN, **options):
    return model(TOKENS.masked_fill(hidden, MASK), TOKENS, **options)


RUNS = {"audio": (audio, run_audio), "text": (text, run_text)}
BOTH = pytest.mark.parametrize(("make", "run"), RUNS.values(), ids=RUNS)


def gradients(model, out):
    model.zero_grad(set_to_none=True)
    out.loss_sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# Padding


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("norms", [["instance"], ["layer"], ["instance", "layer"]])
def test_a_padded_utterance_gets_the_targets_that_it_gets_alone(norms, packed):
    model = audio(layer_norms=norms, target_norms=norms)
    for transformer in (model.encoder.transformer, model.teacher.module):
        transformer.short_frames = 0 if packed else 1000
    waveforms, lengths = batch(2400, 900, 1601)
    frames = model.encoder.frame_lengths(lengths).tolist()
    mask = torch.zeros(3, max(frames), dtype=torch.bool)
    for row, count in enumerate(frames):
        mask[row, 2:count] = True  # the last real frame too, next to the padding
    together = model(waveforms, lengths, rng=RNG, time_mask=mask)
    pieces, of_row = together.targets.split([int(m.sum()) for m in mask]), {}
    for row, count in enumerate(frames):
        alone = model(waveforms[row : row + 1, : lengths[row]], rng=RNG, time_mask=mask[row : row + 1, :count])
        of_row[row] = float((pieces[row] - alone.targets).abs().max())
    assert max(of_row.values()) < 1e-5, of_row
    assert together.num_positions == sum(frames)


def test_as_the_originals_it_looks_at_padding_too():
    """Else the switch would do nothing."""
    waveforms, lengths = batch(2400, 900)
    results = {}
    for over in (False, True):
        model = audio({"norm_over_padding": over})
        frames = model.encoder.frame_lengths(lengths).tolist()
        mask = torch.zeros(2, max(frames), dtype=torch.bool)
        mask[:, 3:8] = True
        results[over] = model(waveforms, lengths, rng=RNG, time_mask=mask).targets
        alone = model(waveforms[1:, :900], rng=RNG, time_mask=mask[1:, : frames[1]]).targets
        apart = float((results[over][5:] - alone).abs().max())
        assert apart > 0.01 if over else apart < 1e-5


def test_padding_of_text_counts_nowhere():
    """Whether norms go over positions or channels, and however far the batch is padded."""
    model = text(layer_norms=["instance", "layer"], target_norms=["instance"])
    together = run_text(model)
    pieces = together.targets.split([int(row.sum()) for row in HIDDEN])
    for row in range(3):
        count = int((TOKENS[row] != 1).sum())
        tokens, hidden = TOKENS[row : row + 1, :count], HIDDEN[row : row + 1, :count]
        alone = model(tokens.masked_fill(hidden, MASK), tokens)
        torch.testing.assert_close(pieces[row], alone.targets, rtol=0, atol=1e-5)


def test_instance_norm_is_torchs_and_leaves_padding_out():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 4) * 3 + 1
    expected = F.instance_norm(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(instance_norm(x, None), expected)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    torch.testing.assert_close(instance_norm(x, padding), expected)
    padding[1, 5:] = True
    x[1, 5:] = 1e6
    shorter = F.instance_norm(x[1:, :5].transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(instance_norm(x, padding)[1:, :5], shorter, rtol=0, atol=1e-5)


# Edge cases


@BOTH
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_nothing_masked_and_one_position(make, run, fast):
    model = set_fast(make(), fast)
    if run is run_audio:
        frames = int(model.encoder.frame_lengths(torch.tensor([1500])))
        none, one = torch.zeros(2, frames, dtype=torch.bool), torch.zeros(2, frames, dtype=torch.bool)
        one[1, 4] = True
        none, one = ({"time_mask": mask} for mask in (none, one))
    else:
        none, one = {"hidden": torch.zeros_like(HIDDEN)}, {"hidden": torch.zeros_like(HIDDEN)}
        one["hidden"][1, 2] = True
    out = run(model, **none)
    assert (out.num_masked, float(out.loss_sum.detach())) == (0, 0.0) and out.targets.shape == out.predictions.shape
    grads = gradients(model, out)
    assert all(bool(grad.isfinite().all()) and not grad.any() for grad in grads.values())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained - grads.keys() <= {"encoder.mask_embedding"}  # ranks that mask nothing reduce all the same
    # a batch without any counts for nothing in the mean of the deviations
    assert out.metrics()["target_var"] == (0.0, 0) and out.metrics()["masked_share"] == (0.0, out.num_positions)
    out = run(model, **one)
    assert out.num_masked == 1 and float(out.loss_sum.detach()) > 0
    grads = gradients(model, out)
    assert all(bool(grad.isfinite().all()) for grad in grads.values())
    assert any(grad.any() for name, grad in grads.items() if name.startswith("encoder.") and "fc1" in name)
    # one row has no deviation
    assert (float(out.target_deviation), float(out.prediction_deviation), out.metrics()["pred_var"][1]) == (0, 0, 0)


@BOTH
def test_the_fast_forms_are_the_plain_ones(make, run):
    fast, plain = make(), set_fast(make(), False)
    ours, theirs = run(fast), run(plain)
    near = {"rtol": 1e-4, "atol": 1e-5}
    assert_same({"targets": ours.targets, "predictions": ours.predictions},
                {"targets": theirs.targets, "predictions": theirs.predictions}, **near)  # fmt: skip
    assert_same(gradients(fast, ours), gradients(plain, theirs), rtol=1e-3, atol=1e-3)


@BOTH
def test_bfloat16_is_near_and_targets_stay_float32(make, run):
    model = make()
    expected = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model)
    tensors = (out.targets, out.predictions, out.loss_sum, *model.teacher.parameters())
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert not torch.equal(out.targets, expected.targets)  # else nothing was in bfloat16
    for ours, theirs in ((out.targets, expected.targets), (out.predictions.detach(), expected.predictions.detach())):
        assert float((ours - theirs).abs().max()) < 5e-2 * float(theirs.abs().max())
    assert float(out.loss_sum.detach()) == pytest.approx(float(expected.loss_sum.detach()), rel=2e-2)
    grads, wanted = gradients(model, out), gradients(model, expected)
    for name in wanted:
        # a bias on the keys has no gradient but rounding
        near = 0.2 * float(wanted[name].abs().max()) + 1e-3
        assert float((grads[name] - wanted[name]).abs().max()) < near, name


@BOTH
def test_layerdrop_and_dropout_leave_the_teacher_alone(make, run):
    quiet = run(make(), rng=RNG)
    drops = {"layerdrop": 0.5, "dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3}
    mask = {}
    if run is run_audio:  # the same mask whatever the randomness
        model = make()
        mask["time_mask"] = model.encoder.draw_mask_for(*batch(1500, 1100), RNG)
    seen = set()
    for micro in range(6):
        out = run(make(drops), rng=Randomness(5).child("update", 3, micro), **mask)
        torch.testing.assert_close(out.targets, quiet.targets, rtol=0, atol=1e-6)
        assert not torch.allclose(out.predictions, quiet.predictions, atol=1e-3)
        seen.add(float(out.loss_sum.detach()))
    assert len(seen) == 6
    model = make(drops).eval()
    torch.testing.assert_close(run(model, rng=RNG).predictions, quiet.predictions, rtol=1e-4, atol=1e-5)


@BOTH
def test_all_layers_dropped_is_finite(make, run):
    model = make({"layerdrop": 0.999})
    grads = gradients(model, run(model, rng=RNG))
    assert all(bool(grad.isfinite().all()) for grad in grads.values())
    assert not any("layers." in name for name in grads)


@BOTH
def test_gradient_checkpointing_gives_the_same_gradients(make, run):
    drops = {"layerdrop": 0.3, "dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2}
    one, other = make(drops), make(drops | {"gradient_checkpointing": True})
    first, second = run(one, rng=RNG), run(other, rng=RNG)
    assert torch.equal(first.targets, second.targets)
    assert_same(gradients(one, first), gradients(other, second), rtol=0, atol=0)


# The teacher


@BOTH
def test_the_teacher_gets_no_gradient_and_is_in_the_state(make, run):
    model = make()
    grads = gradients(model, run(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in grads if name.startswith("teacher.")} == set() and grads.keys() == trained
    state = model.state_dict()
    again = make()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(state)
    assert torch.equal(run(again).targets, run(model).targets)


def teacher_of(model):
    return copy.deepcopy(model.teacher.module.state_dict())


@BOTH
def test_when_the_teacher_moves(make, run):
    """By step once an update, by fairseq at each forward pass in training but the first update's."""
    ramp = {"ema_decay": (0.5, 0.9, 4)}
    model = make(ema_timing="step", **ramp)
    before = teacher_of(model)
    for update in (0, 1):
        run(model, update=update, rng=RNG)
    assert_same(teacher_of(model), before, rtol=0, atol=0)
    student = copy.deepcopy(model)
    model.finish_update(1)
    assert run(model, update=1, rng=RNG).decay == pytest.approx(0.6)
    moved = teacher_of(model)
    model = make(ema_timing="fairseq", **ramp)
    run(model, update=0, rng=RNG)
    model.finish_update(1)
    model.eval()
    run(model, update=1, rng=RNG)
    assert_same(teacher_of(model), before, rtol=0, atol=0)
    model.train()
    run(model, update=1, rng=RNG)
    assert_same(teacher_of(model), moved, rtol=0, atol=0)
    run(model, update=1, rng=RNG)  # a second micro-batch of the same update
    twice = teacher_of(model)
    student.finish_update(1)
    student.finish_update(1)
    assert_same(twice, teacher_of(student), rtol=0, atol=0)
    assert any(not torch.equal(twice[name], moved[name]) for name in moved)


@BOTH
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_an_update_that_is_given_up_leaves_the_teacher_as_it_was(make, run, micro_batches):
    """However often it moved in it; a finished one stays."""
    model = make(ema_timing="fairseq", ema_decay=(0.5, 0.9, 4))
    run(model, update=1, rng=RNG)
    model.finish_update(2)
    finished = teacher_of(model)
    model.give_up_update()
    assert_same(teacher_of(model), finished, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1.1)
    for _ in range(micro_batches):
        run(model, update=2, rng=RNG)
    assert not torch.equal(teacher_of(model)["layers.0.fc1.weight"], finished["layers.0.fc1.weight"])
    model.give_up_update()
    assert_same(teacher_of(model), finished, rtol=0, atol=0)


@BOTH
def test_the_closed_form_of_the_moves(make, run):
    """teacher = decay * teacher + (1 - decay) * student but for what is copied, and with layers_only off nothing is."""
    for layers_only in (True, False):
        model = make(ema_layers_only=layers_only, ema_decay=(0.5, 0.9, 4))
        before = teacher_of(model)
        student = dict((model.encoder.transformer if run is run_audio else model.encoder).named_parameters())
        model.finish_update(2)
        copied = {name for name, value in teacher_of(model).items() if torch.equal(value, student[name])}
        expected = ("positional.",) if run is run_audio else ("token_embedding", "position_embedding", "embedding_norm")
        assert copied == ({name for name in before if name.startswith(expected)} if layers_only else set())
        for name, value in teacher_of(model).items():
            if name not in copied:
                wanted = 0.7 * before[name] + 0.3 * student[name].detach()
                torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)


# What is predicted


def test_targets_in_the_originals_order():
    """Norms of each layer, the mean of the last ones, norms of the mean; and the masked positions, row by row."""
    model = audio(layer_norms=["instance", "layer"], target_norms=["layer", "instance"])
    waveforms, _ = batch(1500, 1500)
    out = model(waveforms, rng=RNG)
    encoded = model.encoder(waveforms, rng=RNG, time_mask=model.encoder.draw_mask_for(waveforms, None, RNG))
    with torch.no_grad():
        projected = model.encoder.project(encoded.extractor_features, torch.float32)
        _, layers = model.teacher.module(projected, layers=True)

    def over_time(x):
        return F.instance_norm(x.transpose(1, 2)).transpose(1, 2)

    def over_channels(x):
        return F.layer_norm(x, x.shape[-1:])

    mean = sum(over_channels(over_time(ffn)) for _, ffn in layers[-2:]) / 2
    expected = over_time(over_channels(mean)).flatten(0, 1)[encoded.masked.positions]
    torch.testing.assert_close(out.targets, expected, rtol=0, atol=1e-5)
    assert out.num_masked == len(expected) == encoded.masked.total


@pytest.mark.parametrize("beta", [0.0, 0.25, 4.0])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_the_loss_by_hand(beta, scale):
    torch.manual_seed(1)
    predictions, targets = torch.randn(7, 4), torch.randn(7, 4)
    rule = TargetRule.checked(2, top_layers=1, layer_norms=[], target_norms=[], loss_beta=beta, loss_scale=scale)
    d = (predictions - targets).abs()
    each = d**2 if beta == 0 else torch.where(d < beta, 0.5 * d**2 / beta, d - 0.5 * beta)
    expected = float(each.sum()) * (0.25 if scale else 0.5)  # 1 / sqrt(4)
    assert float(rule.loss(predictions, targets)) == pytest.approx(expected, rel=1e-6)


def test_the_deviation_is_near_nothing_when_all_rows_are_the_same():
    rows = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]])
    assert float(deviation(rows)) == pytest.approx((2 + math.sqrt(1e-6)) / 2, rel=1e-6)


def test_what_is_logged():
    out = run_audio(audio(), update=7)
    metrics = out.metrics()
    assert metrics.keys() == {"target_var", "pred_var", "ema_decay", "masked_share"}
    assert float(metrics["target_var"][0]) == pytest.approx(float(deviation(out.targets)))
    assert metrics["target_var"][1] == 1 and metrics["masked_share"] == (float(out.num_masked), out.num_positions)
    assert metrics["ema_decay"] == (pytest.approx(0.999 + 0.0009 * 7 / 30000), 1)
    assert not out.target_deviation.requires_grad and not out.prediction_deviation.requires_grad


def test_text_replaced_and_kept_tokens_are_shown_but_not_predicted():
    """fairseq's teacher sees every chosen token; predicted are the hidden ones."""
    model = text(teacher_input="fairseq")
    chosen, hidden = HIDDEN.clone(), HIDDEN.clone()
    hidden[0, 2] = False  # chosen, and another token stands there
    source = TOKENS.masked_fill(hidden, MASK)
    source[0, 2] = 15
    shown = []
    model.teacher.register_forward_hook(lambda _, inputs, __: shown.append(inputs[0]))
    out = model(source, TOKENS, chosen=chosen)
    assert out.num_masked == int(hidden.sum()) == int(chosen.sum()) - 1
    assert torch.equal(shown[0], TOKENS.masked_fill(~chosen, 1))
    model(source, TOKENS)
    assert torch.equal(shown[1], TOKENS.masked_fill(~hidden, 1))
    model.teacher_input = "paper"
    model(source, TOKENS, chosen=chosen)
    assert torch.equal(shown[2], TOKENS)


def test_the_same_randomness_masks_alike_and_none_is_an_error():
    model = audio()
    one, two = run_audio(model), run_audio(model)
    assert torch.equal(one.predictions, two.predictions)
    assert run_audio(model, rng=Randomness(6)).num_masked != 0
    with pytest.raises(ModelError) as caught:
        model(*batch(1500))
    assert str(caught.value) == "data2vec needs masks in evaluation too: give rng or time_mask."


# Settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_layers": 4}, "top_layers is 4, but the encoder has 3 layers; take fewer."),
        ({"top_layers": 0}, "top_layers is 0, expected a whole number, 1 or more."),
        ({"layer_norms": "layer"}, "layer_norms is 'layer', expected a list of some of instance, layer."),
        ({"target_norms": ["batch"]}, "target_norms is ['batch'], expected a list of some of instance, layer."),
        ({"loss_beta": -1}, "loss_beta is -1, expected 0 (squared error) or a positive number."),
        ({"loss_beta": math.nan}, "loss_beta is nan, expected 0 (squared error) or a positive number."),
        ({"loss_scale": 0}, "loss_scale is 0, expected null (1 / sqrt of the width) or a positive number."),
        ({"ema_timing": "epoch"}, "ema_timing is 'epoch', expected one of step, fairseq."),
        (
            {"ema_decay": (0.9, 0.8, 5)},
            "ema_decay is (0.9, 0.8, 5), expected (start, end, steps) with 0 <= start <= end <= 1, as (0.999, 0.9999, "
            "30000).",
        ),
    ],
)
@pytest.mark.parametrize("make", [audio, text])
def test_settings_that_make_no_sense(make, changes, words):
    with pytest.raises(ModelError) as caught:
        make(**changes)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher_input": "all"}, "teacher_input is 'all', expected one of paper, fairseq."),
        ({"mask_id": 20}, "mask_id is 20, expected one of the 20 token ids, and not the padding's."),
        ({"mask_id": 1}, "mask_id is 1, expected one of the 20 token ids, and not the padding's."),
        ({"head_layers": 3}, "head_layers is 3, expected 1 or 2."),
    ],
)
def test_settings_of_text_that_make_no_sense(changes, words):
    with pytest.raises(ModelError) as caught:
        Data2VecText(TextEncoder(**TEXT), **{"mask_id": MASK, "top_layers": 2} | changes)
    assert str(caught.value) == words


@BOTH
def test_the_settings_make_the_model_again(make, run):
    model = make()
    settings = dict(model.config)
    inner = settings.pop("encoder")
    again = type(model)(type(model.encoder)(**inner), **settings)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again.train()).targets, run(model).targets)
