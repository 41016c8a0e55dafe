"""The CTC model beyond the recorded case, and its loss against the sum over all alignments."""

import itertools

import pytest
import torch

from tests.unit.models.tiny import batch, encoder
from toolkit.errors import ModelError
from toolkit.models.ctc import CTCModel, ctc_loss
from toolkit.seeds import Randomness

RNG = Randomness(1).child("update", 4, 0)


def model(**changes):
    return CTCModel(encoder(), 5, **changes)


def brute_force(log_probs, tokens):
    """-log of the summed probability of every alignment that spells the tokens."""
    total = 0.0
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        merged = [t for place, t in enumerate(path) if place == 0 or t != path[place - 1]]
        if [t for t in merged if t] == tokens:
            total += float(torch.exp(sum(log_probs[place, t] for place, t in enumerate(path))))
    return -torch.log(torch.tensor(total))


def test_loss_is_that_of_all_alignments():
    log_probs = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    tokens = torch.tensor([[1, 2, 0], [2, 2, 1], [9, 9, 9]])  # padding may hold anything
    lengths, token_lengths = torch.tensor([5, 5, 3]), torch.tensor([2, 3, 0])
    loss, count = ctc_loss(log_probs, lengths, tokens, token_lengths)
    expected = (
        brute_force(log_probs[0], [1, 2]) + brute_force(log_probs[1], [2, 2, 1]) + brute_force(log_probs[2, :3], [])
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-5) and count == 3


@pytest.mark.parametrize("on_host", [None, True, False])
def test_the_host_computes_in_float32_and_the_gradient_comes_back(on_host):
    log_probs = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2)).double().log_softmax(-1)
    tokens, lengths, token_lengths = torch.tensor([[1, 3], [2, 0]]), torch.tensor([6, 5]), torch.tensor([2, 1])
    log_probs.requires_grad_()
    loss, _ = ctc_loss(log_probs, lengths, tokens, token_lengths, on_host=on_host)
    assert loss.dtype == (torch.float32 if on_host else torch.float64)
    (grad,) = torch.autograd.grad(loss, log_probs)
    expected = ctc_loss(log_probs.detach().float().requires_grad_(), lengths, tokens, token_lengths)[0]
    assert grad.dtype == torch.float64 and grad.any()
    torch.testing.assert_close(loss.float(), expected, rtol=1e-6, atol=0)


def test_frames_of_padding_do_not_count():
    log_probs = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    tokens, token_lengths = torch.tensor([[1, 3]]), torch.tensor([2])
    short = ctc_loss(log_probs[:, :4], torch.tensor([4]), tokens, token_lengths)[0]
    assert torch.isclose(ctc_loss(log_probs, torch.tensor([4]), tokens, token_lengths)[0], short)


def test_impossible_utterances_cost_nothing():
    log_probs = torch.randn(3, 4, 3).log_softmax(-1).requires_grad_()
    tokens = torch.tensor([[1, 2, 1, 2, 1], [1, 1, 1, 0, 0], [1, 1, 2, 0, 0]])
    token_lengths, lengths = torch.tensor([5, 3, 3]), torch.tensor([4, 4, 4])
    loss, count = ctc_loss(log_probs, lengths, tokens, token_lengths)
    (grad,) = torch.autograd.grad(loss, log_probs)
    assert count == 3 and loss.isfinite() and not grad[:2].any() and grad[2].any()


def test_masks_and_dropout_in_training_only():
    ctc = model(final_dropout=0.5)
    waveforms, lengths = batch(4000, 3000)
    quiet = ctc(waveforms, lengths).log_probs
    drawn = ctc(waveforms, lengths, rng=RNG)
    assert drawn.encoded.masked is not None and not torch.equal(drawn.log_probs, quiet)
    assert torch.equal(ctc(waveforms, lengths, rng=RNG).log_probs, drawn.log_probs)
    ctc.eval()
    assert torch.equal(ctc(waveforms, lengths, rng=RNG).log_probs, quiet)


def test_final_dropout_is_used():
    waveforms, lengths = batch(4000, 3000)
    dropped, kept = (model(final_dropout=p)(waveforms, lengths, rng=RNG).log_probs for p in (0.5, 0.0))
    assert not torch.equal(dropped, kept)


def test_freezing_ends():
    ctc = model(freeze_updates=10)
    for update, trained in ((9, False), (10, True), (None, True)):
        ctc.zero_grad()
        ctc(*batch(900, 800), rng=RNG, update=update).log_probs.square().sum().backward()
        assert (ctc.encoder.mask_embedding.grad is not None) == trained
        assert ctc.head.weight.grad is not None


def test_head_starts_as_xavier_with_zero_bias():
    head = CTCModel(encoder(), 1000).head
    limit = (6 / (24 + 1000)) ** 0.5
    assert not head.bias.any() and 0.98 * limit < float(head.weight.detach().abs().max()) <= limit


def test_bfloat16_gives_float32_log_probs():
    waveforms, lengths = batch(2000, 1000)
    ctc = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ctc(waveforms, lengths)
    assert out.log_probs.dtype == torch.float32 and out.encoded.features.dtype == torch.bfloat16
    torch.testing.assert_close(out.log_probs.exp().sum(-1), torch.ones(out.log_probs.shape[:2]))


def test_refusals():
    with pytest.raises(ModelError, match="final_dropout is -1; expected a drop probability from 0 to below 1"):
        CTCModel(encoder(), 5, final_dropout=-1)
    with pytest.raises(ModelError) as error:
        CTCModel(encoder(), 1)
    assert str(error.value) == (
        "vocab_size is 1 and freeze_updates 0; expected at least 2 tokens (one is the blank) and 0 or more updates."
    )
