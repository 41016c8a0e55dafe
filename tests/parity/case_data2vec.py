"""A step of data2vec, of speech or of text: the teacher's moves, targets, predictions, loss, variances, gradients.

The recording begins with the student alone (student_initial.safetensors), of which the teacher is made. Then the
student is changed by a rule and the teacher moves, several times; the step is made in the state after the last move.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.parity.recording import META, Recording, RecordingError
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
    watch,
)
from toolkit.models.convert.common import export_tensors, import_tensors
from toolkit.models.convert.fairseq_names import TEACHER, TEACHERS, names_table
from toolkit.models.data2vec import Data2VecAudio, Data2VecText
from toolkit.models.data2vec_targets import Data2VecOutput
from toolkit.models.text_encoder import TextEncoder
from toolkit.nn.fast.common import set_fast

STUDENT = "student_initial.safetensors"
RULE = re.compile(r"every student parameter is multiplied by 1\+([0-9.]+)\*k")


def student_of(model: Data2VecAudio | Data2VecText) -> nn.Module:
    """The part that the teacher follows."""
    return model.encoder.transformer if isinstance(model, Data2VecAudio) else model.encoder


def load_student(recording: Recording, model: Data2VecAudio | Data2VecText, kind: str) -> None:
    """Fill the student with what it was when its teacher was made; raises RecordingError if the file does not fit."""
    path = recording.folder / STUDENT
    if not path.is_file():
        raise RecordingError(f"{path} is missing, and the moves of the teacher cannot be made without it.")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RecordingError(f"{path}: this is no whole safetensors file ({error}).") from error
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(TEACHER)}
    table = names_table(kind, model.config)
    tensors, missing, rest = import_tensors(table, weights, {name: value.shape for name, value in own.items()})
    wrong = [name for name, value in tensors.items() if value.shape != own[name].shape]
    if missing or wrong:
        raise RecordingError(f"{path}: {(*missing, *wrong)[0]} is missing or of another shape; copy the file again.")
    if rest := [name for name in rest if not name.endswith("version")]:
        raise RecordingError(f"{path}: the model has no place for {rest[0]}; are the files of one recording?")
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


class Moves:
    """The recorded moves of a teacher, made again by ours, and what is said of each.

    Arguments
    ---------
    recording : holds ``emaK.*``, the teacher after move K, and ``emaKb.*``, after the same move made twice.
    model : as loaded: the student after the last change, the teacher after the last move.
    kind : data2vec_audio or data2vec_text.
    measured : takes what is said.
    """

    def __init__(
        self, recording: Recording, model: Data2VecAudio | Data2VecText, kind: str, measured: Measured
    ) -> None:
        self.recording, self.model, self.kind, self.measured = recording, model, kind, measured
        numbers = [int(match[1]) for name in recording.tensors if (match := re.match(r"ema(\d+)\.", name))]
        rule = RULE.search(str(recording.meta.get("student_change_rule")))
        if not numbers or rule is None:
            raise RecordingError(
                f"{recording.folder / META}: no rule by which the student changes between the moves of its teacher, or "
                "no move at all, is recorded; nothing can be compared without."
            )
        self.last, self.factor = max(numbers), float(rule[1])
        self.loaded = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def begin(self) -> None:
        """The student as it was in the beginning, its teacher made of it, and all moves but the last."""
        load_student(self.recording, self.model, self.kind)
        student = student_of(self.model)
        self.model.teacher.copy_from(student)
        self.say("ema0.")
        self.measured.scalar("decay_used.0", None)  # a copy, no average
        for move in range(1, self.last):
            self.change(move)
            self.measured.scalar(f"decay_used.{move}", self.model.teacher.move(student, update=move), "schedule")
            self.say(f"ema{move}.")
        self.change(self.last)

    def change(self, move: int) -> None:
        """The student before ``move``."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if not name.startswith(TEACHER):
                    parameter.mul_(1 + self.factor * move)

    def say(self, prefix: str) -> None:
        """The teacher as it is now."""
        tensors = {
            name: value.detach().cpu() for name, value in self.model.state_dict().items() if name.startswith(TEACHER)
        }
        theirs = export_tensors(names_table(self.kind, self.model.config), tensors)
        for name, value in theirs.items():
            self.measured.add(prefix + name.removeprefix(TEACHERS[self.kind]), value, "ema")

    def say_last(self) -> None:
        """After the step, whose forward pass made the last move: the teacher, and both beside the checkpoint's."""
        self.say(f"ema{self.last}.")
        model = self.model
        decay = model.teacher.decay.at(self.last)
        self.measured.scalar(f"decay_used.{self.last}", decay, "schedule")
        self.measured.scalar("ema_decay_logged_x1000", 1000 * decay, "schedule")
        for path in self.recording.scalars:
            if path.startswith("scalars.decay_schedule."):
                update = int(path.rpartition(".")[2])
                key = path.removeprefix("scalars.")
                self.measured.scalar(key, model.teacher.decay.at(update), "schedule")
        now = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        for words, is_teacher in (("student", False), ("teacher", True)):
            names = [name for name in now if name.startswith(TEACHER) == is_teacher]
            ours, theirs = (torch.cat([state[name].flatten() for name in names]) for state in (now, self.loaded))
            self.measured.beside(f"{words} of checkpoint.pt", ours, theirs, "ema")


