"""What is run with several processes: the kinds of tests/faults, shortened, and which combinations by default."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.real_runs import Ended, environment
from tests.faults.test_exact_resume import KINDS, Kind, largest_difference, rows_of, weights_of

__all__ = ["KINDS", "Kind", "largest_difference", "rows_of", "weights_of"]

MODELS = ("pretraining", "ctc", "data2vec, step", "data2vec of text, step")
UPDATES = 5
"""The fourth ends an epoch of speech, with fewer micro-batches than ranks in the larger worlds."""

WHOLE = os.environ.get("DISTRIBUTED_MATRIX") == "whole"
"""Every combination (`make distributed`), or a few of them."""

MATRIX = [(name, parallel, processes) for name in MODELS for parallel in ("ddp", "fsdp2") for processes in (2, 4)]
FEW = [
    ("pretraining", "fsdp2", 2),
    ("ctc", "ddp", 4),
    ("ctc", "fsdp2", 2),
    ("data2vec, step", "fsdp2", 4),
    ("data2vec of text, step", "fsdp2", 2),
]
"""Two processes of ddp are compared in tests/faults/test_exact_resume.py."""


def run(kind: Kind, folder: Path, *, processes: int = 1, **keys: Any) -> Ended:
    """A short run; a rank that waits for ever ends with an error after a minute."""
    return kind.run(folder, processes=processes, **{"max_updates": UPDATES, "distributed_timeout_minutes": 1, **keys})


def largest_relative_difference(found: Path, expected: Path, names: Sequence[str] = ("loss",)) -> float:
    """Between the values of any row of the log, training or validation."""
    ours, theirs = rows_of(found), rows_of(expected)
    assert [(row.get("stage"), row["update"]) for row in ours] == [(row.get("stage"), row["update"]) for row in theirs]
    return max(
        abs(mine[name] - other[name]) / abs(other[name])
        for mine, other in zip(ours, theirs, strict=True)
        for name in names
        if other.get(name)
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_rank(script: Path, words: Sequence[str], *, rank: int, size: int, port: int, log: Path) -> subprocess.Popen:
    """One rank as its own process, with the variables that a launcher would set."""
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port)}  # fmt: skip
    with open(log, "w", encoding="utf-8") as file:
        return subprocess.Popen([sys.executable, str(script), *words], env=environment() | places, stdout=file,
                                stderr=file)  # fmt: skip


def kill(process: subprocess.Popen) -> None:
    """Also one that was stopped."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
