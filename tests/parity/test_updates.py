"""Whole training updates recorded from the original, through our Brain: losses, norms, rates, weights after each."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.case_pretraining import Draws
from tests.parity.recording import read_recording
from tests.parity.report import Measured
from tests.parity.running import Inputs, Setup, prepare
from tests.parity.test_compare import FIXTURES
from toolkit.models.convert import load_pretrained
from toolkit.models.convert.common import export_tensors
from toolkit.models.convert.fairseq_names import names_table
from toolkit.training.brain import Brain, Objective
from toolkit.training.devices import resolve_device
from toolkit.training.fairseq_adam import FairseqAdamW
from toolkit.training.optim import build_optimizer, set_learning_rates
from toolkit.training.schedules import TriStage

EXTRAS = FIXTURES / "extras"


class OneBatch:
    """A loader of one batch that comes at each update."""

    updates_per_epoch = 1

    def epoch(self, epoch, first_update=0):
        yield SimpleNamespace(batch=[0], epoch=epoch, update=epoch, micro=0, last=True, bad=())


class Recorded(Brain):
    """Runs the recorded batch with the recorded draws, shifted by one at each update as the recording says."""

    def on_fit_start(self):
        self.seen = []

    def compute_forward(self, batch, stage):
        inputs, draws = self.hparams.inputs, self.hparams.draws
        raw = self.hparams.raw.roll(self.update, 1)
        own = torch.arange(draws.masked).repeat_interleave(raw.shape[1] // draws.masked)
        negatives = (raw + (raw >= own).long()).view(draws.batch * draws.masked, -1)
        # the rows of the noise are those of (frames, groups) one after the other
        noise = draws.noise.flatten(0, 1).roll(self.update, 0).view_as(draws.noise)
        return self.modules.model(
            inputs.waveforms,
            inputs.lengths,
            rng=self.rng,
            update=self.update,
            time_mask=draws.mask,
            negatives=negatives,
            gumbel_noise=noise,
        )

    def compute_objectives(self, out, batch, stage):
        self.out = out
        return Objective(out.loss_sum, out.num_masked)

    def on_update_end(self, result):
        model = self.modules.model
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.seen.append(
            {
                "loss_sum": float(result.loss_sum),
                "sample_size": float(result.count),
                "lr": max(group["lr"] for group in self.optimizer.param_groups),
                "grad_norm_before_clip": float(result.grad_norm),
                "prob_perplexity": float(self.out.prob_perplexity.sum()),
                "code_perplexity": float(self.out.code_perplexity.sum()),
                "temp": self.out.temperature,
                "correct": float(self.out.correct),
                "count": float(len(self.out.logits)),
                "num_updates_at_forward": result.update,
                "weights": export_tensors(names_table("wav2vec2_pretraining", model.config), weights),
            }
        )


def trained(case, plain):
    """(what is recorded, its tensors, what our Brain saw at each update)."""
    recorded = json.loads((EXTRAS / f"train_{case}.json").read_text())
    recording = read_recording(FIXTURES / case)
    setup, measured = Setup(resolve_device("cpu"), "fp32", plain), Measured()
    model = prepare(load_pretrained(FIXTURES / case / "checkpoint.pt")[0], setup)
    inputs = Inputs(recording, model.encoder, setup, measured)
    options = recorded["optimizer"]
    brain = Recorded(
        {"model": model},
        functools.partial(FairseqAdamW, lr=0.002, **{name: options[name] for name in ("betas", "eps", "weight_decay")}),
        {
            "inputs": inputs,
            "draws": Draws(recording, model, inputs, measured),
            "raw": recording.tensors["rand.neg_raw"],
        },
        {"max_updates": len(recorded["updates"]), "max_grad_norm": options["clip_norm"], "precision": "fp32"},
        schedule=TriStage(warmup=2, hold=4, decay=10, init_factor=0.01, final_factor=0.05),
    )
    brain.fit(OneBatch())
    return recorded, load_file(EXTRAS / f"train_{case}.safetensors"), brain.seen


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("case", ["w2v2_pretrain_groupnorm", "w2v2_pretrain_layernorm"])
def test_four_updates(case, plain):
    """The recording asks for 1e-4 of the loss and 2e-5 of the weights; a tenth of it is held."""
    recorded, tensors, seen = trained(case, plain)
    assert len(seen) == len(recorded["updates"]) == 4
    for ours, theirs in zip(seen, recorded["updates"], strict=True):
        assert ours.keys() >= theirs.keys()
        for name, value in theirs.items():
            rel = 1e-12 if name in ("lr", "temp") else 1e-5
            assert ours[name] == pytest.approx(value, rel=rel), name
    compared = 0
    for name, theirs in tensors.items():
        group, _, parameter = name.partition(".")
        update = 3 if group == "final" else int(group.removeprefix("student_after"))
        torch.testing.assert_close(seen[update]["weights"][parameter], theirs, rtol=0, atol=2e-6, msg=name)
        compared += 1
    assert compared == len(tensors) > 12


def steps_of(optimizer_class, **options):
    """The largest difference from the recorded parameters, after each of the recorded steps."""
    settings = json.loads((EXTRAS / "adam.json").read_text())
    tensors = load_file(EXTRAS / "adam.safetensors")
    modules = torch.nn.ParameterDict({name: tensors[f"{name}.step0"].clone() for name in ("p0", "p1")})
    make = functools.partial(
        optimizer_class, lr=1.0, betas=settings["betas"], eps=settings["eps"], weight_decay=settings["weight_decay"],
        **options,
    )  # fmt: skip
    optimizer, differences = build_optimizer(modules, make), []
    for step, rate in enumerate(settings["lr_per_step"], start=1):
        set_learning_rates(optimizer, rate)
        for name, parameter in modules.items():
            parameter.grad = tensors[f"{name}.grad{step}"].clone()
        optimizer.step()
        pairs = [(parameter.detach(), tensors[f"{name}.step{step}"]) for name, parameter in modules.items()]
        differences.append(max(float((ours - theirs).abs().max()) for ours, theirs in pairs))
    assert len(differences) == 5
    return differences


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "single"])
def test_five_steps_of_the_optimizer(options):
    assert max(steps_of(FairseqAdamW, **options)) <= 3e-7


def test_epsilon_is_what_the_two_optimizers_differ_in():
    """Gradients of 1e-6, as large as epsilon: the formula written out, and how far torch's own is from it."""
    gradient, rate, betas, eps = torch.tensor([1e-6, -3e-6, 2e-5], dtype=torch.float64), 0.01, (0.9, 0.98), 1e-6
    results = {}
    for optimizer_class in (FairseqAdamW, torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = optimizer_class([weight], lr=rate, betas=betas, eps=eps, weight_decay=0.0)
        for step in (1, 2, 3):
            weight.grad = gradient * step
            optimizer.step()
        results[optimizer_class] = weight.detach()
    weight, first, second = torch.zeros(3, dtype=torch.float64), 0.0, 0.0
    for step in (1, 2, 3):
        first = betas[0] * first + (1 - betas[0]) * gradient * step
        second = betas[1] * second + (1 - betas[1]) * (gradient * step) ** 2
        size = rate * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
        weight = weight - size * first / (second.sqrt() + eps)
    torch.testing.assert_close(results[FairseqAdamW], weight, rtol=1e-12, atol=0)
    assert float((results[torch.optim.AdamW] - weight).abs().max()) > 0.005


def test_a_resume_goes_on_with_the_same_epsilon():
    def run(steps, state=None, weight=0.0):
        parameter = torch.nn.Parameter(torch.full((2,), weight))
        optimizer = FairseqAdamW([parameter], lr=0.1, eps=0.1)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            parameter.grad = torch.ones(2)
            optimizer.step()
        return parameter, optimizer.state_dict()

    half, state = run(3)
    resumed, _ = run(4, state, float(half[0].detach()))
    assert torch.equal(resumed, run(7)[0])
