"""The start scripts build the right command, and two nodes (two agents on this machine) train as one process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.matrix import KINDS, UPDATES, Kind, free_port, kill, largest_difference, rows_of, run
from tests.faults.real_runs import ROOT, environment

TORCHRUN = ROOT / "scripts" / "torchrun.sh"
SLURM = ROOT / "scripts" / "slurm.sbatch"
LAUNCH = "-m toolkit.launch"

KILLED = """
import os, pathlib, runpy, signal, sys
from toolkit.training.brain import Brain

forward, once = Brain.fit_batch, pathlib.Path(__file__).with_name("killed")
rank, script = int(sys.argv.pop(1)), sys.argv.pop(1)

def killed(self, micro):
    if self.update >= 3 and self.world.rank == rank and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    forward(self, micro)

Brain.fit_batch = killed
runpy.run_path(script, run_name="__main__")
"""
"""A script (second word) whose rank (first word) is killed once, after three updates."""

WAITS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""
"""A worker that ends as a run that was told to stop."""

SRUN = """#!/bin/bash
# What srun does as far as the script needs it: the command once for each task, and the highest exit code.
echo "srun $1 $2 cpus ${SRUN_CPUS_PER_TASK:-}" >> "$SRUN_LOG"
shift 2
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks[rank]=$!
done
code=0
for task in "${tasks[@]}"; do wait "$task"; one=$?; [ $one -gt $code ] && code=$one; done
exit $code
"""
SCONTROL = '#!/bin/sh\necho "scontrol $*" >> "$SRUN_LOG"\n[ "$1" = show ] && printf "127.0.0.1\\nother\\n"\ntrue\n'


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which srun and scontrol are these."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {**environment(), "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable,
            "SRUN_LOG": str(tmp_path / "srun.log")}  # fmt: skip


def call(command: list[object], env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "--max-restarts 3 --standalone --nproc-per-node 1 train.py x.yaml --a=b c"),
        ({"CARDS": "08", "RESTARTS": "08"}, "--max-restarts 8 --standalone --nproc-per-node 8 train.py x.yaml --a=b c"),
        (
            {"CARDS": "16", "MASTER_ADDR": "node1"},
            "--max-restarts 3 --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29500 "
            "--rdzv-id run train.py x.yaml --a=b c",
        ),
        (
            {"CARDS": "32", "MASTER_ADDR": "node1", "MASTER_PORT": "1234", "RUN_ID": "mine"},
            "--max-restarts 3 --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:1234 "
            "--rdzv-id mine train.py x.yaml --a=b c",
        ),
    ],
)
def test_torchrun_is_called_for_so_many_cards(variables, expected):
    env = {"PATH": os.environ["PATH"], "PYTHON": "echo"} | variables
    done = call([TORCHRUN, "train.py", "x.yaml", "--a=b c"], env)
    assert done.returncode == 0 and done.stdout.strip() == f"{LAUNCH} {expected}", done.stderr


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        ([], {}, "no script was given"),
        (["train.py"], {"CARDS": "12", "MASTER_ADDR": "x"}, "expected a multiple of the 8 of a node"),
        (["train.py"], {"CARDS": "16"}, "set MASTER_ADDR"),
        (["train.py"], {"CARDS": "eight"}, "whole numbers"),
        (["train.py"], {"CARDS": "00"}, "both start at 1"),
        (["train.py"], {"CARDS": "09"}, "a multiple of the 8 of a node"),
        (["train.py"], {"RESTARTS": "-1"}, "RESTARTS is '-1'; it must be a whole number"),
        (["train.py"], {"RESTARTS": "x"}, "RESTARTS is 'x'; it must be a whole number"),
    ],
)
def test_what_makes_no_command_is_told(words, variables, said):
    done = call([TORCHRUN, *words], {"PATH": os.environ["PATH"], "PYTHON": "echo"} | variables)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and said in done.stderr


def words_of(kind: Kind, folder: Path, **keys: object) -> list[str]:
    return kind.words(folder, max_updates=UPDATES, distributed_timeout_minutes=1, **keys)


def on_two_nodes(words: list[object], folder: Path, env: dict[str, str]) -> list[str]:
    """Two agents that meet at a port of this machine, each with one worker; both must end with 0. What they said."""
    env = env | {"CARDS": "2", "CARDS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs, nodes = [folder / f"node{number}.log" for number in (0, 1)], []
    for log in logs:
        with open(log, "w", encoding="utf-8") as file:
            command = [str(word) for word in (TORCHRUN, *words)]
            nodes.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
    try:
        codes = [node.wait(200) for node in nodes]
    finally:
        for node in nodes:
            kill(node)
    texts = [log.read_text(encoding="utf-8") for log in logs]
    assert codes == [0, 0], "\n".join(text[-2000:] for text in texts)
    assert any("2 ranks, 2 accumulated on each" in text for text in texts)
    return texts


def test_two_nodes_train_as_one_process_does(programs, tmp_path):
    kind, folder = KINDS["ctc"], tmp_path / "nodes"
    on_two_nodes([kind.script, *words_of(kind, folder)], tmp_path, programs | {"RESTARTS": "0"})
    run(kind, tmp_path / "one")
    difference, name = largest_difference(folder, tmp_path / "one")
    assert difference <= 1e-6, name


@pytest.mark.parametrize("rank", [0, 1])
def test_two_nodes_go_on_after_a_worker_was_killed(programs, tmp_path, rank):
    """kill -9 of a worker: both agents start theirs again, and the run ends as if nothing had happened."""
    kind, folder, script = KINDS["ctc"], tmp_path / "nodes", tmp_path / "killed.py"
    script.write_text(KILLED)
    words = words_of(kind, folder, ckpt_interval_updates=1, valid_interval_updates=UPDATES)
    texts = on_two_nodes([script, rank, kind.script, *words], tmp_path, programs)
    assert any("resumed at update " in text for text in texts)
    updates = [row["update"] for row in rows_of(folder) if row["stage"] == "train"]
    assert updates == list(range(1, UPDATES + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_script_comes_to_the_worker(tmp_path, number):
    script, ready = tmp_path / "train.py", tmp_path / "ready"
    script.write_text(WAITS)
    env = environment() | {"PYTHON": sys.executable}
    process = subprocess.Popen([str(TORCHRUN), str(script), str(ready)], env=env, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        kill(process)
    assert process.returncode == 75, stderr


def test_outside_slurm_sbatch_is_named():
    done = call([SLURM, "train.py", "x.yaml"], {"PATH": os.environ["PATH"]})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: this is no job of Slurm's: start it with sbatch scripts/slurm.sbatch train")


def test_slurm_starts_the_ranks_of_a_run(programs, tmp_path):
    """The script itself with a stand-in for srun that starts the tasks: a real run of two ranks."""
    kind, folder = KINDS["ctc"], tmp_path / "run"
    job = programs | {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": "2",
                      "SLURM_CPUS_PER_TASK": "3", "MASTER_PORT": str(free_port())}  # fmt: skip
    words = kind.words(folder, max_updates=1, distributed_timeout_minutes=1, evaluate="last")
    done = call([SLURM, kind.script, *words], job)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 ranks, 2 accumulated on each" in done.stderr
    log = Path(programs["SRUN_LOG"]).read_text(encoding="utf-8")
    assert log.splitlines() == ["scontrol show hostnames node[1-2]", "srun --kill-on-bad-exit=0 --wait=300 cpus 3"]


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (1, False), (0, False)])
def test_slurm_requeues_by_the_exit_code(programs, tmp_path, code, requeued):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        "names = 'RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT'.split()\n"
        "words = [*(os.environ[name] for name in names), *sys.argv[1:]]\n"
        "sys.stdout.write(' '.join(words) + '\\n')\n"  # in one piece: both write to one pipe
        f"sys.exit({code})\n"
    )
    job = programs | {"SLURM_JOB_NODELIST": "nodes", "SLURM_JOB_ID": "1234567", "SLURM_NTASKS": "2"}
    done = call([SLURM, script, "x.yaml", "--a=b c"], job)
    assert done.returncode == code
    ranks = [line for line in done.stdout.splitlines() if line[0].isdigit()]
    assert sorted(ranks) == [f"{rank} {rank} 2 127.0.0.1 24567 x.yaml --a=b c" for rank in (0, 1)]
    log = Path(programs["SRUN_LOG"]).read_text(encoding="utf-8")
    assert ("scontrol requeue 1234567" in log) == requeued