@dataclass(frozen=True)
class Step:
    """A recorded step, and the model beside it; ``seen`` holds what its modules got and gave last."""

    recording: Recording
    model: Data2VecAudio | Data2VecText
    setup: Setup
    moves: Moves
    measured: Measured
    seen: dict[str, Any]

    def run(self, *inputs: Any, **options: Any) -> Data2VecOutput:
        """The model in training, as a Brain runs it; its forward pass moves the teacher as the original's does."""
        self.model.train()
        with self.setup.autocast():
            return self.model(*inputs, rng=randomness(), update=self.moves.last, **options)

    def say_output(self, prefix: str, out: Data2VecOutput) -> None:
        """Predictions, targets and the loss."""
        self.measured.add(prefix + "mid.pred", out.predictions)
        self.measured.add(prefix + "mid.target", out.targets)
        self.measured.add(prefix + "out.loss", out.loss_sum, "loss")
        self.measured.scalar(prefix + "loss_sum", out.loss_sum)
        self.measured.values[f"float64_reference.{prefix}loss_sum"] = self.measured.values[f"scalars.{prefix}loss_sum"]

    def train(self, out: Data2VecOutput) -> None:
        """Loss, variances and gradients of the step."""
        measured, rule = self.measured, self.model.rule
        self.model.zero_grad(set_to_none=True)
        out.loss_sum.backward()
        self.say_output("", out)
        measured.scalar("sample_size", out.num_masked, EQUAL)
        measured.scalar("masked_positions", out.num_masked, EQUAL)
        width = out.predictions.shape[1]
        measured.scalar("loss_scale", width**-0.5 if rule.loss_scale is None else rule.loss_scale, "schedule")
        measured.scalar("target_var", out.target_deviation)
        measured.scalar("pred_var", out.prediction_deviation)
        for name in ("target_var", "pred_var"):
            measured.values[f"float64_reference.{name}"] = measured.values["scalars." + name]
        say_gradients(self.recording, measured, self.model, self.setup, "grad.", "grad_norms_all")
        self.moves.say_last()

    def first_layer(self, layers: Any) -> int:
        """The number of the first of the teacher's layers that were asked for."""
        return len(student_of(self.model).layers) - len(layers)


def compare_audio(recording: Recording, model: Data2VecAudio, setup: Setup) -> Measured:
    """Everything that the model says about a recorded step of speech."""
    measured = Measured()
    prepare(model, setup)
    model.ema_timing = "fairseq"
    inputs = Inputs(recording, model.encoder, setup, measured)
    mask = check_mask(recording, "rand.mask_indices", (inputs.batch, inputs.frames))
    measured.inputs.add("rand.mask_indices")
    moves = Moves(recording, model, "data2vec_audio", measured)
    seen = watch(model, positional="encoder.transformer.positional", teacher="teacher")
    step = Step(recording, model, setup, moves, measured, seen)
    moves.begin()
    out = step.run(inputs.waveforms, inputs.lengths, time_mask=mask)
    step.train(out)
    _say_audio_teacher(step, inputs)
    _encode_audio(step, inputs, mask)
    measured.scalar("frames", inputs.frames, EQUAL)
    for index, count in enumerate(mask.sum(1).tolist()):
        measured.scalar(f"masked_frames.{index}", count, EQUAL)
    # accumulating two micro-batches moves the teacher twice
    step.run(inputs.waveforms, inputs.lengths, time_mask=mask)
    moves.say(f"ema{moves.last}b.")
    return measured


def _say_audio_teacher(step: Step, inputs: Inputs) -> None:
    """What the teacher saw and said; padding too, where the norms of the targets look at it."""
    model, measured = step.model, step.measured
    measured.add("mid.post_proj", inputs.real_rows(step.seen["teacher_in"]), view=inputs.real_of)
    layers = step.seen["teacher"][1]
    padded = model.encoder.norm_over_padding and "instance" in (*model.rule.layer_norms, *model.rule.target_norms)
    for index, pair in enumerate(layers, start=step.first_layer(layers)):
        for name, ours in zip((f"mid.teacher_layer{index}", f"mid.teacher_ffn{index}"), pair, strict=True):
            if padded:
                measured.add(name, ours, view=lambda theirs: theirs.transpose(0, 1))
            elif ours is not None:
                measured.add(name, inputs.real_rows(ours), view=inputs.real_of_time_first)


