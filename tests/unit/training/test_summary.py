"""The end of a run in numbers."""

import json

import torch
from torch import nn

from toolkit.training.brain import Brain
from toolkit.training.summary import describe_modules, format_summary, summarize, write_summary


def test_a_brain_is_summed_up_with_all_keys(tmp_path):
    brain = Brain({"model": nn.Linear(3, 2)}, run_opts={"precision": "fp32"})
    brain.progress.update, brain.progress.epoch = 12, 3
    brain.progress.amount, brain.progress.train_seconds = 100.0, 4.0
    values = summarize(brain)
    assert values["updates"] == 12 and values["epochs"] == 3 and values["parameters"] == 8
    assert values["throughput"] == {"value": 25.0, "unit": "audio seconds per second"}
    assert values["peak_memory_gb"] > 0.05 and values["best"] is None and values["precision"] == "fp32"
    path = write_summary(tmp_path, {**values, "test_wer": float("inf")})
    assert json.loads(path.read_text())["test_wer"] is None


def test_the_table_is_for_people():
    text = format_summary({"throughput": {"value": 7.25, "unit": "audio seconds per second"}, "final": {"train": {}},
                           "best": {"update": 5, "wer": 12.5}, "test_wer": 3.14159})  # fmt: skip
    assert text.splitlines() == [
        "throughput            7.25 audio seconds per second",
        "best                  update 5, wer 12.5",
        "test_wer              3.142",
    ]


def test_modules_are_counted():
    frozen = nn.Linear(10, 10)
    frozen.weight.requires_grad_(False)
    assert describe_modules(nn.ModuleDict({"head": frozen})).splitlines()[1].split() == ["head", "110", "10"]
    assert torch.is_tensor(frozen.weight)
