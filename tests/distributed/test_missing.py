"""A process that does not come ends the others with its name and place, in time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.distributed.matrix import KINDS, free_port, kill, start_rank
from tests.faults.injections import children_of
from tests.faults.real_runs import environment


def test_on_one_node_the_launcher_names_the_first_process_too(tmp_path):
    """It keeps the list itself there."""
    kind, folder, log = KINDS["ctc"], tmp_path / "run", tmp_path / "log"
    words = kind.words(folder, max_updates=10**6, distributed_timeout_minutes=0.25, valid_interval_updates=10**6,
                       ckpt_interval_updates="null")  # fmt: skip
    launcher = [sys.executable, "-m", "toolkit.launch", "--standalone", "--nproc-per-node=2"]
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([*launcher, str(kind.script), *words], env=environment(), stdout=file, stderr=file)
    ranks = []
    try:
        rows, deadline = folder / "metrics.jsonl", time.monotonic() + 120
        while not (rows.exists() and len(rows.read_text().splitlines()) >= 2):
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.01)
        ranks = children_of(process.pid)[-2:]
        os.kill(ranks[0], signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while "error: process 1 of 2 could not " not in log.read_text(encoding="utf-8"):
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.05)
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        kill(process)
    assert "process 0, whose last sign of life came from update " in log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("stopped", "parallel", "said"),
    [
        (1, "ddp", "process 1, whose last sign of life came from"),
        # the first process keeps the list itself where no launcher does
        (0, "fsdp2", "did not come within 0.25 minutes"),
    ],
)
def test_a_process_that_stands_still_is_named(tmp_path, stopped, parallel, said):
    kind, port, waiting = KINDS["ctc"], free_port(), 1 - stopped
    folder = tmp_path / "run"
    words = kind.words(folder, max_updates=10**6, distributed_timeout_minutes=0.25, parallel=parallel,
                       valid_interval_updates=10**6, ckpt_interval_updates="null")  # fmt: skip
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    ranks = [start_rank(kind.script, words, rank=r, size=2, port=port, log=logs[r]) for r in (0, 1)]
    try:
        rows, deadline = folder / "metrics.jsonl", time.monotonic() + 120
        while not (rows.exists() and len(rows.read_text().splitlines()) >= 2):
            assert time.monotonic() < deadline and ranks[0].poll() is None, logs[0].read_text()[-2000:]
            time.sleep(0.01)
        ranks[stopped].send_signal(signal.SIGSTOP)
        code = ranks[waiting].wait(60)
    finally:
        for rank in ranks:
            kill(rank)
    error = f"\n{logs[waiting].read_text(encoding='utf-8')}".rpartition("\nerror: ")[2]
    assert code > 0, error
    assert error.startswith(f"process {waiting} of 2 could not ") and " in update " in error.partition(":")[0], error
    assert said in error and "--distributed_timeout_minutes" in error
    assert "Traceback" not in error