def _encode_audio(step: Step, inputs: Inputs, mask: Tensor) -> None:
    """The student with every frame's outputs of every layer, with the mask."""
    measured, encoder = step.measured, step.model.encoder.train()
    with torch.no_grad(), step.setup.autocast():
        masked = encoder(inputs.waveforms, inputs.lengths, rng=randomness(), time_mask=mask, layers=True)
    positional = inputs.real_rows(step.seen["positional"].float())
    say_convolutions(step.recording, measured, encoder, inputs, step.setup)
    measured.add("mid.frame_padding_mask", ~inputs.real, EQUAL)
    measured.add("mid.features_ln", masked.extractor_features)
    measured.add("mid.encoder_in", inputs.real_rows(masked.projected), view=inputs.real_of)
    # (batch, dim, frames) -> (real frames, dim)
    measured.add("mid.pos_conv_out", positional, view=lambda theirs: inputs.real_of(theirs.transpose(1, 2)))
    layers_of(masked.layers, inputs, measured, "mid.student_layer", "mid.student_ffn")
    measured.add("mid.student_out", inputs.real_rows(masked.features), view=inputs.real_of)


def compare_text(recording: Recording, model: Data2VecText, setup: Setup) -> Measured:
    """Everything that the model says about a recorded step of text, by the released teacher and by the paper's."""
    measured = Measured()
    prepare(model, setup)
    model.ema_timing, model.teacher_input = "fairseq", "fairseq"
    source, target = recording.tensor("in.src_tokens"), recording.tensor("in.target_tokens")
    measured.inputs.add("in.src_tokens")
    chosen = target != model.encoder.padding_id
    tokens = recording.tensors.get("in.full_tokens", torch.where(chosen, target, source))
    if not source.shape == target.shape == tokens.shape:
        raise RecordingError(f"{recording.folder}: the inputs of tokens are of several shapes; copy the file again.")
    moves = Moves(recording, model, "data2vec_text", measured)
    step = Step(recording, model, setup, moves, measured, watch(model, teacher="teacher"))
    moves.begin()
    batch = setup.put(source), setup.put(tokens)
    out = step.run(*batch, chosen=setup.put(chosen))
    step.train(out)
    _say_text_teacher(step, "", "in.target_tokens")
    _encode_text(step, batch[0])
    # the same state, and the teacher sees everything
    model.ema_timing, model.teacher_input = "step", "paper"
    step.say_output("full.", step.run(*batch))
    _say_text_teacher(step, "full.", "in.full_tokens")
    model.ema_timing = "fairseq"
    step.run(*batch)
    moves.say(f"ema{moves.last}b.")
    return measured


def _say_text_teacher(step: Step, prefix: str, tokens: str) -> None:
    """What the teacher was shown, and said of it; only real tokens count."""
    shown, said = step.seen["teacher_in"], step.seen["teacher"]
    step.measured.add(tokens, shown, EQUAL)
    encoder = step.model.teacher.module
    embeddings = TextEncoder(**encoder.config | {"num_layers": 0}).to(shown.device).eval()
    weights = encoder.state_dict()
    embeddings.load_state_dict({name: weights[name] for name in embeddings.state_dict()})
    set_fast(embeddings, not step.setup.plain)
    with torch.no_grad(), step.setup.autocast():
        _say_tokens(step, prefix + "mid.teacher_emb", embeddings(shown).features, shown, length_first=True)
    for index, (layer, ffn) in enumerate(said.layers, start=step.first_layer(said.layers)):
        for name, ours in ((f"{prefix}mid.teacher_layer{index}", layer), (f"{prefix}mid.teacher_ffn{index}", ffn)):
            if ours is not None:
                _say_tokens(step, name, ours, shown, length_first=True)


def _encode_text(step: Step, source: Tensor) -> None:
    """The student with every token's outputs of every layer."""
    encoder = step.model.encoder.train()
    with torch.no_grad(), step.setup.autocast():
        out = encoder(source, rng=randomness(), layers=True)
    for index, (layer, ffn) in enumerate(out.layers):
        _say_tokens(step, f"mid.student_layer{index}", layer, source, length_first=True)
        _say_tokens(step, f"mid.student_ffn{index}", ffn, source, length_first=True)
    _say_tokens(step, "mid.student_out", out.features, source, length_first=False)


def _say_tokens(step: Step, name: str, ours: Tensor, tokens: Tensor, *, length_first: bool) -> None:
    """(batch, length, dim) at real tokens; ``length_first`` is how it is recorded."""
    real = (tokens != step.model.encoder.padding_id).cpu()
    ours = ours.detach().cpu()[real]
    step.measured.add(name, ours, view=lambda theirs: (theirs.transpose(0, 1) if length_first else theirs)[real])
