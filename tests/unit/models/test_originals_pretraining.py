"""Pretraining steps recorded from the original implementation, tensor by tensor in the order of the forward pass."""

import math

import pytest
import torch

from tests.unit.models.originals import assert_gradients, by_original_names, original, recorded
from toolkit.nn.fast.common import set_fast
from toolkit.nn.feature_extractor import FeatureExtractor

CASES = ("w2v2_pretrain_groupnorm", "w2v2_pretrain_layernorm")
near = {"rtol": 1e-4, "atol": 1e-4}


class Step:
    """A recorded case, and our model run on its inputs and random draws."""

    def __init__(self, case, fast):
        self.meta, self.tensors = recorded(case)
        self.scalars = self.meta["scalars"]
        self.model = set_fast(original(case), fast)
        self.waveforms, self.lengths = self.tensors["in.source"], self.tensors.get("in.lengths")
        self.mask = self.tensors["rand.mask_indices"]
        self.batch, self.frames = self.mask.shape
        groups, negatives = self.model.quantizer.num_groups, self.model.num_negatives
        masked = self.scalars["masked_frames_per_utterance"]
        # (batch, masked * negatives) into all rows -> (rows, negatives) into the utterance's
        drawn = self.tensors["rand.neg_idxs"].view(self.batch, masked, negatives)
        self.negatives = (drawn - masked * torch.arange(self.batch)[:, None, None]).flatten(0, 1)
        self.noise = self.tensors["rand.gumbel_noise"].unflatten(0, (-1, groups))
        lengths = torch.full((self.batch,), self.waveforms.shape[1]) if self.lengths is None else self.lengths
        self.real = torch.arange(self.frames) < self.model.encoder.frame_lengths(lengths)[:, None]

    def run(self, noise=True):
        return self.model(
            self.waveforms,
            self.lengths,
            update=self.scalars["num_updates"],
            time_mask=self.mask,
            negatives=self.negatives,
            gumbel_noise=self.noise if noise else None,
        )

    def close(self, ours, name, time_first=False):
        """Compare frames that are no padding."""
        theirs = self.tensors[name]
        theirs = theirs.transpose(0, 1) if time_first else theirs
        torch.testing.assert_close(ours[self.real], theirs[self.real], **near, msg=lambda m: f"{name}: {m}")


@pytest.fixture(params=[(case, fast) for case in CASES for fast in (True, False)], ids=lambda p: f"{p[0]}-fast={p[1]}")
def step(request):
    return Step(*request.param)


def test_convolutions(step):
    extractor = step.model.encoder.feature_extractor
    for count, name in ((1, "conv0_head"), (5, "conv4_out"), (6, "conv5_out"), (7, "conv6_out")):
        config = step.model.encoder.config
        part = FeatureExtractor(
            config["conv_layers"][:count],
            norm=config["extractor_norm"],
            bias=config["conv_bias"],
            norm_over_padding=True,
        )
        part.load_state_dict({k: v for k, v in extractor.state_dict().items() if k in part.state_dict()})
        part.fast = extractor.fast
        out = part(step.waveforms, step.lengths).transpose(1, 2)
        theirs = step.tensors[f"mid.{name}"]
        out = out[0, :, : theirs.shape[-1]] if count == 1 else out
        torch.testing.assert_close(out, theirs, **near)


def test_encoder(step):
    encoder = step.model.encoder
    positional = []
    encoder.transformer.positional.register_forward_hook(lambda _, __, out: positional.append(out))
    out = encoder(step.waveforms, step.lengths, time_mask=step.mask, layers=True)
    step.close(out.extractor_features, "mid.features_ln")
    step.close(out.projected, "mid.encoder_in")
    theirs = step.tensors["mid.pos_conv_out"].transpose(1, 2)
    torch.testing.assert_close(positional[0][step.real], theirs[step.real], **near)
    for i, (layer, ffn) in enumerate(out.layers):
        step.close(layer, f"mid.layer{i}", time_first=True)
        step.close(ffn, f"mid.ffn{i}", time_first=True)
    step.close(out.features, "mid.context_masked")
    assert out.frame_lengths.tolist() == step.real.sum(1).tolist()


