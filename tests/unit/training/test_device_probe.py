"""Trying operators: what a device has, what falls back, what is refused, what is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from toolkit.training import device_probe
from toolkit.training.device_probe import CANDIDATES, Candidate, has_kernel, registered_at, try_device, try_operators
from toolkit.training.devices import Device, device_kind, resolve_device

CPU = torch.device("cpu")


def test_the_cpu_has_all_of_them():
    assert len({candidate.name for candidate in CANDIDATES}) == len(CANDIDATES) >= 6
    assert try_operators(CPU).reasons == {}


def test_rows_without_a_trial_stay_as_they_are():
    device = resolve_device("cpu")
    assert try_device(device) == (device, [])


def probed_cpu() -> Device:
    """The CPU as a kind that is tried; its row expects CTC to be missing."""
    kind = dataclasses.replace(device_kind("cpu"), probed=True, host_operations=("ctc_loss",))
    return Device(kind, CPU, kind.host_operations)


def test_what_was_tried_replaces_what_was_expected():
    device, said = try_device(probed_cpu())
    assert not device.on_host("ctc_loss") and not device.host_operations
    assert said == [f"Operators: {device.name} has all {len(CANDIDATES)} tried."]


def answers(*results):
    """A candidate that gives these in turn, the CPU's first; an error is raised."""
    left = list(results)

    def run(draw):
        result = left.pop(0)
        if isinstance(result, Exception):
            raise result
        return [torch.tensor(result)]

    return run


@pytest.mark.parametrize(
    ("second", "instead", "sentence"),
    [
        (NotImplementedError("no 'Long'\nand more"), "it is left", "is refused by cpu (no 'Long'); it is left."),
        ([1.0, float("nan")], "it is left", "is wrong on cpu (off by nan of the CPU's result); it is left."),
        (
            [1.0, 2.3],
            "",
            "is wrong on cpu (off by 1e-01 of the CPU's result); it stays where torch puts it, and slows every step "
            "down.",
        ),
    ],
)
def test_the_reasons(monkeypatch, second, instead, sentence):
    candidate = Candidate("tried", answers([1.0, 2.0], second), instead)
    monkeypatch.setattr(device_probe, "CANDIDATES", (candidate,))
    device, said = try_device(probed_cpu())
    assert device.host_operations == ("tried",) and said == [f"Operators: tried {sentence}"]


def test_a_missing_kernel_is_seen_in_torchs_own_table(monkeypatch):
    monkeypatch.setattr(device_probe, "has_kernel", lambda name, device_type: "ctc" not in name)
    device, said = try_device(probed_cpu())
    assert device.host_operations == ("ctc_loss",) and device.on_host("ctc_loss")
    assert said[0].startswith("Operators: ctc_loss falls back to the CPU (aten::_ctc_loss")
    assert said[0].endswith("have no kernel); it is computed on the host in float32, and its gradient comes back.")


@pytest.mark.parametrize(
    ("operator", "here", "there"),
    [("aten::_ctc_loss", True, False), ("aten::add.Tensor", True, True), ("aten::transpose.int", True, True)],
)
def test_kernels(operator, here, there):
    """A build of torch without Gaudi has no kernels for it, only what torch takes apart itself."""
    assert has_kernel(operator, "cpu") is here and has_kernel(operator, "hpu") is there


def test_a_kernel_that_only_passes_on_is_none(monkeypatch):
    assert "RegisterCPU" in registered_at("aten::_ctc_loss", "CPU")
    monkeypatch.setattr(device_probe, "registered_at", lambda operator, key: "aten/src/xpu/XPUFallback.template:12")
    assert not has_kernel("aten::_ctc_loss", "cpu")
