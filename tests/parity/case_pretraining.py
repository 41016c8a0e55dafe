"""A pretraining step of wav2vec 2.0: every activation, logit, loss term, count and gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.parity.recording import Recording, RecordingError
from tests.parity.report import EQUAL, Measured
from tests.parity.running import (
    Inputs,
    Setup,
    check_mask,
    layers_of,
    prepare,
    randomness,
    say_convolutions,
    say_gradients,
    scalars_as_given,
    watch,
)
from toolkit.models.wav2vec2 import PretrainingOutput, Wav2Vec2Pretraining

BF16_LOGITS = 2e-2
"""What bfloat16 may change of the quantizer's logits, of their largest."""


class Draws:
    """The recorded random choices, in the forms that the model takes."""

    def __init__(self, recording: Recording, model: Wav2Vec2Pretraining, inputs: Inputs, measured: Measured) -> None:
        self.mask = check_mask(recording, "rand.mask_indices", (inputs.batch, inputs.frames))
        counts = self.mask.sum(1).tolist()
        if len(set(counts)) != 1 or counts[0] < 2:
            raise RecordingError(
                f"{recording.folder}: rand.mask_indices masks {counts} frames, expected the same number in each row."
            )
        self.batch, self.masked = inputs.batch, counts[0]
        groups, codes = model.quantizer.num_groups, model.quantizer.num_codes
        self.noise = recording.tensor("rand.gumbel_noise")
        if tuple(self.noise.shape) != (self.batch * self.masked * groups, codes):
            raise RecordingError(
                f"{recording.folder}: rand.gumbel_noise is {tuple(self.noise.shape)}, expected "
                f"{(self.batch * self.masked * groups, codes)} for {self.batch} x {self.masked} masked frames."
            )
        self.noise = self.noise.unflatten(0, (-1, groups))
        drawn = recording.tensor("rand.neg_idxs")
        if drawn.shape[0] != self.batch or drawn.shape[1] % self.masked:
            raise RecordingError(
                f"{recording.folder}: rand.neg_idxs is {tuple(drawn.shape)}, expected a row for each of {self.batch} "
                f"utterances, of a multiple of {self.masked} masked frames."
            )
        # (batch, masked * N) into all masked frames -> (S, N) into the utterance's own
        offsets = self.masked * torch.arange(self.batch)[:, None, None]
        self.negatives = (drawn.view(self.batch, self.masked, -1) - offsets).flatten(0, 1)
        if int(self.negatives.min()) < 0 or int(self.negatives.max()) >= self.masked:
            raise RecordingError(
                f"{recording.folder}: rand.neg_idxs points at other utterances, which this model never does."
            )
        measured.inputs |= {"rand.mask_indices", "rand.gumbel_noise", "rand.neg_idxs"}
        # What was drawn before the positive was stepped over: that step undone.
        own = torch.arange(self.masked).repeat(self.batch)[:, None]
        raw = self.negatives - (self.negatives > own).long()
        measured.add("rand.neg_raw", raw.view(self.batch, -1), EQUAL)

    def grid(self, rows: Tensor) -> Tensor:
        """(S, ...) -> (batch, masked, ...) on the host."""
        return rows.detach().cpu().unflatten(0, (self.batch, self.masked))


@dataclass(frozen=True)
class Step:
    """A recorded step, and the model beside it; ``seen`` holds what its modules got and gave last."""

    recording: Recording
    model: Wav2Vec2Pretraining
    setup: Setup
    inputs: Inputs
    draws: Draws
    measured: Measured
    seen: dict[str, Any]

    def forward(self, noise: Tensor | None) -> PretrainingOutput:
        """The model on the recorded batch, masks and negatives, in the mode that it is in."""
        with self.setup.autocast():
            return self.model(
                self.inputs.waveforms,
                self.inputs.lengths,
                rng=randomness(),
                update=self.recording.number("num_updates"),
                time_mask=self.draws.mask,
                negatives=self.draws.negatives,
                gumbel_noise=noise,
            )

    @property
    def logits(self) -> Tensor:
        """The quantizer's last logits (S, groups, codes), on the host."""
        return self.seen["logits"].detach().cpu().view_as(self.draws.noise)

    def pinned(self, noise: Tensor, codes: str) -> Tensor:
        """The noise, raised just enough that each frame's recorded code still wins.

        A code is a choice: where two are nearly as good, another number format takes the other one, and everything
        behind it is of another code. So the choices are held, and what is left is the rounding.
        """
        with torch.no_grad():
            self.forward(self.setup.put(noise))
        return _raised(self.logits, noise, self.recording.tensor(codes).flatten(0, 1))


