"""Faults that are injected into real runs, and what has to come out: one sentence, an exit code, nothing lost.

Each injection runs a recipe's real command on the small fixtures, harms it from outside, and holds what comes out
against the run that nothing happened to. `tests/faults/suite.py` runs them all and counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file

from tests.faults.real_runs import (
    DATA2VEC,
    ODD_AUDIO,
    ROOT,
    TEMPLATE,
    Ended,
    Stop,
    contents,
    data2vec_words,
    digits,
    digits_words,
    environment,
    process_ended,
    run_forked,
    run_here,
    start_forked,
    write_rows,
)

TIMES = {"throughput", "loader_wait_share", "elapsed_seconds", "audio_seconds"}
"""What the clock decides in a row of the log (and a sum of floats over ranks)."""

RANDOM = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "layerdrop": 0.3}
"""All that must be drawn again as it was."""

UPDATES = 16


class Wrong(Exception):
    """What came out is not what has to; the sentence says how."""


@dataclass(frozen=True)
class Injected:
    """One fault: its kind, and how many updates had to be made again because of it (None: no run went on)."""

    kind: str
    lost: int | None = None


class Recipe:
    """A script with its command line (``words(folder, **keys)``), and the run that nothing happens to.

    Arguments
    ---------
    folder : where runs are made.
    updates : length of the run.
    """

    script: Path
    words_of: Callable[..., list[str]]
    keys: ClassVar[dict[str, Any]]

    def __init__(self, folder: Path, *, updates: int = UPDATES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.updates = folder, updates
        self._whole: dict[int, Path] = {}

    def words(self, folder: Path, **keys: Any) -> list[str]:
        """The command line."""
        every = {"max_updates": self.updates, "log_interval": 1, "ckpt_interval_updates": 1, **self.keys}
        return type(self).words_of(folder, **{**every, **keys})

    def whole(self, processes: int = 1) -> Path:
        """The run that nothing happens to, made once for each number of processes."""
        if processes not in self._whole:
            folder = self.folder / f"whole_{type(self).__name__}_{processes}"
            for ended in run_forked(self.script, self.words(folder), processes=processes):
                expect(ended, 0)
            self._whole[processes] = folder
        return self._whole[processes]

    def finish(self, folder: Path, *, processes: int = 1, **keys: Any) -> Ended:
        """The same command again, to its end; the result must be that of the whole run, bit for bit."""
        ended = run_forked(self.script, self.words(folder, **keys), processes=processes)
        for rank in ended:
            expect(rank, 0)
        expect(ended[0], 0, "resumed at update ")
        same_bits(folder, self.whole(processes))
        return ended[0]


class Digits(Recipe):
    """CTC on spoken digits."""

    script, words_of = TEMPLATE, digits_words
    keys: ClassVar[dict[str, Any]] = {
        "batch_seconds": 3, "effective_batch": 6, "valid_interval_updates": 5, "final_dropout": 0.1,
        "evaluate": "last", **{f"encoder_training.{name}": value for name, value in RANDOM.items()},
    }  # fmt: skip


class Data2Vec(Recipe):
    """Pretraining with a teacher, which is part of the state."""

    script, words_of = DATA2VEC, data2vec_words
    keys: ClassVar[dict[str, Any]] = {
        "batch_seconds": 4, "effective_batch": 8, "valid_interval_updates": 5, "valid_splits": "[dev-clean]",
        "model.ema_decay": "[0.5, 0.9, 6]", **{f"model.encoder.{name}": value for name, value in RANDOM.items()},
    }  # fmt: skip


# ---- what has to be ------------------------------------------------------------------------------------------------


def expect(ended: Ended, code: int, *sentences: str) -> None:
    """`Wrong` unless a run ended with ``code`` and said all ``sentences``; a user's error shows no traceback."""
    if ended.code != code:
        raise Wrong(f"exit code {ended.code} instead of {code}: {ended.stderr[-1500:]}")
    for sentence in sentences:
        if sentence not in ended.stderr:
            raise Wrong(f"nothing was said of {sentence!r}: {ended.stderr[-1500:]}")
    if code == 2 and "Traceback" in ended.stderr:
        raise Wrong(f"a traceback for a user's mistake: {ended.stderr[-1500:]}")


