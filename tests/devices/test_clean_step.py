"""A training step asks its device for nothing, and makes the same graph for every batch of one shape.

What is not seen from outside of an operation (CTC's own kernel, collectives) is named in docs/speed.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("clean_step.py")
TASKS = ("wav2vec2", "data2vec_audio", "ctc", "data2vec_text")

TOLERANCE = 2e-5
"""Relative, of each gradient's norm: the two ways add in another order."""


def run(standin: dict[str, str], part: str) -> dict[str, Any]:
    """What a part of the program printed."""
    command = [sys.executable, "-W", "ignore", str(PROGRAM), part]
    done = subprocess.run(command, env=standin, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.fixture(scope="module")
def steps(standin: dict[str, str]) -> dict[str, Any]:
    """Steps of all tasks, watched."""
    return run(standin, "steps")


def test_no_step_waits_for_the_device(steps):
    """No number is read, no shape hangs on values, no copy waits; with fp16's scale and with layerdrop, too."""
    assert {name.split()[0] for name in steps} == set(TASKS)
    for name, result in steps.items():
        assert result["waits"] == [], name


def test_every_update_of_one_shape_makes_the_same_operations(steps):
    """So a device may compile it once, or record it: nothing but the numbers differs. (Layerdrop leaves blocks out.)"""
    for name, result in steps.items():
        assert min(result["operations"]) > 500, name
        assert result["same"] or result["layerdrop"], name


def test_the_general_way_gives_the_numbers_of_the_cpu(standin):
    """Rows that fill up have no part in losses, gradients and metrics."""
    for name, result in run(standin, "numbers").items():
        assert result["compared"] > 20 and result["largest"] < TOLERANCE, (name, result)


def test_one_graph_for_each_bucket(standin):
    """All are made in the first update, which sees both shapes, whatever layerdrop leaves out; none breaks."""
    for task, result in run(standin, "graphs").items():
        # Forward of layers, and of the convolutions for speech; data2vec's teacher runs layers in evaluation.
        kinds = 1 + (task != "data2vec_text") + task.startswith("data2vec")
        assert Counter(result["made"]) == {0: 2 * kinds}, (task, result)
        assert result["breaks"] == {}, (task, result)
