"""Packing that is killed, runs out of disk or is interrupted; training from shards as from loose files."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.real_runs import DIGITS, ROOT, TEMPLATE, Stop, contents, digits_words, environment, run_forked

SHARD_MB = "0.02"


def pack(folder: Path, *words: str, workers: int = 2, limit: int | None = None) -> subprocess.Popen:
    """The command on the spoken digits, in shards of two or three utterances; ``limit``: bytes of a file at most."""
    command = [sys.executable, "-m", "toolkit", "shards", str(DIGITS / "train.csv"), str(folder)]
    command += ["--shard_mb", SHARD_MB, "--workers", str(workers), *words]

    def limited() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts jobs of the background with Ctrl-C ignored
        os.setsid()  # its processes can be counted by their group then
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=limited,
    )  # fmt: skip


def end(process: subprocess.Popen) -> tuple[int, str]:
    _, error = process.communicate(timeout=120)
    return process.returncode, error


def stop_when(process: subprocess.Popen, reached: Callable[[], bool], number: int) -> tuple[int, str]:
    """Send the signal to the one process as soon as ``reached()``."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.002)
    process.send_signal(number)
    return end(process)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The digits packed without disturbance."""
    folder = tmp_path_factory.mktemp("shards") / "whole"
    code, error = end(pack(folder, workers=1))
    assert code == 0, error
    return folder


def recorded_in(folder: Path) -> int:
    """Shards that the command has noted as finished; its workers may be ahead of that."""
    progress = folder / "progress.jsonl"
    return progress.read_text(encoding="utf-8").count("sha256") if progress.exists() else 0


@pytest.mark.parametrize(("workers", "finished"), [(1, 0), (1, 5), (2, 3)])
def test_killed_it_goes_on_and_ends_with_the_same_bytes(whole, tmp_path, workers, finished):
    folder = tmp_path / "packed"
    process = pack(folder, workers=workers)
    code, _ = stop_when(process, lambda: recorded_in(folder) >= finished, signal.SIGKILL)
    assert code == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while alive(process.pid):
        assert time.monotonic() < deadline, "its workers outlive it"
        time.sleep(0.05)
    kept = {path.name: path.stat().st_ino for path in folder.glob("shard-*.tar")}
    recorded = recorded_in(folder)
    assert not (folder / "manifest.csv").exists() and len(kept) < len(list(whole.glob("*.tar")))
    code, error = end(pack(folder, workers=workers))
    assert code == 0, error
    assert contents(folder) == contents(whole)
    same = [name for name, inode in kept.items() if (folder / name).stat().st_ino == inode]
    assert len(same) >= recorded >= finished


def test_interrupted_it_says_so_in_one_line(tmp_path, whole):
    folder = tmp_path / "packed"
    process = pack(folder, workers=1)
    code, error = stop_when(process, lambda: len(list(folder.glob("shard-*.tar"))) >= 2, signal.SIGINT)
    assert code == 130 and error.strip().startswith("interrupted; the same command goes on") and "Trace" not in error
    assert not list(folder.glob(".*.tmp"))
    assert end(pack(folder, workers=1))[0] == 0
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_cannot_be_written_is_one_sentence_and_leaves_no_half_shard(whole, tmp_path, workers):
    """A limit on the size of files stands for a full disk: the write fails in the middle of a shard."""
    folder = tmp_path / "packed"
    code, error = end(pack(folder, workers=workers, limit=15_000))
    assert code == 2, error
    assert error.startswith("error: the operating system refused to use '") and "shard-0000" in error
    assert "File too large" in error and error.count("\n") == 1
    left = contents(folder)
    assert "manifest.csv" not in left and not any(name.endswith(".tmp") for name in left)
    assert all(left[name] == contents(whole)[name] for name in left if name.endswith(".tar"))
    assert end(pack(folder, workers=workers))[0] == 0
    assert contents(folder) == contents(whole)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def train(output: Path, manifest: Path, *, stop: Stop | None = None, **keys: object) -> str:
    keys = {"train_manifest": manifest, "max_updates": 4, "batch_seconds": 3, "ckpt_interval_updates": 2, **keys}
    (ended,) = run_forked(TEMPLATE, digits_words(output, **keys), stop=stop)
    assert ended.code == (0 if stop is None else -stop.signal), ended.stderr[-2000:]
    return ended.stderr


def test_training_from_shards_is_training_from_the_loose_files(whole, tmp_path):
    code, error = end(pack(tmp_path / "pcm", "--pcm", "8000", "--shuffle", "3", workers=1))
    assert code == 0, error
    train(tmp_path / "loose", DIGITS / "train.csv")
    expected = weights(tmp_path / "loose")
    train(tmp_path / "flac", whole / "manifest.csv")
    # Begun on loose files, gone on with from shards: it is the same corpus.
    train(tmp_path / "both", DIGITS / "train.csv", stop=Stop(3, 0, signal.SIGKILL), async_save=False)
    assert "resumed at update 2 " in train(tmp_path / "both", tmp_path / "pcm" / "manifest.csv", num_workers=2)
    for other in ("flac", "both"):
        found = weights(tmp_path / other)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), other
