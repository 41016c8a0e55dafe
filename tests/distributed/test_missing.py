"""A process that does not come ends the others with its name and place, in time."""

from __future__ import annotations

import signal
import time

import pytest

from tests.distributed.matrix import KINDS, free_port, kill, start_rank


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
