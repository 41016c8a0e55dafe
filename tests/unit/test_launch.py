"""The launcher's exit code, from real ranks that end in all ways."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Ranks end with the codes that the command line gives; "wait": when SIGUSR1 or SIGTERM comes, with 75, "fail": with 2.
SCRIPT = """
import os, signal, sys, time
word = sys.argv[1 + int(os.environ["RANK"])]
if word in ("wait", "fail"):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(75 if word == "wait" else 2))
    open(f"{sys.argv[3]}.{os.environ['RANK']}", "w").close()
    time.sleep(60)
sys.exit(int(word))
"""


def launched(folder: Path, *words: str) -> subprocess.Popen:
    (folder / "train.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "toolkit.launch", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(folder / "train.py"), *words, str(folder / "ready")]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


CODES = {("0", "0"): 0, ("75", "75"): 75, ("130", "130"): 130, ("0", "2"): 1, ("wait", "75"): 75}


@pytest.mark.parametrize(("words", "code"), CODES.items())
def test_the_code_is_that_of_the_ranks(tmp_path, words, code):
    process = launched(tmp_path, *words)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert ("FAILED" in stderr) == (code == 1), "torchrun's own report is shown where something failed"


@pytest.mark.parametrize("word", ["abc", "0"])
def test_wrong_options_are_one_sentence(word):
    command = [sys.executable, "-m", "toolkit.launch", f"--nproc-per-node={word}", "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: torchrun cannot start with these options: ")


@pytest.mark.parametrize(
    ("number", "second", "code"),
    [(signal.SIGTERM, "wait", 75), (signal.SIGUSR1, "wait", 75), (signal.SIGTERM, "fail", 1)],
)
def test_a_signal_to_the_launcher_comes_to_the_ranks(tmp_path, number, second, code):
    process = launched(tmp_path, "wait", second)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready.*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert ("error: told to stop, but ranks ended with 2 and may have saved nothing" in stderr) == (code == 1)