def compare_pretraining(recording: Recording, model: Wav2Vec2Pretraining, setup: Setup) -> Measured:
    """Everything that the model says about a recorded step."""
    measured = Measured()
    prepare(model, setup)
    inputs = Inputs(recording, model.encoder, setup, measured)
    draws = Draws(recording, model, inputs, measured)
    scalars_as_given(recording, measured, ["num_updates"])
    seen = watch(
        model,
        positional="encoder.transformer.positional",
        quantizer="quantizer",
        logits="quantizer.projection",
        targets="target_projection",
        predictions="final_projection",
    )
    step = Step(recording, model, setup, inputs, draws, measured, seen)
    _encode(step)
    _train(step)
    _evaluate(step)
    return measured


def _train(step: Step) -> None:
    """The training step itself, as a Brain makes it, and its gradients."""
    model, setup, draws, measured, seen = step.model, step.setup, step.draws, step.measured, step.seen
    model.train()
    noise = draws.noise if setup.precision == "fp32" else step.pinned(draws.noise, "mid.quant_codes")
    out = step.forward(setup.put(noise))
    model.zero_grad(set_to_none=True)
    out.loss_sum.backward()
    targets, logits = draws.grid(seen["targets"]), step.logits
    measured.add("mid.target_in", draws.grid(seen["quantizer_in"]))
    measured.add("mid.quant_logits", logits.flatten(0, 1))
    measured.add("mid.quant_codes", draws.grid(out.codes), EQUAL)
    measured.add("mid.quantized", draws.grid(seen["quantizer"].vectors))
    measured.add("mid.projected_targets", targets)
    measured.add("mid.final_proj", draws.grid(seen["predictions"]))
    measured.add("mid.negatives", _gathered(targets, draws))
    _say_logits(measured, "out.logits", out, draws)
    # the originals' rows run over time first, then over utterances
    measured.add("out.logits_flat", draws.grid(out.logits).transpose(0, 1).flatten(0, 1), "logits")
    measured.add("out.total_loss", out.loss_sum, "loss")
    _say_scalars(step, out)
    first, second = (logits + draws.noise).topk(2, dim=-1).values.unbind(-1)
    # a difference of logits, so as near as these are
    limit = BF16_LOGITS * float(logits.abs().max()) / out.temperature if setup.precision == "bf16" else None
    measured.scalar("gumbel_argmax_margin", (first - second).min() / out.temperature, "activations", limit=limit)
    say_gradients(step.recording, measured, model, setup, "grad.", "grad_norms_all")


def _raised(logits: Tensor, noise: Tensor, codes: Tensor) -> Tensor:
    noisy = logits + noise
    lead = noisy.gather(-1, codes[..., None]) - noisy.amax(-1, keepdim=True)
    return noise.scatter_add(-1, codes[..., None], torch.where(lead < 0, 1e-3 - lead, torch.zeros_like(lead)))


def _gathered(targets: Tensor, draws: Draws) -> Tensor:
    """The negatives' vectors: targets (batch, masked, F) -> (N, batch, masked, F)."""
    indices = draws.negatives.view(draws.batch, draws.masked, -1)
    utterances = torch.arange(draws.batch)[:, None, None]
    return targets[utterances, indices].permute(2, 0, 1, 3)


def _say_logits(measured: Measured, name: str, out: PretrainingOutput, draws: Draws) -> None:
    """(S, 1 + N) as (1 + N, batch, masked)."""
    measured.add(name, draws.grid(out.logits).permute(2, 0, 1), "logits")


