"""The benchmarks run and say what they promise; what they measure is not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"ours", "peer", "ratio", "tuned_peer", "tuned_ratio", "unit", "precision", "peak_memory_gb"}


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--size", "tiny", "--seconds", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)


def test_last_line_is_the_result():

    done = run("--peer", "transformers", "--rounds", "1", "--warmup", "1", "--precision", "bf16", "--threads", "1")
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) >= KEYS | {"peer_peak_memory_gb"}
    assert result["precision"] == "bf16"
    for key in ("ours", "peer", "tuned_peer", "ratio", "tuned_ratio", "peak_memory_gb", "peer_peak_memory_gb"):
        assert result[key] > 0
    assert "transformers, as installed" in done.stdout


def test_without_a_peer():
    result = json.loads(run("--peer", "none", "--rounds", "1", "--warmup", "0").stdout.splitlines()[-1])
    assert result["ours"] > 0 and result["peer"] is None and result["ratio"] is None


def test_work_of_base():
    """Counted by hand, without layerdrop: 14.7 GFLOP a second for the convolutions, 29.7 for the rest at 499 frames."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from step_variants import Size
    finally:
        sys.path.pop(0)
    assert Size(layerdrop=0.0).gflop(1, 160000) / 10 == pytest.approx(44.4, rel=0.005)


def test_the_loop_of_the_recipe_beside_the_bare_step():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "loop.py"), "--size", "tiny", "--hparams", "w2v2_tiny.yaml",
               "--seconds", "1", "--updates", "2", "--warmup", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["walls"]["loop"]) == len(result["walls"]["step"]) == 2
    assert result["loop"] > 0 and result["step"] > 0 and 0 < result["share"]


def test_what_a_checkpoint_costs(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint.py"), "--size", "tiny", "--seconds", "1",
               "--batch", "1", "--rounds", "2", "--folder", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["walls"]["waits_held"]) == len(result["walls"]["background_held"]) == 2
    for way in ("waits", "background"):
        assert result[way]["held_seconds"] > 0 and 0 < result[way]["share_15_minutes"] < 1
        assert 0 < result[way]["share_100_updates"] < 1
    assert result["checkpoint_bytes"] > 0 and not list(tmp_path.iterdir())
