"""A run that is interrupted, anywhere and however, ends with the weights of the run that was not: bit for bit."""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.real_runs import (
    ASR,
    DATA2VEC,
    PRETRAINING,
    TEMPLATE,
    TEXT,
    Ended,
    Stop,
    asr_words,
    data2vec_words,
    digits_words,
    pretraining_words,
    run_forked,
    run_script,
    run_until,
    text_words,
)

UPDATES = 9
TIMES = {"throughput", "loader_wait_share", "elapsed_seconds", "audio_seconds"}
"""What the clock decides in a row of the log (and a sum of floats over ranks)."""

RANDOM = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "layerdrop": 0.3}
"""All that must be drawn again as it was."""


class Kind:
    """A script with its command line: ``words(folder, **keys)``."""

    def __init__(self, script: Path, words: Callable[..., list[str]], **keys: Any) -> None:
        self.script, self._words, self._keys = script, words, keys

    def words(self, folder: Path, **keys: Any) -> list[str]:
        return self._words(folder, **{"max_updates": UPDATES, "log_interval": 1, **self._keys, **keys})

    def run(self, folder: Path, *, code: int = 0, stop: Stop | None = None, processes: int = 1, **keys: Any) -> Ended:
        """Forked; every rank has to end with ``code``."""
        ended = run_forked(self.script, self.words(folder, **keys), stop=stop, processes=processes)
        assert [rank.code for rank in ended] == [code] * processes, ended[0].stderr[-3000:]
        return ended[0]


