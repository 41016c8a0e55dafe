"""The stand-in npu, built once per session, and the runs on it that several tests look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.devices.building import STANDIN
from tests.faults.real_runs import (
    ASR,
    DATA2VEC,
    PRETRAINING,
    ROOT,
    asr_words,
    data2vec_words,
    environment,
    pretraining_words,
)

FOLDER = Path(__file__).parent

collect_ignore = ["standin"]  # no tests: a plugin, which torch imports where it is on the path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "devices"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def standin(shared: Path) -> dict[str, str]:
    """The environment of a process that has the stand-in: its plugin is found as an installed one would be."""
    with FileLock(str(shared / "build.lock")):
        command = [sys.executable, str(FOLDER / "building.py"), str(shared / "build")]
        built = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, timeout=600)
        assert built.returncode == 0, f"the stand-in needs a C++ compiler and ninja\n{built.stderr[-6000:]}"
    library = built.stdout.splitlines()[-1]
    return {**plain_environment(), "PYTHONPATH": f"{ROOT}{os.pathsep}{STANDIN}", "NPU_STANDIN_LIBRARY": library}


def plain_environment() -> dict[str, str]:
    """A process without the stand-in, whatever the surrounding shell has set."""
    values = {name: value for name, value in environment().items() if not name.startswith("NPU_STANDIN")}
    values.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    return {**values, "PYTHONPATH": str(ROOT)}


def job(script: Path, words: Sequence[str], *, stop: int | None = None, watch: bool = True) -> dict[str, Any]:
    """A run for `drive`."""
    return {"script": str(script), "words": [str(word) for word in words], "stop": stop, "watch": watch}


def drive(values: Mapping[str, str], folder: Path, jobs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Make the runs, one after the other in one process; name to how each ended and what was seen in its steps."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())), encoding="utf-8")
    command = [sys.executable, str(FOLDER / "drive.py"), str(folder / "jobs.json"), str(folder / "results.json")]
    done = subprocess.run(command, env=dict(values), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return dict(zip(jobs, json.loads((folder / "results.json").read_text(encoding="utf-8")), strict=True))


@pytest.fixture(scope="session")
def outcome(shared: Path, standin: dict[str, str]) -> Callable[[str], dict[str, Any]]:
    """How a run ended, by its name in `_jobs`, with the folder that it wrote to; all are made at the first question."""
    folder = shared / "runs"
    with FileLock(str(shared / "runs.lock")):
        if not (folder / "results.json").exists():
            drive(standin, folder, _jobs(folder))
    results = dict(zip(_jobs(folder), json.loads((folder / "results.json").read_text(encoding="utf-8")), strict=True))

    def ask(name: str) -> dict[str, Any]:
        result = results[name]
        assert result["code"] in (0, 75), result["log"][-4000:]
        return {**result, "folder": folder / name.removesuffix("_resumed")}

    return ask


def _jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """The recipes on the stand-in and on the CPU; two begin on one of them and end on the other."""
    few = {"max_updates": 4, "log_interval": 1}
    pretrained = {"pretrained": folder / "pretraining_npu" / "model", "reset_layers": 0}

    def pretraining(name: str, device: str, **keys: Any) -> list[str]:
        return pretraining_words(folder / name, device=device, **{**few, **keys})

    def finetuning(name: str, device: str, **keys: Any) -> list[str]:
        return asr_words(folder / name, device=device, **{**few, **pretrained, **keys})

    return {
        "pretraining_npu": job(PRETRAINING, pretraining("pretraining_npu", "npu")),
        "pretraining_cpu": job(PRETRAINING, pretraining("pretraining_cpu", "cpu"), watch=False),
        "npu_to_cpu": job(PRETRAINING, pretraining("npu_to_cpu", "npu"), stop=2),
        "npu_to_cpu_resumed": job(PRETRAINING, pretraining("npu_to_cpu", "cpu"), watch=False),
        "finetuning_npu": job(ASR, finetuning("finetuning_npu", "npu")),
        "finetuning_cpu": job(ASR, finetuning("finetuning_cpu", "cpu"), watch=False),
        "cpu_to_npu": job(ASR, finetuning("cpu_to_npu", "cpu"), stop=2, watch=False),
        "cpu_to_npu_resumed": job(ASR, finetuning("cpu_to_npu", "npu")),
        "data2vec_npu": job(DATA2VEC, data2vec_words(folder / "data2vec_npu", device="npu", **few)),
        "data2vec_cpu": job(DATA2VEC, data2vec_words(folder / "data2vec_cpu", **few), watch=False),
        "bf16": job(PRETRAINING, pretraining("bf16", "npu", precision="bf16")),
        "fp16": job(ASR, finetuning("fp16", "npu", precision="fp16", max_updates=16)),
    }