def test_encoder_without_masks(step):
    out = step.model.encoder(step.waveforms, step.lengths, layers=True)
    step.close(out.projected, "mid.post_proj")
    step.close(out.features, "unmasked.context")
    for i, (layer, _) in enumerate(out.layers):
        step.close(layer, f"unmasked.layer{i}", time_first=True)


def test_quantizer_and_projections(step):
    seen = {}
    for name in ("quantizer", "quantizer.projection", "target_projection", "final_projection"):
        step.model.get_submodule(name).register_forward_hook(
            lambda _, inputs, out, name=name: seen.update({name: (inputs[0], out)})
        )
    out = step.run()
    recorded_as = {
        "mid.target_in": seen["quantizer"][0],
        "mid.quant_logits": seen["quantizer.projection"][1].view_as(step.tensors["mid.quant_logits"]),
        "mid.quantized": seen["quantizer"][1].vectors,
        "mid.projected_targets": seen["target_projection"][1],
        "mid.final_proj": seen["final_projection"][1],
    }
    for name, ours in recorded_as.items():
        torch.testing.assert_close(ours.view_as(step.tensors[name]), step.tensors[name], **near)
    assert torch.equal(out.codes.view_as(step.tensors["mid.quant_codes"]), step.tensors["mid.quant_codes"])


def same_logits(ours, theirs):
    """(rows, 1 + negatives) against (1 + negatives, batch, masked): the same entries left out, the others near."""
    theirs = theirs.permute(1, 2, 0).flatten(0, 1)
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_logits_and_scalars(step):
    out, scalars = step.run(), step.scalars
    same_logits(out.logits, step.tensors["out.logits"])
    assert int(out.logits.isinf().sum()) == scalars["negatives_equal_to_positive"] > 0
    assert out.num_masked == scalars["sample_size"]
    assert out.temperature == pytest.approx(scalars["temperature"], rel=1e-12)
    measured = {
        "total_loss": out.loss_sum,
        "contrastive_sum": out.contrastive,
        "prob_perplexity": out.prob_perplexity.sum(),
        "code_perplexity": out.code_perplexity.sum(),
        "feature_penalty_unweighted": out.encoded.feature_penalty,
    }
    for name, value in measured.items():
        assert float(value.detach()) == pytest.approx(scalars[name], rel=1e-5), name
    in_bits = float(out.loss_sum.detach()) / out.num_masked / math.log(2)
    assert in_bits == pytest.approx(scalars["logged_loss_base2"], rel=1e-5)
    assert float(out.diversity) == pytest.approx(scalars["weighted_terms"]["loss_1"], rel=1e-5)
    assert float(out.penalty) == pytest.approx(scalars["weighted_terms"].get("loss_2", 0.0), rel=1e-5)
    assert int(out.correct) == scalars["correct"]


def test_gradients(step):
    step.run().loss_sum.backward()
    assert_gradients("wav2vec2_pretraining", step.model, step.tensors)
    gradients = {name: parameter.grad for name, parameter in step.model.named_parameters()}
    gradients = by_original_names("wav2vec2_pretraining", step.model, gradients)
    for name, norm in step.scalars["grad_norms_all"].items():
        if name.endswith("k_proj.bias"):
            continue  # zero but for rounding
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-3), name


def test_evaluation(step):
    step.model.eval()
    with torch.no_grad():
        out = step.run(noise=False)
    same_logits(out.logits, step.tensors["eval.logits"])
    assert torch.equal(out.codes.view_as(step.tensors["eval.codes"]), step.tensors["eval.codes"])
    expected = step.scalars["eval_mode"]
    assert float(out.loss_sum) == pytest.approx(expected["total_loss"], rel=1e-5)
    assert int(out.correct) == expected["correct"]
    assert float(out.code_perplexity.sum()) == pytest.approx(expected["code_perplexity"], rel=1e-5)
