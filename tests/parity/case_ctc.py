"""A CTC model: evaluation, the phase in which only the head learns, and training with masks of frames and channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.recording import META, Recording, RecordingError
from tests.parity.report import EQUAL, Measured
from tests.parity.running import (
    Inputs,
    Setup,
    check_mask,
    layers_of,
    prepare,
    randomness,
    say_gradients,
    say_trained,
    scalars_as_given,
    watch,
)
from toolkit.decoding.ctc import greedy_decode
from toolkit.decoding.scoring import count_word_errors
from toolkit.models.ctc import CTCModel, CTCOutput, ctc_loss

BF16_LOGITS = 2e-2
"""What bfloat16 may change of a logit, of the largest."""

PHASES = {"train_frozen": "grad_frozen.", "train": "grad."}
"""Sections of scalars with a training pass of their own, and the prefix of its gradients."""


class Step:
    """A recorded batch with its labels and masks, and the model beside it."""

    def __init__(self, recording: Recording, model: CTCModel, setup: Setup, measured: Measured) -> None:
        self.recording, self.model, self.setup = recording, model, setup
        self.inputs = Inputs(recording, model.encoder, setup, measured)
        self.blank = recording.meta.get("blank", 0)
        self.tokens, self.token_lengths = recording.tensor("in.target"), recording.tensor("in.target_lengths")
        measured.inputs |= {"in.target", "in.target_lengths"}
        shapes = {"time_mask": self.inputs.frames, "channel_mask": model.encoder.dim}
        self.masks = {
            name: check_mask(recording, "rand." + name, (self.inputs.batch, size))
            for name, size in shapes.items()
            if "rand." + name in recording.tensors
        }
        measured.inputs |= {"rand." + name for name in self.masks}

    def run(self, **options: Any) -> tuple[CTCOutput, Tensor, int]:
        """The model's output, the summed loss, and the number to divide by."""
        with self.setup.autocast():
            out = self.model(self.inputs.waveforms, self.inputs.lengths, **options)
            tokens, lengths = self.setup.put(self.tokens), self.setup.put(self.token_lengths)
            loss, count = ctc_loss(out.log_probs, out.frame_lengths, tokens, lengths, blank_id=self.blank)
        return out, loss, count


def compare_ctc(recording: Recording, model: CTCModel, setup: Setup) -> Measured:
    """Everything that the model says about a recorded batch."""
    measured = Measured()
    prepare(model, setup)
    step = Step(recording, model, setup, measured)
    seen = watch(model, head="head")
    _evaluate(step, measured, seen)
    for phase, prefix in PHASES.items():
        if any(path.startswith(f"scalars.{phase}.") for path in recording.scalars):
            _train(step, measured, seen, phase, prefix)
    for name in ("eval", *PHASES):
        if f"scalars.{name}.loss_sum" in measured.values:
            measured.values["float64_reference." + name] = measured.values[f"scalars.{name}.loss_sum"]
    return measured


def _evaluate(step: Step, measured: Measured, seen: dict[str, Tensor]) -> None:
    step.model.eval()
    inputs = step.inputs
    with torch.no_grad():
        out, loss, count = step.run()
        logits = seen["head"].float().cpu()
        with step.setup.autocast():
            encoded = step.model.encoder(inputs.waveforms, inputs.lengths, layers=True)
    layers_of(encoded.layers, inputs, measured, "eval.layer", "eval.ffn")
    measured.add("eval.w2v_out", inputs.real_rows(out.encoded.features), view=inputs.real_of)
    measured.add("eval.encoder_out", inputs.real_rows(logits), "logits", view=inputs.real_of_time_first)
    # The originals write certain silence over the padding; here the frame lengths say where it begins.
    certain = torch.full((logits.shape[-1],), float("-inf"))
    certain[step.blank] = 0
    full = torch.where(_real(out, inputs)[..., None], logits, certain)
    measured.add("eval.logits", full.transpose(0, 1), "logits")
    log_probs = torch.where(_real(out, inputs)[..., None], out.log_probs.cpu(), F.log_softmax(certain, dim=-1))
    measured.add("eval.log_probs", log_probs.transpose(0, 1), "logits")
    measured.add("eval.padding_mask", ~_real(out, inputs), EQUAL)
    best = full.argmax(-1)
    if step.setup.precision == "bf16" and "eval.logits" in step.recording.tensors:
        best = _nearly_as_good(best, step.recording.tensors["eval.logits"].transpose(0, 1))
    measured.add("eval.greedy", best, EQUAL)
    measured.scalar("eval.loss_sum", loss)
    measured.scalar("eval.sample_size", count, EQUAL)
    _say_errors(step, measured, out)