def same_bits(found: Path, expected: Path) -> None:
    """`Wrong` unless two runs have the same weights, the same rows of the log, and the same transcripts."""
    names = ["model/model.safetensors", "test_hypotheses.jsonl"]
    for name in names:
        ours, theirs = ((folder / name) for folder in (found, expected))
        if theirs.exists() and ours.read_bytes() != theirs.read_bytes():
            raise Wrong(f"{name} differs from that of the undisturbed run")
    ours, theirs = rows_of(found), rows_of(expected)
    if ours != theirs:
        first = next(number for number, pair in enumerate(zip_longest(ours, theirs)) if pair[0] != pair[1])
        raise Wrong(f"row {first + 1} of metrics.jsonl is {ours[first:first + 1]}, not {theirs[first:first + 1]}")


def finite_weights(folder: Path) -> None:
    """`Wrong` where a weight is not finite."""
    for name, tensor in load_file(folder / "model" / "model.safetensors").items():
        if not bool(torch.isfinite(tensor).all()):
            raise Wrong(f"{name} is not finite")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what the clock decides; a test that was made again has the same row again."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return [row for number, row in enumerate(rows) if row["stage"] != "test" or row not in rows[:number]]


def saved_update(folder: Path) -> int:
    """The newest checkpoint, 0 without one; one that was set aside as damaged is none."""
    return max((int(path.name[5:]) for path in (folder / "save").glob("step_" + "[0-9]" * 8)), default=0)


def logged_update(folder: Path) -> int:
    """The last update of which the log has a whole row, 0 without one."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["update"] for line in lines if line.endswith("}\n")), default=0)


def lost_updates(folder: Path) -> int:
    """Updates that were made and have to be made again."""
    return max(0, logged_update(folder) - saved_update(folder))


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is half written."""
    place = folder / "save"
    return place.exists() and any(name.startswith(".step_") for name in os.listdir(place))


def wait_for(is_reached: Callable[[], bool], is_alive: Callable[[], bool], *, seconds: float = 120) -> bool:
    """Wait until something is so; False when the run ended before."""
    deadline = time.monotonic() + seconds
    while not is_reached():
        if not is_alive():
            return is_reached()
        if time.monotonic() > deadline:
            raise Wrong(f"the run did not come so far within {seconds:g} s")
        time.sleep(0.0005)
    return True


def is_running(process: subprocess.Popen) -> bool:
    """Whether it has not ended."""
    return process.poll() is None