# 12 s of digits an update in micro-batches of 3 s (4 of them), 26 s in all: the last update of an epoch has fewer.
KINDS = {
    "ctc": Kind(
        TEMPLATE, digits_words, batch_seconds=3, effective_batch=12, valid_interval_updates=4, ckpt_interval_updates=2,
        final_dropout=0.1, evaluate="last", **{f"encoder_training.{name}": value for name, value in RANDOM.items()},
    ),
    "pretraining": Kind(
        PRETRAINING, pretraining_words, batch_seconds=4, effective_batch=16, ckpt_interval_updates=2,
        valid_interval_updates=4, valid_splits="[dev-clean]",
        **{f"model.encoder.{name}": value for name, value in RANDOM.items()},
    ),
    # fast ramps, so that a move too many or too few shows in the weights of the teacher; both timings
    **{
        f"data2vec, {timing}": Kind(
            DATA2VEC, data2vec_words, batch_seconds=4, effective_batch=16, ckpt_interval_updates=2,
            valid_interval_updates=4, valid_splits="[dev-clean]",
            **{"model.ema_decay": "[0.5, 0.9, 6]", "model.ema_timing": timing},
            **{f"model.encoder.{name}": value for name, value in RANDOM.items()},
        )
        for timing in ("step", "fairseq")
    },
    **{
        f"data2vec of text, {timing}": Kind(
            TEXT, text_words, ckpt_interval_updates=2, valid_interval_updates=4,
            **{"model.ema_decay": "[0.5, 0.9, 6]", "model.ema_timing": timing},
            **{f"encoder.{name}": value for name, value in RANDOM.items() if name != "activation_dropout"},
        )
        for timing in ("step", "fairseq")
    },
    "asr": Kind(
        ASR, asr_words, ckpt_interval_updates=2, evaluate="last",
        **{f"encoder_training.{name}": value for name, value in RANDOM.items()},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run from beginning to end of a kind, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"whole_{name}")
            KINDS[name].run(made[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", ["data2vec, step", "data2vec, fairseq"])
def test_a_teacher_is_in_what_is_compared(whole, name):
    """It has moved, with either timing, and is neither the student nor what it was."""
    weights = weights_of(whole(name))
    prefix = "teacher.module."
    teacher = [key for key in weights if key.startswith(prefix) and not key.startswith(prefix + "positional.")]
    assert teacher
    for key in teacher:
        assert not torch.equal(weights[key], weights[key.replace(prefix, "encoder.transformer.")]), key
    copied = [key for key in weights if key.startswith(prefix + "positional.")]
    # by step the last move comes after the last update, by fairseq before it
    same = all(torch.equal(weights[key], weights[key.replace(prefix, "encoder.transformer.")]) for key in copied)
    assert copied and same == (name == "data2vec, step")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_bits(found: Path, expected: Path) -> None:
    """Equal files; told tensor by tensor where they are not."""
    ours, theirs = weights_of(found), weights_of(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    name = "model/model.safetensors"
    assert (found / name).read_bytes() == (expected / name).read_bytes()


def largest_difference(found: Path, expected: Path) -> tuple[float, str]:
    """Between any two weights, and where."""
    ours, theirs = weights_of(found), weights_of(expected)
    assert ours.keys() == theirs.keys()
    return max((float((ours[name] - theirs[name]).abs().max()), name) for name in theirs)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what the clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def random_stops(seed: int) -> list[Stop]:
    """SIGTERM, kill -9 and SIGTERM again, each in a random micro-batch of a random later update."""
    draw = random.Random(seed)
    # Checkpoints come after even updates: an odd one loses a row of the log to the kill, and makes it again.
    killed = draw.choice([3, 5])
    places = (draw.randrange(1, killed), killed, draw.randrange(killed + 1, UPDATES - 1))
    signals = (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM)
    return [Stop(update, draw.randrange(2), sign) for update, sign in zip(places, signals, strict=True)]


@pytest.mark.parametrize(
    ("name", "workers", "seed"),
    [
        ("ctc", (0, 0, 0, 0), 1),
        ("ctc", (2, 2, 2, 2), 2),
        ("pretraining", (0, 0, 0, 0), 3),
        ("pretraining", (2, 2, 2, 2), 4),
        # each session with another number of workers
        ("ctc", (0, 2, 0, 1), 5),
        ("asr", (2, 0, 1, 0), 6),
        ("data2vec, step", (0, 2, 0, 1), 7),
        ("data2vec, fairseq", (0, 0, 0, 0), 8),
        ("data2vec of text, step", (0, 2, 0, 1), 9),
        ("data2vec of text, fairseq", (0, 0, 0, 0), 10),
    ],
)
def test_interrupted_at_three_random_places_it_ends_with_the_same_bits(whole, tmp_path, name, workers, seed):
    kind, expected = KINDS[name], whole(name)
    for stop, number in zip(random_stops(seed), workers, strict=False):
        ended = kind.run(tmp_path, stop=stop, num_workers=number, code=75 if stop.signal == signal.SIGTERM else -9)
        if stop.signal == signal.SIGTERM:
            # in the last micro-batch of an update it is finished first
            told = r"told to stop: saved at update (\d+); run the same command again to go on\."
            saved = re.search(f"^{told}$", ended.stderr, re.MULTILINE)
            assert saved and stop.update <= int(saved[1]) <= stop.update + 2, ended.stderr[-2000:]
    resumed = kind.run(tmp_path, num_workers=workers[-1])
    assert "resumed at update " in resumed.stderr
    assert_same_bits(tmp_path, expected)
    # a row that a kill made twice stands there once
    assert rows_of(tmp_path) == rows_of(expected)


def test_the_command_itself_stopped_and_killed_from_outside_ends_with_the_same_bits(whole, tmp_path):
    kind, expected = KINDS["ctc"], whole("ctc")

    def reached(update: int) -> Callable[[], bool]:
        return lambda: any(int(path.name[-8:]) >= update for path in (tmp_path / "save").glob("step_*"))

    words = kind.words(tmp_path, ckpt_interval_updates=1, num_workers=2)
    killed = run_until(kind.script, words, reached(1), signal.SIGKILL)
    assert killed.code == -signal.SIGKILL, killed.stderr[-2000:]
    # the same command at once: nothing that the killed run left behind may stand in its way
    stopped = run_until(kind.script, words, reached(3), signal.SIGTERM)
    assert stopped.code == 75 and "resumed at update " in stopped.stderr, stopped.stderr[-2000:]
    done = run_script(kind.script, words)
    assert done.code == 0 and "resumed at update " in done.stderr, done.stderr[-2000:]
    assert_same_bits(tmp_path, expected)
    assert rows_of(tmp_path) == rows_of(expected)


def assert_nearly_equal_rows(found: Path, expected: Path) -> None:
    """The same rows, floats to 1e-4: sums of ranks come in another order."""
    ours, theirs = rows_of(found), rows_of(expected)
    assert [list(row) for row in ours] == [list(row) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert {name: mine[name] if isinstance(value, str) else pytest.approx(mine[name], rel=1e-4, abs=1e-4)
                for name, value in other.items()} == other  # fmt: skip


def test_torchrun_with_two_processes_equals_one_with_twice_the_accumulation(whole, tmp_path):
    kind, expected = KINDS["ctc"], whole("ctc")
    done = run_script(kind.script, kind.words(tmp_path), processes=2)
    assert done.code == 0, done.stderr[-3000:]
    assert "4 micro-batches, about 11 s of audio; 2 ranks, 2 accumulated on each" in done.stderr
    difference, name = largest_difference(tmp_path, expected)
    assert difference <= 1e-6, name
    assert_nearly_equal_rows(tmp_path, expected)
    ours, theirs = ((folder / "test_hypotheses.jsonl").read_text() for folder in (tmp_path, expected))
    assert sorted(ours.splitlines()) == sorted(theirs.splitlines())


@pytest.mark.parametrize("name", ["pretraining", "data2vec, step", "data2vec of text, step"])
def test_two_processes_pretrain_as_one_does(whole, tmp_path, name):
    kind, expected = KINDS[name], whole(name)
    ended = kind.run(tmp_path, processes=2)
    assert "2 ranks, 2 accumulated on each" in ended.stderr
    # one that outlives the group aborts the ending process now and then, and torchrun then calls the run failed
    assert "threads of the process group left: []" in ended.stderr
    difference, tensor = largest_difference(tmp_path, expected)
    assert difference <= 1e-6, tensor
    assert_nearly_equal_rows(tmp_path, expected)


def test_a_run_goes_on_with_another_number_of_processes(whole, tmp_path):
    kind, expected = KINDS["ctc"], whole("ctc")
    kind.run(tmp_path, stop=Stop(3, 1, signal.SIGKILL), code=-9, async_save=False)  # at 2 it is complete then
    # one rank alone is told to stop: both end, after the update that both are in
    ended = kind.run(tmp_path, processes=2, stop=Stop(5, 0, signal.SIGTERM), code=75)
    assert "resumed at update 2 " in ended.stderr
    assert "told to stop: saved at update 6; run the same command again to go on." in ended.stderr
    assert "resumed at update 6 " in kind.run(tmp_path, num_workers=1).stderr
    difference, name = largest_difference(tmp_path, expected)
    assert difference <= 1e-6, name
    assert_nearly_equal_rows(tmp_path, expected)
