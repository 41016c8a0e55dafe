"""What ends a real run before its time does not cost what was trained: Ctrl-C, too much bad audio."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.real_runs import (
    TEMPLATE,
    Ended,
    command_line,
    digits,
    digits_words,
    environment,
    run_here,
    write_rows,
)


def interrupted(words: list[str], reached: Path, *, processes: int = 1) -> Ended:
    """The command with Ctrl-C as a terminal sends it, to all of its processes, as soon as a file is there."""
    process = subprocess.Popen(
        command_line(TEMPLATE, words, processes), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
        # as at a terminal: a shell that runs the tests in the background has them, and their children, ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not reached.exists():
            assert time.monotonic() < deadline, "the run did not come so far"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Ended(process.returncode, stderr, stdout)


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    words = digits_words(tmp_path / "run", max_updates=100000, valid_interval_updates=100000, num_workers=2)
    ended = interrupted(words, tmp_path / "run" / "metrics.jsonl")
    assert ended.code == 130 and "Traceback" not in ended.stderr, ended.stderr
    (path,) = (tmp_path / "run" / "save").glob("step_*")
    update = int(path.name.removeprefix("step_"))
    last = ended.stderr.strip().splitlines()[-1]
    assert last == f"interrupted: saved at update {update} in {path.parent}; run the same command again to go on."
    again = run_here(TEMPLATE, [*words, f"--max_updates={update + 1}"])
    assert again.code == 0 and f"resumed at update {update} " in again.stderr


def test_ctrl_c_under_torchrun_saves(tmp_path: Path) -> None:
    # The launcher passes on what the terminal has sent to all: that is no second Ctrl-C.
    words = digits_words(tmp_path / "run", max_updates=100000, valid_interval_updates=100000)
    ended = interrupted(words, tmp_path / "run" / "metrics.jsonl", processes=2)
    assert ended.code != 0
    assert len(list((tmp_path / "run" / "save").glob("step_*"))) == 1, ended.stderr
    assert "interrupted: saved at update " in ended.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_too_much_bad_audio_in_training_saves_what_was_trained(tmp_path: Path, workers: int) -> None:
    def damage(rows: list[dict[str, str]]) -> None:
        for row in rows[:2]:
            row["wav"] = str(write_bytes(tmp_path / f"{row['ID']}.wav", b"no audio"))

    manifest = write_rows(tmp_path / "train.csv", digits(damage))
    words = digits_words(
        tmp_path / "run", train_manifest=manifest, max_updates=40, valid_interval_updates=100, max_bad_share=0.02,
        effective_batch=1, batch_seconds=1, num_workers=workers,
    )  # fmt: skip
    ended = run_here(TEMPLATE, words)
    assert ended.code == 2 and "2 of 50 utterances have bad audio, more than max_bad_share" in ended.error
    (path,) = (tmp_path / "run" / "save").glob("step_*")
    update = int(path.name.removeprefix("step_"))
    assert 0 < update < 40
    again = run_here(TEMPLATE, [*words, "--max_bad_share=0.1"])
    assert again.code == 0 and f"resumed at update {update} " in again.stderr, again.stderr


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