def children_of(pid: int) -> list[int]:
    """The processes that ``pid`` started, oldest first (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return sorted(found)


def workers_of(pid: int) -> list[int]:
    """The loader workers of a run: its children by fork, with its own command line."""
    own = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [child for child in children_of(pid) if Path(f"/proc/{child}/cmdline").read_bytes() == own]


# ---- kill -9 --------------------------------------------------------------------------------------------------------


def kills(recipe: Recipe, *, number: int, seed: int) -> Iterator[Injected]:
    """kill -9 at random moments of one run, every second one aimed at a save, each time resumed by the same command.

    The moments are spread evenly at random from the start to behind the last update, where tests run and the model is
    written.
    """
    draw, folder = random.Random(seed), recipe.folder / f"killed_{type(recipe).__name__}_{seed}"
    moments = sorted(draw.uniform(0.0, recipe.updates + 1.0) for _ in range(number))
    for index, moment in enumerate(moments):
        process = start_forked(recipe.script, recipe.words(folder, num_workers=index % 2), folder.with_suffix(".log"))
        alive = process.is_alive
        is_reached = wait_for(lambda wanted=int(moment): saved_update(folder) >= wanted, alive)
        if is_reached and index % 2 == 0 and int(moment) < recipe.updates:
            # from the first byte of a checkpoint to some time behind the last
            wait_for(lambda: is_saving(folder), alive)
            time.sleep(draw.uniform(0.0, 0.01))
        else:
            time.sleep(draw.uniform(0.0, 0.3))
        process.kill()
        ended = process_ended(process, folder.with_suffix(".log"))
        if ended.code not in (0, -signal.SIGKILL):
            raise Wrong(f"the run ended by itself with {ended.code}: {ended.stderr[-1500:]}")
        if ended.code == 0:
            break  # it was quicker; there is nothing left to kill
        lost = lost_updates(folder)
        yield Injected("kill -9 in a save" if is_saving(folder) else "kill -9 elsewhere", lost)
    for ended in run_forked(recipe.script, recipe.words(folder)):
        expect(ended, 0)
    same_bits(folder, recipe.whole())


# ---- told to stop ---------------------------------------------------------------------------------------------------


def stopped(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """SIGTERM and SIGUSR1, to the process alone and to all of the job (its loader workers too): code 75 each time."""
    draw, folder, log = random.Random(seed), recipe.folder / f"stopped_{seed}", recipe.folder / f"stopped_{seed}.log"
    plan = [(number, to_all) for number in (signal.SIGTERM, signal.SIGUSR1) for to_all in (False, True)]
    for index, (number, to_all) in enumerate(plan):
        words = recipe.words(folder, num_workers=2, ckpt_interval_updates="null")
        process = start_forked(recipe.script, words, log, own_group=True)
        wanted = 1 + (recipe.updates - 4) * index // len(plan) + draw.randrange(2)
        wait_for(lambda wanted=wanted: logged_update(folder) >= wanted, process.is_alive)
        (os.killpg if to_all else os.kill)(process.pid, number)
        expect(process_ended(process, log), 75, "told to stop: saved at update ")
        log.unlink()
        whom = "all processes" if to_all else "the process"
        yield Injected(f"{number.name} to {whom}", lost_updates(folder))
    recipe.finish(folder)


def stopped_outside(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """SIGTERM before the first update, in the test behind the last, and to one rank in a validation of two: code 75."""
    tell = "(__import__('os').kill(__import__('os').getpid(), 15))"
    folder = recipe.folder / "stopped_before"
    (ended,) = run_forked(own_script(recipe, tell, BEFORE_TRAINING), recipe.words(folder))
    expect(ended, 75, "told to stop: no training is going on here that could be saved; run the same command again")
    for again in run_forked(recipe.script, recipe.words(folder)):
        expect(again, 0)
    same_bits(folder, recipe.whole())
    yield Injected("SIGTERM before the first update", 0)

    folder = recipe.folder / "stopped_in_the_test"
    (ended,) = run_forked(own_script(recipe, f"stage is Stage.TEST and {tell}"), recipe.words(folder))
    expect(ended, 75, "told to stop in the test set; run the same command again")
    lost = lost_updates(folder)
    recipe.finish(folder)
    yield Injected("SIGTERM in the test", lost)

    folder = recipe.folder / "stopped_in_a_validation"
    one = f"stage is Stage.VALID and self.update == 5 and self.world.rank == 1 and {tell}"
    for ended in run_forked(own_script(recipe, one), recipe.words(folder, ckpt_interval_updates="null"), processes=2):
        expect(ended, 75)
    if saved_update(folder) != 5 or [row for row in rows_of(folder) if row["stage"] == "valid"]:
        raise Wrong("the validation was not broken off, or its update is not saved")
    recipe.finish(folder, processes=2)
    yield Injected("SIGTERM to one rank of two in a validation", 0)


@contextlib.contextmanager
def torchrun(
    recipe: Recipe, folder: Path, log: Path, *options: str, module: str = "toolkit.launch", **keys: Any
) -> Iterator[subprocess.Popen]:
    """The command with two processes under a real torchrun, through the toolkit's launcher or without it."""
    launcher = [sys.executable, "-m", module, "--standalone", "--nproc-per-node=2", *options]
    words = [*launcher, str(recipe.script), *recipe.words(folder, **keys)]
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(words, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its ranks
            process.wait(120)


def ranks_told(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """Under torchrun SIGUSR1 to one of two ranks, then SIGTERM to the launcher: both save, and the code is 75."""
    folder, log = recipe.folder / "ranks_told", recipe.folder / "ranks_told.log"
    for number, wanted in ((signal.SIGUSR1, 2), (signal.SIGTERM, 7)):
        to_rank = number == signal.SIGUSR1
        with torchrun(recipe, folder, log, ckpt_interval_updates="null") as process:
            wait_for(lambda wanted=wanted: logged_update(folder) >= wanted, partial(is_running, process))
            os.kill(children_of(process.pid)[-1] if to_rank else process.pid, number)
            code = process.wait(240)
        expect(Ended(code, log.read_text(encoding="utf-8")), 75, "told to stop: saved at update ")
        yield Injected(f"{number.name} to {'one rank of two' if to_rank else 'the launcher'}", lost_updates(folder))
    recipe.finish(folder, processes=2)


def elastic(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """kill -9 of one rank, then of the other, under torchrun --max-restarts: the run goes on by itself."""
    draw, folder, log = random.Random(seed), recipe.folder / "elastic", recipe.folder / "elastic.log"
    lost = []
    # plain torchrun, as most people start it
    options = ("--max-restarts=2", "--monitor-interval=0.1")
    with torchrun(recipe, folder, log, *options, module="torch.distributed.run") as process:
        for rank, wanted in ((1, draw.randrange(1, 5)), (0, draw.randrange(7, 12))):
            def is_there(wanted: int = wanted) -> bool:
                return saved_update(folder) >= wanted and len(children_of(process.pid)) >= 2

            wait_for(is_there, partial(is_running, process))
            os.kill(children_of(process.pid)[-2:][rank], signal.SIGKILL)
            lost.append(lost_updates(folder))
        code = process.wait(240)
    expect(Ended(code, log.read_text(encoding="utf-8")), 0, "resumed at update ")
    same_bits(folder, recipe.whole(processes=2))
    yield from (Injected("kill -9 of a rank, torchrun restarts", number) for number in lost)


# ---- errors in the run ----------------------------------------------------------------------------------------------


FORWARD = "        return self.modules.model(batch.waveforms"
"""What the template's forward pass begins with."""

BEFORE_TRAINING = "        brain = experiment.brain("
"""What stands before its training; all is read and built."""


def own_script(recipe: Recipe, line: str, place: str = FORWARD) -> Path:
    """The template with a line of the user's own before a line of it, ``place``."""
    text = recipe.script.read_text(encoding="utf-8")
    if text.count(place) != 1:
        raise Wrong(f"the template has no line {place.strip()!r} any more")
    script = recipe.folder / "own" / "train.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(text.replace(place, f"        {line}\n{place}"), encoding="utf-8")
    return script


def defects(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """A defect in a user's own forward pass, on one process and on one rank of two: the updates before it are kept."""
    update = random.Random(seed).randrange(3, UPDATES - 2)
    # not every rank has a batch in every update
    line = f"if stage is Stage.TRAIN and self.update >= {update} and self.world.rank == self.world.size - 1: batch.wavs"
    script = own_script(recipe, line)
    for processes in (1, 2):
        folder = recipe.folder / f"defect_{processes}"
        words = recipe.words(folder, ckpt_interval_updates="null", valid_interval_updates=100)
        ended = run_forked(script, words, processes=processes)
        for rank in ended:
            expect(rank, 1 if rank is ended[-1] else 2, "has no attribute 'wavs'")
        report = json.loads((folder / "crash_report.json").read_text())
        shape, done = report["batch"]["waveforms"], report["update"]
        if done < update or not report["utterances"] or shape[0] != len(report["utterances"]):
            raise Wrong(f"the report does not tell the batch: {report}")
        for sentence in (f"update {done} broke off with a batch of ", f"saved at update {done}; run the same command"):
            expect(ended[0], 1 if processes == 1 else 2, sentence)
        yield Injected("defect in the user's forward pass", done - saved_update(folder))
        run_without_validations(recipe, folder, processes)


def run_without_validations(recipe: Recipe, folder: Path, processes: int) -> None:
    """Mended, the run ends with the weights of the whole one (which validates more often, and so has more rows)."""
    words = recipe.words(folder, ckpt_interval_updates="null", valid_interval_updates=100)
    for number, ended in enumerate(run_forked(recipe.script, words, processes=processes)):
        expect(ended, 0, *(["resumed at update "] if number == 0 else []))  # the first one speaks
    name = "model/model.safetensors"
    if (folder / name).read_bytes() != (recipe.whole(processes) / name).read_bytes():
        raise Wrong("the weights differ from those of the undisturbed run")


def not_finite(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """One utterance that makes a loss NaN: once it costs that update; from then on always, it ends the run."""
    folder = recipe.folder / "nan_once"
    line = "if stage is Stage.TRAIN and self.update {} 6: batch.waveforms[0] = float('nan')"
    (ended,) = run_forked(own_script(recipe, line.format("==")), recipe.words(folder))
    expect(ended, 0, "update 6: the loss is not finite with the utterances ", "; nothing was changed (1 in a row, ")
    finite_weights(folder)
    if [row for row in rows_of(folder) if row["stage"] == "train"][-1].get("skipped_updates") != 1:
        raise Wrong("the log does not count the update that was skipped")
    yield Injected("NaN in one loss", 1)

    folder = recipe.folder / "nan_always"
    keys = {"ckpt_interval_updates": "null", "nonfinite_patience": 3}
    (ended,) = run_forked(own_script(recipe, line.format(">=")), recipe.words(folder, **keys))
    expect(ended, 2, "the loss is not finite with the utterances ", "the 3rd such update in a row")
    report = json.loads((folder / "crash_report.json").read_text())
    if [update["update"] for update in report["updates"]] != [6, 7, 8] or saved_update(folder) != 5:
        raise Wrong(f"the report does not tell the updates, or one of them was saved: {report}")
    lost = lost_updates(folder)
    recipe.finish(folder, **keys)
    yield Injected("NaN in every loss from an update on", lost)


def dead_worker(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """kill -9 of a loader worker: one sentence, a checkpoint, and the same command goes on."""
    folder, log = recipe.folder / "dead_worker", recipe.folder / "dead_worker.log"
    words = recipe.words(folder, num_workers=2, ckpt_interval_updates="null")
    process = start_forked(recipe.script, words, log)
    wait_for(lambda: logged_update(folder) >= 3, process.is_alive)
    workers = workers_of(process.pid)
    os.kill(random.Random(seed).choice(workers), signal.SIGKILL)
    ended = process_ended(process, log)
    expect(ended, 2, "saved at update ", "error: a loader worker was killed, most likely because memory")
    yield Injected("loader worker killed", lost_updates(folder))
    recipe.finish(folder, num_workers=2)


def no_memory(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """A recording of 20 minutes among words of half a second, and a limit to the memory: told with the batch."""
    path, seconds = recipe.folder / "long.flac", 1200
    soundfile.write(path, np.zeros(8000 * seconds, dtype=np.int16), 8000)
    long = {**digits()[0], "ID": "long", "wav": str(path), "duration": str(seconds)}
    manifest = write_rows(recipe.folder / "long.csv", [*digits(), long])
    limit = "resource.setrlimit(resource.RLIMIT_AS, (vm + 600_000_000, -1))"
    size = "vm = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()"
    script = own_script(recipe, f"import resource; {size}; self.update == 0 and {limit}")
    folder = recipe.folder / "no_memory"
    keys = {"train_manifest": manifest, "max_duration": 2000, "valid_interval_updates": 100}
    (ended,) = run_forked(script, recipe.words(folder, ckpt_interval_updates="null", **keys))
    expect(ended, 2, "error: memory ran out at a batch of 1 utterance (waveforms 1 x 19200", "(DefaultCPUAllocator: ",
           "lower batch_seconds or batch_tokens")  # fmt: skip
    if logged_update(folder) != saved_update(folder):
        raise Wrong("the updates before it were not saved")
    yield Injected("out of memory", lost_updates(folder))


# ---- disks and files ------------------------------------------------------------------------------------------------

# On a disk of one megabyte, seen by this process only: a run up to an update, the disk filled, then room made.
FULL_DISK = """
import os, signal, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.faults import injections as at
from tests.faults.real_runs import Stop, contents, run_forked, run_here
disk = Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
recipe, run = at.Digits(disk), disk / "run"
at.expect(run_forked(recipe.script, recipe.words(run), stop=Stop(6, 0, signal.SIGTERM))[0], 75)
before = contents(run / "save")
with open(disk / "filler", "wb", buffering=0) as filler:
    filler.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 80_000))
ended = run_here(recipe.script, recipe.words(run))
at.expect(ended, 2, "remain valid): no space left on the device while writing '", "free some space and run the same")
if contents(run / "save") != before:
    raise at.Wrong("the checkpoints that were there have changed")
lost = at.lost_updates(run)
(disk / "filler").unlink()
at.expect(run_forked(recipe.script, recipe.words(run))[0], 0, "resumed at update ")
at.same_bits(run, Path(sys.argv[3]))
print(lost)
"""


def full_disk(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """A disk without room for another checkpoint: real ENOSPC on a file system of its own; nothing where none can be
    mounted."""
    disk = recipe.folder / "disk"
    disk.mkdir(exist_ok=True)
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = [*alone, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        return
    done = subprocess.run([*alone, sys.executable, "-c", FULL_DISK, str(ROOT), str(disk), str(recipe.whole())],
                          env=environment(), capture_output=True, text=True)  # fmt: skip
    expect(Ended(done.returncode, done.stderr), 0)
    yield Injected("disk full in a save", int(done.stdout.split()[-1]))


def damages(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """Flipped bits, truncated and missing files in the newest checkpoint: named, and the one before is used."""
    draw, begun = random.Random(seed), recipe.folder / "begun"
    if not begun.exists():
        (ended,) = run_forked(recipe.script, recipe.words(begun), stop=Stop(6, 0, signal.SIGTERM))
        expect(ended, 75)
    newest = saved_update(begun)

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)

    def truncate(path: Path) -> None:
        os.truncate(path, draw.randrange(path.stat().st_size))

    plan: list[tuple[str, Callable[[Path], None], str]] = [
        ("flipped bit", flip, "model.safetensors"), ("flipped bit", flip, "state.json"),
        ("truncated file", truncate, "optimizer.safetensors"), ("truncated file", truncate, "checksums.json"),
        ("missing file", Path.unlink, "model.safetensors"), ("missing file", Path.unlink, "checksums.json"),
    ]  # fmt: skip
    for kind, damage, name in plan:
        folder = recipe.folder / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(begun, folder)
        place = folder / "save" / f"step_{newest:08d}"
        damage(place / name)
        said = recipe.finish(folder).stderr
        named = [line for line in said.splitlines() if str(place) in line and name in line]
        if not named or f"resumed at update {newest - 1} " not in said:
            raise Wrong(f"{kind}, {name}: {said[-1500:]}")
        yield Injected(f"checkpoint: {kind}", 1)


def changed_data(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """A manifest with rows added, removed, changed or in another order: refused with the difference."""
    begun = recipe.folder / "begun_data"
    (ended,) = run_forked(recipe.script, recipe.words(begun), stop=Stop(2, 0, signal.SIGTERM))
    expect(ended, 75)
    before, rows = contents(begun / "save"), digits()
    changes = {
        "2 rows added (first 'new0') of 50 before": [{**rows[0], "ID": f"new{n}"} for n in range(2)] + rows,
        f"1 row removed (first {rows[7]['ID']!r}) of 50 before": rows[:7] + rows[8:],
        f"1 row changed (first {rows[3]['ID']!r}) of 50 before": [
            {**row, "wrd": "SEVEN SEVEN"} if row is rows[3] else row for row in rows
        ],
        f"the same rows in another order, from row 1 ({rows[1]['ID']!r}) on": [rows[1], rows[0], *rows[2:]],
    }
    for words, changed in changes.items():
        manifest = write_rows(recipe.folder / "changed.csv", changed)
        ended = run_here(recipe.script, recipe.words(begun, train_manifest=manifest))
        expect(ended, 2, f"the data changed since the checkpoint {begun / 'save'}", f": train ({words}); its place in")
        if contents(begun / "save") != before:
            raise Wrong("a refused run changed the checkpoints")
        yield Injected("manifest changed", 0)
    recipe.finish(begun)


def bad_audio(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """Files that are none, end early, lie about themselves or hold NaN are named and left out; odd ones are used."""
    folder = recipe.folder / "audio"
    folder.mkdir(exist_ok=True)
    files = {name: ODD_AUDIO / name for name in ("empty_file.wav", "zero_samples.wav", "text_renamed.flac")}
    durations = dict.fromkeys(files, 1.0)
    files["truncated.flac"] = ODD_AUDIO / "truncated.flac"
    durations["truncated.flac"] = soundfile.info(files["truncated.flac"]).duration
    spoiled = np.random.default_rng(seed).normal(scale=0.1, size=8000).astype(np.float32)
    spoiled[4000] = np.nan
    soundfile.write(folder / "nan.wav", spoiled, 8000, subtype="FLOAT")
    soundfile.write(folder / "hour.flac", np.zeros(8000 * 3600, dtype=np.int16), 8000)
    soundfile.write(folder / "lying.flac", np.zeros(8000, dtype=np.int16), 8000)
    header = bytearray((folder / "lying.flac").read_bytes())
    header[21] |= 0x0F  # the number of samples, 36 bits behind the sample rate: some 10^10
    header[22:26] = b"\xff" * 4
    (folder / "lying.flac").write_bytes(header)
    soundfile.write(folder / "sparse.wav", np.zeros(8000, dtype=np.int16), 8000)
    data = bytearray((folder / "sparse.wav").read_bytes()[:44])
    data[4:8], data[40:44] = (2**31 + 36).to_bytes(4, "little"), (2**31).to_bytes(4, "little")
    (folder / "sparse.wav").write_bytes(data)
    os.truncate(folder / "sparse.wav", 2**31 + 44)  # 37 hours, which take no room on the disk
    for name in ("nan.wav", "hour.flac", "lying.flac", "sparse.wav", "missing.wav"):
        files[name], durations[name] = folder / name, 1.0
    good = {name: ODD_AUDIO / name for name in ("stereo_44100.wav", "mono_8000.mp3", "mono_16000_24bit.wav")}
    durations |= {name: soundfile.info(path).duration for name, path in good.items()}
    odd = [
        {**digits()[0], "ID": name, "wav": str(path), "duration": str(durations[name])}
        for name, path in (files | good).items()
    ]
    manifest = write_rows(recipe.folder / "odd.csv", [*odd, *digits()[:20]])
    run = recipe.folder / "odd"
    keys = {"train_manifest": manifest, "max_updates": 6, "num_workers": 1}
    (ended,) = run_forked(recipe.script, recipe.words(run, **keys, max_bad_share=0.5))
    expect(ended, 0, *(f"left out {name}: {path} " for name, path in files.items()))
    finite_weights(run)
    wrong = [name for name in good if f"left out {name}" in ended.stderr]
    if wrong:
        raise Wrong(f"files that can be used were left out: {wrong}")
    (refused,) = run_forked(recipe.script, recipe.words(recipe.folder / "odd_refused", **keys, max_bad_share=0))
    expect(refused, 2, "utterances have bad audio, more than max_bad_share 0 allows")
    yield from (Injected("bad audio") for _ in files)
    yield from (Injected("odd audio that can be used") for _ in good)


def two_runs(recipe: Recipe, seed: int) -> Iterator[Injected]:
    """A second run in a folder that is in use is refused, and the first does not notice."""
    folder, log = recipe.folder / "two", recipe.folder / "two.log"
    process = start_forked(recipe.script, recipe.words(folder), log)
    wait_for(lambda: saved_update(folder) >= 1, process.is_alive)
    process_id = process.pid
    os.kill(process_id, signal.SIGSTOP)  # so that it does not end meanwhile
    try:
        second = run_here(recipe.script, recipe.words(folder))
    finally:
        os.kill(process_id, signal.SIGCONT)
    expect(second, 2, f"error: another run is writing to {folder} (process {process_id} on ")
    expect(process_ended(process, log), 0)
    same_bits(folder, recipe.whole())
    yield Injected("second run on one folder", 0)


FAULTS: dict[str, Callable[[Recipe, int], Iterator[Injected]]] = {
    "told to stop": stopped,
    "told to stop elsewhere": stopped_outside,
    "ranks told": ranks_told,
    "ranks killed": elastic,
    "defects": defects,
    "not finite": not_finite,
    "dead worker": dead_worker,
    "no memory": no_memory,
    "full disk": full_disk,
    "damaged checkpoints": damages,
    "changed data": changed_data,
    "bad audio": bad_audio,
    "two runs": two_runs,
}
"""All but the kills; each takes a `Digits` and a seed."""