def _say_scalars(step: Step, out: PretrainingOutput) -> None:
    model, measured = step.model, step.measured
    codes = model.quantizer.num_groups * model.quantizer.num_codes
    total, loss = out.num_masked, float(out.loss_sum.detach())
    _say_counts(step, "", out)
    measured.values["float64_reference.total_loss"] = measured.values["scalars.total_loss"]
    measured.scalar("contrastive_sum", out.contrastive)
    measured.values["float64_reference.contrastive_sum"] = measured.values["scalars.contrastive_sum"]
    measured.scalar("diversity_unweighted", (codes - out.prob_perplexity.sum()) / codes)
    measured.scalar("feature_penalty_unweighted", out.encoded.feature_penalty)
    weights = (model.diversity_weight, model.penalty_weight)
    for index, weight in enumerate(weights):
        measured.scalar(f"loss_weights.{index}", weight, EQUAL)
    # A term of weight 0 is left out there, and the next one moves up.
    terms = [out.contrastive]
    terms += [term for term, weight in zip((out.diversity, out.penalty), weights, strict=True) if weight]
    for index, term in enumerate(terms):
        measured.scalar(f"weighted_terms.loss_{index}", term)
    measured.scalar("total_loss_div_sample_size", loss / total)
    measured.scalar("logged_loss_base2", loss / total / math.log(2))
    measured.scalar("num_vars", codes, EQUAL)
    measured.scalar("temperature", out.temperature, "schedule")
    measured.scalar("frames", step.inputs.frames, EQUAL)
    for index, count in enumerate(out.encoded.masked.counts):
        measured.scalar(f"masked_frames_per_utterance.{index}", count, EQUAL)
    measured.scalar("masked_frames_per_utterance", out.encoded.masked.counts[0], EQUAL)


def _say_counts(step: Step, prefix: str, out: PretrainingOutput) -> None:
    """Loss, perplexities and counts, which training and evaluation share."""
    measured, total = step.measured, out.num_masked
    measured.scalar(prefix + "total_loss", out.loss_sum)
    measured.scalar(prefix + "sample_size", total, EQUAL)
    measured.scalar(prefix + "prob_perplexity", out.prob_perplexity.sum())
    measured.scalar(prefix + "code_perplexity", out.code_perplexity.sum())
    # Whether a guess is right is a choice as well; in bfloat16 a few near ones may fall the other way.
    few = max(2, int(0.05 * total)) if step.setup.precision == "bf16" else None
    measured.scalar(prefix + "correct", int(out.correct), EQUAL if few is None else "loss", limit=few)
    measured.scalar(prefix + "count", len(out.logits), EQUAL)
    measured.scalar(prefix + "accuracy", int(out.correct) / total, limit=None if few is None else few / total)
    measured.scalar(prefix + "negatives_equal_to_positive", int(out.logits.isinf().sum()), EQUAL)
    chosen = step.draws.grid(out.codes)
    same = (_gathered(chosen, step.draws) == chosen).all(-1)
    measured.scalar(prefix + "negatives_with_same_codes_as_positive", int(same.sum()), EQUAL)


def _encode(step: Step) -> None:
    """The encoder with every frame's outputs of every layer: with the masks in training, and without any."""
    inputs, measured = step.inputs, step.measured
    encoder = step.model.encoder.train()
    with torch.no_grad(), step.setup.autocast():
        masked = encoder(inputs.waveforms, inputs.lengths, rng=randomness(), time_mask=step.draws.mask, layers=True)
        positional = step.seen["positional"].float()
        plain = encoder.eval()(inputs.waveforms, inputs.lengths, layers=True)
    real = inputs.real_rows
    say_convolutions(step.recording, measured, encoder, inputs, step.setup)
    measured.add("mid.frame_padding_mask", ~inputs.real, EQUAL)
    measured.add("mid.features_ln", masked.extractor_features)
    measured.add("mid.post_proj", real(plain.projected), view=inputs.real_of)
    measured.add("mid.encoder_in", real(masked.projected), view=inputs.real_of)
    # (batch, dim, frames) -> (real frames, dim)
    measured.add("mid.pos_conv_out", real(positional), view=lambda theirs: inputs.real_of(theirs.transpose(1, 2)))
    layers_of(masked.layers, inputs, measured, "mid.layer", "mid.ffn")
    measured.add("mid.context_masked", real(masked.features), view=inputs.real_of)
    measured.add("unmasked.context", real(plain.features), view=inputs.real_of)
    layers_of(plain.layers, inputs, measured, "unmasked.layer", "unmasked.ffn")


def _evaluate(step: Step) -> None:
    """The same masks and negatives in evaluation mode: the likeliest codes, no noise."""
    step.model.eval()
    with torch.no_grad():
        noise = None
        if step.setup.precision != "fp32":
            noise = step.setup.put(step.pinned(torch.zeros_like(step.draws.noise), "eval.codes"))
        out = step.forward(noise)
    step.measured.add("eval.codes", step.draws.grid(out.codes), EQUAL)
    step.measured.add("eval.quantized", step.draws.grid(step.seen["quantizer"].vectors))
    _say_logits(step.measured, "eval.logits", out, step.draws)
    _say_counts(step, "eval_mode.", out)
