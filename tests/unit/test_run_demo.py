"""The demo's driver: steps that fail, resume and are done; and the whole of it, small, by its real commands."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from demo.run_demo import ROOT, Ledger, Step, main, run_step, steps
from toolkit.errors import TrainingError


def test_a_step_runs_once_and_again_when_its_command_changes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result, count = tmp_path / "result", tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); open({str(result)!r}, 'w')"
    step = Step("one", "count", ("-c", code), result)
    for expected in ("x", "x"):
        run_step(step, Ledger(tmp_path), "1/1")
        assert count.read_text() == expected
    assert "done before" in capfd.readouterr().out
    result.unlink()  # its result is gone: the command runs again
    run_step(step, Ledger(tmp_path), "1/1")
    run_step(Step("one", "count", ("-c", code + "; 1"), result), Ledger(tmp_path), "1/1")
    assert count.read_text() == "xxx"


def test_a_step_that_fails_is_named_and_not_done(tmp_path: Path) -> None:
    result = tmp_path / "result"
    result.touch()
    step = Step("two", "fail", ("-c", "import sys; sys.exit(3)"), result)
    with pytest.raises(TrainingError, match="'two' ended with exit code 3"):
        run_step(step, Ledger(tmp_path), "1/1")
    assert not Ledger(tmp_path).is_done(step)
    interrupted = Step("two", "stopped by Ctrl-C", ("-c", "import sys; sys.exit(130)"), result)
    with pytest.raises(KeyboardInterrupt):
        run_step(interrupted, Ledger(tmp_path), "1/1")
    assert not Ledger(tmp_path).is_done(interrupted)


def test_the_steps_name_files_that_exist(tmp_path: Path) -> None:
    arguments = argparse.Namespace(sentences=None, pretrain_minutes=1.0, finetune_minutes=2.0, both=[])
    plan = steps(tmp_path, arguments)
    assert [step.name for step in plan] == ["corpus", "prepare", "pretrain", "finetune"]
    for step in plan:
        assert all((ROOT / text).is_file() for text in step.command if text.endswith((".py", ".yaml")))
    assert "[test]" not in plan[2].command  # nothing of the test part is seen before the end


def test_the_whole_demo_small(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    command = [
        "demo/run_demo.py", "--output_folder", str(folder), "--sentences", "100", "--pretrain_minutes", "0.05",
        "--finetune_minutes", "0.05", "--", "--noprogressbar", "True",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    summary = json.loads((folder / "finetune" / "summary.json").read_text())
    assert re.fullmatch(r"demo: test WER \d+\.\d+ %", last) and f"{summary['test_wer']:.2f}" in last
    rows = [json.loads(line) for line in (folder / "finetune" / "test_hypotheses.jsonl").read_text().splitlines()]
    test_speakers = {path.name for path in (folder / "corpus" / "LibriSpeech" / "test").iterdir()}
    assert len(rows) == 200 and {row["id"].split("-")[0] for row in rows} == test_speakers
    assert (folder / "curves.png").stat().st_size > 10000 and "finetune: loss" in (folder / "curves.md").read_text()
    assert (folder / "finetune" / "model" / "model.safetensors").is_file()
    assert "encoder: all 64 tensors from" in (folder / "finetune" / "log.txt").read_text()

    before = (folder / "finetune" / "model" / "model.safetensors").stat().st_mtime_ns
    assert main(command[1:]) == 0
    again = capfd.readouterr().out
    assert "the demo is done already" in again and again.strip().splitlines()[-1] == last
    assert (folder / "finetune" / "model" / "model.safetensors").stat().st_mtime_ns == before
