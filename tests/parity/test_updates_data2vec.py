"""Whole training updates of data2vec recorded from the original, through our Brain, with either timing of the EMA."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.case_data2vec import load_student, student_of
from tests.parity.recording import read_recording
from tests.parity.report import Measured
from tests.parity.running import Inputs, Setup, prepare
from tests.parity.test_updates import EXTRAS, FIXTURES, OneBatch
from toolkit.models.convert import load_pretrained
from toolkit.models.convert.common import export_tensors
from toolkit.models.convert.fairseq_names import TEACHER, TEACHERS, names_table
from toolkit.pretraining import MaskedPretraining
from toolkit.training.devices import resolve_device
from toolkit.training.fairseq_adam import FairseqAdamW
from toolkit.training.schedules import TriStage

KIND = "data2vec_audio"
GROUPS = {"final", *(f"{what}{update}" for what in ("student_after", "teacher") for update in range(4))}


def by_their_names(model):
    """(student, teacher) by the original's names, copied."""
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    named = export_tensors(names_table(KIND, model.config), weights)
    prefix = TEACHERS[KIND]
    teacher = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    return {name: value for name, value in named.items() if not name.startswith(prefix)}, teacher


class Recorded(MaskedPretraining):
    """The recipes' own Brain on the recorded batch and mask; what moves the teacher is theirs."""

    def on_fit_start(self):
        self.seen = []

    def compute_forward(self, batch, stage):
        inputs = self.hparams.inputs
        model = self.modules.model
        self.out = model(
            inputs.waveforms, inputs.lengths, rng=self.rng, update=self.update, time_mask=self.hparams.mask
        )
        self.teacher = by_their_names(model)[1]
        return self.out

    def on_update_end(self, result):
        out = self.out
        self.seen.append(
            {
                "loss_sum": float(result.loss_sum),
                "sample_size": float(result.count),
                "lr": max(group["lr"] for group in self.optimizer.param_groups),
                "grad_norm_before_clip": float(result.grad_norm),
                "target_var": float(out.target_deviation),
                "pred_var": float(out.prediction_deviation),
                "ema_decay": out.decay,
                "num_updates_at_forward": result.update,
                "teacher": self.teacher,
                "student_after": by_their_names(self.modules.model)[0],
            }
        )
        super().on_update_end(result)


def trained(plain, timing):
    """(what is recorded, its tensors, what our Brain saw at each update)."""
    recorded = json.loads((EXTRAS / f"train_{KIND}.json").read_text())
    recording, measured = read_recording(FIXTURES / KIND), Measured()
    setup = Setup(resolve_device("cpu"), "fp32", plain)
    model = prepare(load_pretrained(FIXTURES / KIND / "checkpoint.pt")[0], setup)
    load_student(recording, model, KIND)
    model.teacher.copy_from(student_of(model))
    model.ema_timing = timing
    options = recorded["optimizer"]
    brain = Recorded(
        {"model": model},
        functools.partial(FairseqAdamW, lr=0.002, **{name: options[name] for name in ("betas", "eps", "weight_decay")}),
        {
            "inputs": Inputs(recording, model.encoder, setup, measured),
            "mask": recording.tensors["rand.mask_indices"],
        },
        {"max_updates": len(recorded["updates"]), "max_grad_norm": options["clip_norm"], "precision": "fp32"},
        schedule=TriStage(warmup=2, hold=4, decay=10, init_factor=0.01, final_factor=0.05),
    )
    brain.fit(OneBatch())
    return recorded, load_file(EXTRAS / f"train_{KIND}.safetensors"), brain.seen


@pytest.mark.parametrize("timing", ["fairseq", "step"])
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_four_updates(plain, timing):
    """The recording asks for 1e-4 of the loss and 2e-5 of the weights; a tenth of it is held."""
    recorded, tensors, seen = trained(plain, timing)
    assert len(seen) == len(recorded["updates"]) == 4
    for ours, theirs in zip(seen, recorded["updates"], strict=True):
        assert ours.keys() >= theirs.keys()
        for name, value in theirs.items():
            rel = 1e-12 if name in ("lr", "ema_decay") else 1e-5
            assert ours[name] == pytest.approx(value, rel=rel), name
    groups = set()
    for name, theirs in tensors.items():
        group, _, parameter = name.partition(".")
        what, update = ("student_after", 3) if group == "final" else (group[:-1], int(group[-1]))
        limit = 1e-6 if what == "teacher" else 2e-6
        torch.testing.assert_close(seen[update][what][parameter], theirs, rtol=0, atol=limit, msg=name)
        groups.add(group)
    assert groups == GROUPS


def test_the_teacher_follows_with_the_model_that_the_state_holds():
    """It is saved with the student, and no optimizer has it."""
    model = load_pretrained(FIXTURES / KIND / "checkpoint.pt")[0]
    held = [name for name in model.state_dict() if name.startswith(TEACHER)]
    assert len(held) == len(list(model.teacher.module.parameters())) > 0
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