def _nearly_as_good(ours: Tensor, logits: Tensor) -> Tensor:
    """The recorded choices where ours are, by the recorded logits (batch, frames, symbols), nearly as good as these.

    A choice between two near logits is decided by rounding, which bfloat16 does earlier.
    """
    lead, theirs = logits.max(-1)
    lag = lead - logits.gather(-1, ours[..., None])[..., 0]
    return torch.where(lag <= 2 * BF16_LOGITS * logits[logits.isfinite()].abs().max(), theirs, ours)


def _real(out: CTCOutput, inputs: Inputs) -> Tensor:
    return torch.arange(inputs.frames) < out.frame_lengths[:, None]


def _say_errors(step: Step, measured: Measured, out: CTCOutput) -> None:
    """Edits of tokens and of words between the greedy transcripts and the labels."""
    symbols = step.recording.meta.get("symbols")
    if not isinstance(symbols, list) or len(symbols) != out.log_probs.shape[-1]:
        raise RecordingError(
            f"{step.recording.folder / META}: symbols must be a list of {out.log_probs.shape[-1]}, one for each output."
        )
    token_counts = [0, 0]
    word_counts = [0, 0]
    decoded = greedy_decode(out.log_probs, out.frame_lengths, blank_id=step.blank)
    for hypothesis, labels, length in zip(decoded, step.tokens.tolist(), step.token_lengths.tolist(), strict=True):
        reference = labels[:length]
        for spelled, counts in ((_numbers, token_counts), (lambda ids: _words(ids, symbols), word_counts)):
            errors = count_word_errors(spelled(reference), spelled(hypothesis))
            counts[0] += errors.edits
            counts[1] += len(spelled(reference).split())
    for name, counts in (("c", token_counts), ("w", word_counts)):
        few = 2 + counts[1] // 10 if step.setup.precision == "bf16" else None  # each is made of choices
        measured.scalar(f"eval.{name}_errors", counts[0], EQUAL if few is None else "loss", limit=few)
        measured.scalar(f"eval.{name}_total", counts[1], EQUAL)


def _numbers(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def _words(ids: list[int], symbols: list[str]) -> str:
    """As the originals spell: <s> and </s> say nothing, | ends a word."""
    return "".join(symbols[i] for i in ids if symbols[i] not in ("<s>", "</s>")).replace("|", " ")


def _train(step: Step, measured: Measured, seen: dict[str, Tensor], phase: str, prefix: str) -> None:
    recording, inputs = step.recording, step.inputs
    step.model.train()
    scalars_as_given(recording, measured, [f"{phase}.num_updates"])
    out, loss, count = step.run(rng=randomness(), update=recording.number(f"{phase}.num_updates"), **step.masks)
    step.model.zero_grad(set_to_none=True)
    loss.backward()
    measured.scalar(f"{phase}.loss_sum", loss)
    measured.scalar(f"{phase}.sample_size", count, EQUAL)
    say_gradients(recording, measured, step.model, step.setup, prefix, f"{phase}.grad_norms")
    say_trained(recording, measured, step.model, phase)
    if phase != "train":
        return
    measured.add("train.masked_features", inputs.real_rows(out.encoded.projected), view=inputs.real_of)
    measured.add("train.encoder_out", inputs.real_rows(seen["head"].float()), "logits", view=inputs.real_of_time_first)
    measured.add("train.log_probs", inputs.real_rows(out.log_probs), "logits", view=inputs.real_of_time_first)
