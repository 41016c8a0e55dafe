"""CTC models recorded from the original implementation: evaluation, the frozen phase, and training."""

import pytest
import torch

from tests.unit.models.originals import assert_gradients, original, recorded
from toolkit.decoding.ctc import greedy_decode
from toolkit.models.ctc import ctc_loss
from toolkit.nn.fast.common import set_fast

CASES = {"w2v2_ctc_from_groupnorm": 613.6353759765625, "w2v2_ctc_from_data2vec": 289.9375305175781}
"""With the loss in training, which the recording holds under the frozen phase: only gradients differ."""


class Case:
    """A recorded case, and our model filled from its checkpoint."""

    def __init__(self, name, fast):
        self.meta, self.tensors = recorded(name)
        self.scalars, self.training_loss = self.meta["scalars"], CASES[name]
        self.model = set_fast(original(name), fast)
        self.lengths = (~self.tensors["in.padding_mask"]).sum(1)
        self.real = ~self.tensors["eval.padding_mask"]
        self.masks = {"time_mask": self.tensors["rand.time_mask"], "channel_mask": self.tensors["rand.channel_mask"]}

    def run(self, **options):
        out = self.model(self.tensors["in.source"], self.lengths, **options)
        tokens, token_lengths = self.tensors["in.target"], self.tensors["in.target_lengths"]
        return out, *ctc_loss(out.log_probs, out.frame_lengths, tokens, token_lengths)

    def close(self, ours, name, limit):
        theirs = self.tensors[name].transpose(0, 1)
        torch.testing.assert_close(ours[self.real], theirs[self.real], rtol=0, atol=limit)


@pytest.fixture(params=[(name, fast) for name in CASES for fast in (True, False)], ids=lambda p: f"{p[0]}-fast={p[1]}")
def case(request):
    return Case(*request.param)


def test_settings(case):
    """The masks and the frozen phase of the fine-tuning, not those of the pretraining."""
    config, theirs = case.model.config, case.meta["ctc_model_config"]
    assert config["vocab_size"] == len(case.meta["symbols"])
    assert config["freeze_updates"] == theirs["freeze_finetune_updates"] == 10000
    for name in ("mask_prob", "mask_length", "mask_channel_prob", "mask_channel_length", "feature_grad_mult"):
        assert config["encoder"][name] == theirs[name]


def test_evaluation(case):
    case.model.eval()
    with torch.no_grad():
        out, loss, count = case.run()
        layers = case.model.encoder(case.tensors["in.source"], case.lengths, layers=True).layers
    assert out.frame_lengths.tolist() == case.real.sum(1).tolist()
    for i, (layer, _) in enumerate(layers):
        case.close(layer, f"eval.layer{i}", 1e-4)
    real = case.real
    torch.testing.assert_close(out.encoded.features[real], case.tensors["eval.w2v_out"][real], rtol=0, atol=1e-4)
    case.close(out.log_probs, "eval.log_probs", 2e-4)
    assert float(loss) == pytest.approx(case.scalars["eval"]["loss_sum"], rel=1e-5)
    assert count == case.scalars["eval"]["sample_size"]
    for row, tokens in enumerate(greedy_decode(out.log_probs, out.frame_lengths)):
        best = case.tensors["eval.greedy"][row][real[row]]
        assert tokens == [int(t) for t in torch.unique_consecutive(best) if t]


def test_training(case):
    out, loss, _ = case.run(update=case.model.freeze_updates, **case.masks)
    loss.backward()
    real, theirs = case.real, case.tensors["train.masked_features"]
    torch.testing.assert_close(out.encoded.projected[real], theirs[real], rtol=0, atol=1e-4)
    case.close(out.log_probs, "train.log_probs", 2e-4)
    assert float(loss.detach()) == pytest.approx(case.training_loss, rel=1e-5)
    assert_gradients("ctc", case.model, case.tensors)
    trained = {name for name, p in case.model.named_parameters() if p.grad is not None and p.grad.any()}
    untrained = {name for name, _ in case.model.named_parameters()} - trained
    # feature_grad_mult is 0: the convolutions stay as they are
    assert untrained == {name for name in untrained if name.startswith("encoder.feature_extractor.")} and untrained


def test_frozen_phase(case):
    _, loss, _ = case.run(update=case.model.freeze_updates - 1, **case.masks)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(case.scalars["train_frozen"]["loss_sum"], rel=1e-5)
    assert {name for name, p in case.model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    assert_gradients("ctc", case.model, case.tensors, prefix="grad_frozen.")
