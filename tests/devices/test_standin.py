"""The product on a device that is not the CPU: a stand-in npu with its own memory, loaded as a vendor's plugin is.

What this proves and what it cannot is said in docs/devices.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.devices.conftest import drive, job
from tests.faults.real_runs import PRETRAINING, TEMPLATE, command_line, digits_words, pretraining_words

LOSS_TOLERANCE = 1e-5
"""Relative. On the CPU the packed, batched forms of toolkit.nn.fast run, on other devices the plain formulas over
padded batches: the same sums in another order. Seen: 7e-7."""
NORM_TOLERANCE, LATER_NORM_TOLERANCE = 5e-5, 2e-3
"""Relative, of gradient norms: in the first update, and when Adam, which divides by a gradient's own size, has turned
differences of rounding in the smallest ones into steps. Seen: 9e-6 and 6e-4."""
BF16_TOLERANCE = 1e-2
"""Relative, between bfloat16 (8 bits) and float32. Seen: 2e-3."""

HOST_INTEGERS = {
    "sum", "max", "min", "clamp", "eq", "all", "sub", "add", "floor_divide", "lt", "any", "full", "new_zeros",
    "index_put_", "_local_scalar_dense",
}  # fmt: skip
"""Arithmetic of lengths and of the places of negatives (int64, bool), which the host makes itself."""
HOST_COPIES = {"lift_fresh", "is_pinned"}
"""What comes from NumPy on its way to the device."""
HOST_CTC = {
    "_ctc_loss float32", "_ctc_loss_backward float32", "transpose float32", "detach float32", "eq float32",
    "where bool", "sum float32", "expand float32",
}  # fmt: skip
"""CTC on purpose, forward and backward."""

Outcome = Callable[[str], dict[str, Any]]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of training."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "lr" in row]


def assert_same_curve(found: Path, expected: Path) -> None:
    ours, theirs = rows(found), rows(expected)
    assert [row["update"] for row in ours] == [row["update"] for row in theirs] == [1, 2, 3, 4]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=LOSS_TOLERANCE)
        tolerance = NORM_TOLERANCE if one["update"] == 1 else LATER_NORM_TOLERANCE
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=tolerance)
    # By then the weights have gone the same way too.
    mine, reference = (load_file(folder / "model" / "model.safetensors") for folder in (found, expected))
    assert mine.keys() == reference.keys()
    apart = sum(float((mine[name] - reference[name]).square().sum()) for name in mine) ** 0.5
    assert apart < 1e-4 * sum(float(tensor.square().sum()) for tensor in reference.values()) ** 0.5


@pytest.mark.parametrize("recipe", ["pretraining", "finetuning", "data2vec"])
def test_a_recipe_learns_on_it_what_it_learns_on_the_cpu(outcome: Outcome, recipe: str) -> None:
    found, expected = outcome(f"{recipe}_npu"), outcome(f"{recipe}_cpu")
    assert "npu:0 (stand-in), precision fp32, 1 process" in found["log"]
    assert_same_curve(found["folder"], expected["folder"])


@pytest.mark.parametrize(("recipe", "allowed"), [("pretraining", set()), ("finetuning", HOST_CTC), ("data2vec", set())])
def test_nothing_of_a_step_is_silently_computed_on_the_host(outcome: Outcome, recipe: str, allowed: set[str]) -> None:
    seen = outcome(f"{recipe}_npu")
    names = {name.removeprefix("aten::") for name in seen["host"]}
    computed = {name for name in names if name.split()[0] not in HOST_COPIES}
    assert {name for name in computed if name.split()[0] not in HOST_INTEGERS or "float" in name} <= allowed
    assert allowed <= computed
    assert seen["fallbacks"] == []
    # What comes back: the log probabilities and tokens for CTC, nothing else.
    micro_batches = 7
    assert seen["transfers"].get("to host", 0) == (2 * micro_batches if allowed else 0)
    assert seen["places"] == ["cpu", "npu:0"]


@pytest.mark.parametrize(("run", "recipe"), [("npu_to_cpu", "pretraining_npu"), ("cpu_to_npu", "finetuning_cpu")])
def test_a_checkpoint_goes_on_on_another_device(outcome: Outcome, run: str, recipe: str) -> None:
    assert outcome(run)["code"] == 75
    resumed = outcome(f"{run}_resumed")
    assert resumed["code"] == 0 and "resumed at update 2" in resumed["log"]
    assert_same_curve(resumed["folder"], outcome(recipe)["folder"])


def test_bf16_autocast(outcome: Outcome) -> None:
    seen = outcome("bf16")
    assert "precision bf16" in seen["log"] and "torch.bfloat16" in seen["device_formats"]
    for one, other in zip(rows(seen["folder"]), rows(outcome("pretraining_npu")["folder"]), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=BF16_TOLERANCE) and one["loss"] != other["loss"]


def test_fp16_with_the_scaler(outcome: Outcome) -> None:
    """The scale comes down from 128 until gradients of summed losses fit; then updates are made."""
    seen = outcome("fp16")
    assert "torch.float16" in seen["device_formats"] and seen["fallbacks"] == []
    found = rows(seen["folder"])
    assert found[0]["loss_scale"] == 64 and found[0]["grad_norm"] is None
    assert found[-1]["loss_scale"] == found[-2]["loss_scale"] < 64 and found[-1]["grad_norm"] > 0
    start = load_file(outcome("pretraining_npu")["folder"] / "model" / "model.safetensors")
    end = load_file(seen["folder"] / "model" / "model.safetensors")
    name = next(name for name in end if name in start and name.endswith("fc1.weight"))
    assert torch.isfinite(end[name]).all() and not torch.equal(end[name], start[name])


def test_the_second_device_without_a_fused_optimizer(standin: dict[str, str], tmp_path: Path) -> None:
    """npu:1 of two, an AdamW that is missing there, a worker, pinned memory, validation and test with decoding."""
    values = {**standin, "NPU_STANDIN_DEVICES": "2", "NPU_STANDIN_MISSING": "aten::_fused_adamw_"}
    keys = {"max_updates": 4, "log_interval": 1, "num_workers": 1}
    # An accelerator draws its dropout itself.
    keys |= {"encoder_training.dropout": 0, "encoder_training.attention_dropout": 0}
    seen = drive(values, tmp_path, {
        "npu": job(TEMPLATE, digits_words(tmp_path / "npu", device="npu:1", **keys)),
        "cpu": job(TEMPLATE, digits_words(tmp_path / "cpu", device="cpu", **keys), watch=False),
    })  # fmt: skip
    assert seen["npu"]["code"] == seen["cpu"]["code"] == 0, seen["npu"]["log"][-4000:]
    assert seen["npu"]["places"] == ["cpu", "npu:1"] and seen["npu"]["fallbacks"] == []
    assert "fused_optimizer falls back to the CPU (aten::_fused_adamw_ has no kernel); the optimizer runs unfused" in (
        seen["npu"]["log"]
    )
    assert_same_curve(tmp_path / "npu", tmp_path / "cpu")
    ours, theirs = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("npu", "cpu"))
    assert ours["device"] == "npu:1 (stand-in)" and ours["test_wer"] == theirs["test_wer"]


# ------------------------------------------------------------------------------------- the plugin and the command line


def run(values: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=values, capture_output=True, text=True, timeout=300)


def test_auto_takes_it_by_the_real_command(standin: dict[str, str], tmp_path: Path) -> None:
    words = pretraining_words(tmp_path / "auto", device="auto", precision="auto")
    done = run(standin, *command_line(PRETRAINING, words))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "npu:0 (stand-in), precision bf16" in done.stderr
    assert "Operators: ctc_loss falls back to the CPU (aten::_ctc_loss" in done.stderr
    assert "it is computed on the host in float32, and its gradient comes back" in done.stderr
    assert "CAUTION" not in done.stderr  # the plugin's own words where something falls back


@pytest.mark.parametrize("autoload", ["1", "0"])
def test_the_report_finds_the_plugin(standin: dict[str, str], autoload: str) -> None:
    """Loaded by torch's entry points, or, where these are switched off, by its name."""
    values = {**standin, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    done = run(values, sys.executable, "-m", "toolkit", "devices", "npu", "--seconds", "0.01")
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "npu:0 (stand-in): Huawei Ascend"
    assert lines[1].startswith("  Python ") and lines[1].endswith(", torch_npu 0.0+standin, CANN 8.3.RC1, driver 25.2")
    assert "HF32 off" in done.stdout and "ctc_loss falls back" in done.stdout
    assert lines[-2].startswith("  float32   product ") and lines[-1].startswith("  bfloat16  product ")


def test_a_broken_plugin(standin: dict[str, str]) -> None:
    """Torch itself names the backend and the way around; with that, the product says what is wrong with it."""
    values = {**standin, "NPU_STANDIN_BROKEN": "1"}
    broken = run(values, sys.executable, "-c", "import torch")
    assert broken.returncode and "Failed to load the backend extension: torch_npu" in broken.stderr
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in broken.stderr
    values["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    done = run(values, sys.executable, "-m", "toolkit", "devices", "npu")
    assert done.returncode == 1
    assert done.stdout.startswith(
        "npu (Huawei Ascend) is not here, because torch_npu cannot be imported (libascendcl.so: cannot open shared "
        "object file: No such file or directory).\nIt needs Ascend CANN, then pip install "
    )


STRICT = """
import json, torch
from tests.devices.drive import Watch
said = []
def refused(act):
    try:
        act()
    except RuntimeError as error:
        said.append(str(error))
here = torch.ones(3, device="npu")
refused(lambda: here + torch.ones(3))
refused(lambda: torch.cat([here, torch.ones(3)]))
refused(lambda: here[torch.tensor([0, 2])])
refused(lambda: torch.randn(2, device="npu", generator=torch.Generator()))
with Watch() as watch:
    (here.cpu() * 2).to("npu")
pinned = torch.ones(3).pin_memory()
view = torch.ones(2, 3, device="npu")
view[:, 1:] *= torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to("npu")
assert view.tolist() == [[1.0, 1.0, 2.0], [1.0, 3.0, 4.0]]
print(json.dumps([said, watch.as_dict(), (here + 1.0).tolist(), pinned.is_pinned(), torch.ones(3).is_pinned()]))
"""


def test_the_stand_in_is_as_strict_as_a_device(standin: dict[str, str]) -> None:
    """Else the runs above would prove nothing; and what is computed on the host is seen."""
    done = run(standin, sys.executable, "-c", STRICT)
    assert done.returncode == 0, done.stderr
    said, watched, numbers, pinned, plain = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 4 and all("same device" in sentence for sentence in said[:3]) and "generator" in said[3]
    assert watched["host"] == {"aten::mul float32": 1}
    assert watched["transfers"] == {"to host": 1, "to device": 1} and watched["places"] == ["cpu", "npu:0"]
    assert numbers == [2.0, 2.0, 2.0] and pinned and not plain


def test_bad_devices_are_one_sentence(standin: dict[str, str], tmp_path: Path) -> None:
    words = pretraining_words(tmp_path / "out", device="npu:3")
    done = run(standin, *command_line(PRETRAINING, words))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: --device npu:3 does not exist: this machine has 1 (npu:0 to npu:0)."
    )
    assert not (tmp_path / "out").exists()
