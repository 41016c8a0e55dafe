"""A CTC model recorded from the original implementation: evaluation, the frozen phase, and training."""

import pytest
import torch

from tests.unit.models.originals import assert_gradients, encoder_of, fill, recorded
from toolkit.decoding.ctc import greedy_decode
from toolkit.models.ctc import CTCModel, ctc_loss
from toolkit.nn.fast.common import set_fast

META, TENSORS, WEIGHTS = recorded("w2v2_ctc_from_groupnorm")
SCALARS = META["scalars"]
FREEZE = META["ctc_model_config"]["freeze_finetune_updates"]


@pytest.fixture(params=[True, False], ids=["fast", "plain"])
def model(request):
    encoder = encoder_of(META["w2v_model_config"])
    return set_fast(fill(CTCModel(encoder, len(META["symbols"]), freeze_updates=FREEZE), WEIGHTS), request.param)


def run(model, **options):
    lengths = (~TENSORS["in.padding_mask"]).sum(1)
    out = model(TENSORS["in.source"], lengths, **options)
    tokens, token_lengths = TENSORS["in.target"], TENSORS["in.target_lengths"]
    return out, *ctc_loss(out.log_probs, out.frame_lengths, tokens, token_lengths)


def close(ours, name, limit):
    real = ~TENSORS["eval.padding_mask"]
    torch.testing.assert_close(ours[real], TENSORS[name].transpose(0, 1)[real], rtol=0, atol=limit)


def test_evaluation(model):
    with torch.no_grad():
        out, loss, count = run(model.eval())
        layers = model.encoder(TENSORS["in.source"], (~TENSORS["in.padding_mask"]).sum(1), layers=True).layers
    real = ~TENSORS["eval.padding_mask"]
    assert out.frame_lengths.tolist() == real.sum(1).tolist()
    for i, (layer, _) in enumerate(layers):
        close(layer, f"eval.layer{i}", 1e-4)
    torch.testing.assert_close(out.encoded.features[real], TENSORS["eval.w2v_out"][real], rtol=0, atol=1e-4)
    close(out.log_probs, "eval.log_probs", 2e-4)
    assert float(loss) == pytest.approx(SCALARS["eval"]["loss_sum"], rel=1e-5)
    assert count == SCALARS["eval"]["sample_size"]
    for row, tokens in enumerate(greedy_decode(out.log_probs, out.frame_lengths)):
        best = TENSORS["eval.greedy"][row][real[row]]
        assert tokens == [int(t) for t in torch.unique_consecutive(best) if t]


def test_training(model):
    masks = {"time_mask": TENSORS["rand.time_mask"], "channel_mask": TENSORS["rand.channel_mask"]}
    out, loss, _ = run(model, update=FREEZE, **masks)
    loss.backward()
    real = ~TENSORS["eval.padding_mask"]
    torch.testing.assert_close(out.encoded.projected[real], TENSORS["train.masked_features"][real], rtol=0, atol=1e-4)
    close(out.log_probs, "train.log_probs", 2e-4)
    assert float(loss.detach()) == pytest.approx(613.6353759765625, rel=1e-5)
    assert_gradients(model, TENSORS)
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    untrained = {name for name, _ in model.named_parameters()} - trained
    # feature_grad_mult is 0: the convolutions stay as they are
    assert untrained == {name for name in untrained if name.startswith("encoder.feature_extractor.")} and untrained


def test_frozen_phase(model):
    masks = {"time_mask": TENSORS["rand.time_mask"], "channel_mask": TENSORS["rand.channel_mask"]}
    _, loss, _ = run(model, update=FREEZE - 1, **masks)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(SCALARS["train_frozen"]["loss_sum"], rel=1e-5)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    assert_gradients(model, TENSORS, prefix="grad_frozen.")
