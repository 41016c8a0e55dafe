"""Checkpoints written beside training: the same files, of the moment of the save, and no failure lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.training.test_brain import ListLoader, Regression, make, pairs
from tests.unit.training.test_checkpoint import (
    SAVE_UNDER_LIMIT,
    check_nothing_half_stays,
    make_checkpointer,
    run_code,
)
from tests.unit.training.test_distributed import torchrun
from toolkit.errors import CheckpointError
from toolkit.training.background import BackgroundTask, Snapshot
from toolkit.training.checkpoint import Checkpointer
from toolkit.training.checkpoint_format import problem_of
from toolkit.training.limits import Requeue

BACKGROUND_LIMIT = SAVE_UNDER_LIMIT.replace("big.save(3)", "big.save(3, wait=False); big.wait()")


class Held(Checkpointer):
    """Writes, but not before ``go`` is set; notes the threads that write."""

    def __init__(self, folder, **options):
        super().__init__(folder, **options)
        self.go, self.threads = threading.Event(), []

    def _write(self, *args):
        self.threads.append(threading.current_thread())
        self.go.wait()
        super()._write(*args)

    def release_soon(self):
        threading.Timer(0.3, self.go.set).start()


def held(folder, **options):
    """A held checkpointer over the parts of `make_checkpointer`."""
    parts = dict(zip(("model", "optimizer", "counter"), make_checkpointer(folder)[1:], strict=True))
    checkpointer = Held(folder, **options)
    for name, part in parts.items():
        checkpointer.add(name, part)
    return checkpointer, parts


def break_folder(folder: Path) -> None:
    """Put a file where the folder of the checkpoints is."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("")


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def tensor_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def state_of(path: Path) -> dict:
    return {**json.loads((path / "state.json").read_text()), "time": None}


# ---------------------------------------------------------------- what is written


class Awkward(nn.Module):
    """Tied weights, views of one memory, a strided weight, several types, a scalar and an empty buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.strided = nn.Parameter(torch.randn(5, 3).t())
        whole = torch.randn(12)
        buffers = {
            "left": whole[:6], "right": whole[6:], "right_again": whole[6:], "coarse": torch.randn(3).bfloat16(),
            "count": torch.tensor(7), "empty": torch.zeros(0, 2),
        }  # fmt: skip
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def test_the_files_are_those_of_a_save_that_waits(tmp_path):
    paths = []
    for wait in (True, False):
        model = Awkward()
        optimizer = torch.optim.AdamW(model.parameters())
        (model.first.weight.sum() + model.strided.sum()).backward()
        optimizer.step()
        checkpointer = Checkpointer(tmp_path / str(wait), settings={"lr": 0.1})
        counter = make_checkpointer(tmp_path)[3]
        for name, part in (("model", model), ("optimizer", optimizer), ("counter", counter)):
            checkpointer.add(name, part)
        paths.append(checkpointer.save(3, {"epoch": 1}, {"wer": 0.5}, wait=wait))
        checkpointer.wait()
    first, second = paths
    assert tensor_files(first) == tensor_files(second) and len(tensor_files(first)) == 3
    assert state_of(first) == state_of(second)
    assert state_of(first)["aliases"] == {"model": {"second.weight": "first.weight", "right_again": "right"}}
    assert sorted(file.name for file in first.iterdir()) == sorted(file.name for file in second.iterdir())
    assert problem_of(second, thorough=True) is None


def test_what_training_changes_after_the_save_is_not_in_it(tmp_path):
    checkpointer, parts = held(tmp_path / "background")
    whole = Checkpointer(tmp_path / "waited", manifests={"train": "aa"})
    checkpointer.manifests["train"] = "aa"
    for name, part in parts.items():
        whole.add(name, part)
    progress = {"history": [1, 2]}
    wanted = whole.save(1, progress)
    path = checkpointer.save(1, progress, wait=False)
    parts["model"](torch.randn(5, 3)).square().sum().backward()
    parts["optimizer"].step()
    parts["counter"].state["history"][0].add_(1)
    progress["history"].append(3)
    checkpointer.manifests["train"] = "bb"
    assert not path.exists()
    checkpointer.go.set()
    checkpointer.wait()
    assert tensor_files(path) == tensor_files(wanted) and state_of(path) == state_of(wanted)


def test_buffers_are_used_again_where_they_fit():
    snapshot = Snapshot()

    def places(*tensors):
        snapshot.begin()
        copies = [snapshot.copy(tensor) for tensor in tensors]
        snapshot.end()
        assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
        return [copy.data_ptr() for copy in copies]

    tensors = [torch.randn(1000), torch.randn(30, 40)]
    first = places(*tensors)
    assert places(*(tensor + 1 for tensor in tensors)) == first
    assert places(torch.randn(1000), torch.randn(50, 40))[0] == first[0]
    assert places(tensors[0].double())[0] != first[0]


def test_a_tensor_that_lives_only_for_the_save_is_not_taken_for_another():
    """Memory that is freed and given to the next tensor must not look like a tied weight."""
    snapshot = Snapshot()
    snapshot.begin()
    copies = [snapshot.copy(torch.full((1000,), float(value))) for value in range(20)]
    copies += [snapshot.copy(torch.full((1000,), float(value)), True) for value in range(20, 40)]
    gathered = torch.ones(3)
    is_held = weakref.ref(gathered)
    snapshot.copy(gathered, True)
    del gathered
    assert is_held() is None  # gathered one by one, they must not add up to the whole model
    snapshot.end()
    assert [int(copy[0]) for copy in copies] == list(range(40))


# ---------------------------------------------------------------- who waits


@pytest.mark.parametrize(
    "look",
    [
        lambda checkpointer: [info.update for info in checkpointer.list()] == [1],
        lambda checkpointer: checkpointer.find_latest().name == "step_00000001",
        lambda checkpointer: checkpointer.find_best("wer").name == "step_00000001",
        lambda checkpointer: checkpointer.load(checkpointer.folder / "step_00000001") == {"n": 1},
        lambda checkpointer: checkpointer.resume() == {"n": 1},
        lambda checkpointer: len(checkpointer.average(1)) > 3,
        lambda checkpointer: checkpointer.wait() is None and (checkpointer.folder / "step_00000001").exists(),
        lambda checkpointer: checkpointer.close() is None and (checkpointer.folder / "step_00000001").exists(),
        lambda checkpointer: checkpointer.save(2).exists() and (checkpointer.folder / "step_00000001").exists(),
    ],
)
def test_whoever_needs_the_checkpoints_waits(tmp_path, look):
    checkpointer, _ = held(tmp_path)
    path = checkpointer.save(1, {"n": 1}, {"wer": 0.5}, wait=False)
    assert not path.exists() and checkpointer.is_writing
    checkpointer.release_soon()
    assert look(checkpointer) and not checkpointer.is_writing


def test_the_next_save_waits_for_the_one_before(tmp_path):
    checkpointer, parts = held(tmp_path)
    checkpointer.save(1, wait=False)
    done = []
    second = threading.Thread(target=lambda: done.append(checkpointer.save(2, wait=False)))
    second.start()
    second.join(0.2)
    assert not done and second.is_alive()
    checkpointer.go.set()
    second.join()
    assert [info.update for info in checkpointer.list()] == [1, 2]
    with torch.no_grad():
        parts["model"][0].weight.zero_()
    checkpointer.save(3, wait=False)
    assert [info.update for info in checkpointer.list()] == [2, 3]  # the oldest went once the newest was complete


@pytest.mark.parametrize("ending", ["", "raise SystemExit(75)", "1 / 0"])
def test_the_end_of_the_process_waits(tmp_path, ending):
    code = (
        "import sys, torch\nfrom toolkit.training.checkpoint import Checkpointer\n"
        "c = Checkpointer(sys.argv[1]); c.add('model', torch.nn.Linear(2000, 2000)); c.save(1, wait=False)\n"
    )
    run_code(code + ending, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert problem_of(tmp_path / "step_00000001", thorough=True) is None


# ---------------------------------------------------------------- what fails


def test_a_failure_is_raised_once_where_the_next_waits(tmp_path):
    folder = tmp_path / "save"
    sentence = f"the checkpoint {folder / 'step_00000001'} could not be written (there is no earlier one): "
    for ask in (lambda c: c.wait(), lambda c: c.save(2), lambda c: c.save(2, wait=False), lambda c: c.list()):
        break_folder(folder)
        checkpointer = make_checkpointer(folder)[0]
        checkpointer.save(1, wait=False)
        with pytest.raises(CheckpointError) as caught:
            ask(checkpointer)
        assert str(caught.value).startswith(sentence) and not checkpointer.has_failed
        folder.unlink()
        checkpointer.save(3, wait=False)
        assert [info.update for info in checkpointer.list()] == [3]
        shutil.rmtree(folder)


def test_a_save_that_waits_is_tried_though_the_one_before_failed(tmp_path):
    folder = tmp_path / "save"
    break_folder(folder)
    checkpointer = make_checkpointer(folder)[0]
    checkpointer.save(1, wait=False)
    wait_for(lambda: not checkpointer.is_writing)
    folder.unlink()
    assert checkpointer.save(2).exists()
    assert len(checkpointer.warned) == 1 and checkpointer.warned[0].startswith(
        f"The checkpoint {folder / 'step_00000001'} could not be written (there is no earlier one): "
    )


def test_a_failure_that_nobody_waits_for_is_a_warning(tmp_path):
    folder = tmp_path / "save"
    break_folder(folder)
    checkpointer = make_checkpointer(folder)[0]
    checkpointer.save(1, wait=False)
    checkpointer.close()
    assert len(checkpointer.warned) == 1 and checkpointer.warned[0].startswith(
        f"The checkpoint {folder / 'step_00000001'} could not be written (there is no earlier one): "
    )
    checkpointer.close()
    assert len(checkpointer.warned) == 1


def test_any_error_of_a_task_comes_to_who_waits():
    task = BackgroundTask()
    task.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task.wait()
    task.wait()
    task.start([].pop)
    with pytest.raises(IndexError):
        task.start(print)


def test_a_full_disk_in_the_background_leaves_nothing_half(tmp_path):
    """On a real file system of 8 MiB where it may be mounted."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        done = run_code(BACKGROUND_LIMIT, str(tmp_path / "save"), "0")
        check_nothing_half_stays(tmp_path / "save", done, "no space left on the device")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_limit_on_file_sizes_in_the_background_leaves_nothing_half(tmp_path):
    done = run_code(BACKGROUND_LIMIT, str(tmp_path / "save"), "4")
    check_nothing_half_stays(tmp_path / "save", done, "File too large")


def test_killed_while_the_thread_writes_the_one_before_counts(tmp_path):
    code = (
        "import os, pathlib, sys, torch\nfrom toolkit.training.checkpoint import Checkpointer\n"
        "folder = pathlib.Path(sys.argv[1]); model = torch.nn.Linear(3000, 3000)\n"
        "c = Checkpointer(folder); c.add('model', model)\n"
        "c.save(1, {'n': 1}, wait=False); c.wait(); c.save(2, {'n': 2}, wait=False)\n"
        "while not (folder / '.step_00000002.new').exists():\n    pass\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert run_code(code, str(tmp_path)).returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step_00000002.new", "step_00000001"]
    checkpointer = Checkpointer(tmp_path)
    checkpointer.add("model", nn.Linear(3000, 3000))
    assert checkpointer.resume() == {"n": 1}
    checkpointer.save(2, wait=False)
    assert [info.update for info in checkpointer.list()] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


# ---------------------------------------------------------------- the Brain


def one_epoch(updates):
    return ListLoader(*[[pairs(0, 4)]] * updates)


@pytest.mark.parametrize("async_save", [True, False])
def test_a_run_saves_beside_training_and_waits_for_its_last(tmp_path, async_save):
    checkpointer = Held(tmp_path, keep_last=9)
    checkpointer.go.set()
    brain = make(checkpointer=checkpointer, max_updates=5, ckpt_interval_updates=2, async_save=async_save)
    brain.fit(one_epoch(5), ListLoader([pairs(8, 10)]))
    beside = [thread is not threading.main_thread() for thread in checkpointer.threads]
    assert beside == [async_save, async_save, False]  # after 2, 4 and all 5 updates
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_0000000{update}" for update in (2, 4, 5)]


def test_a_run_that_is_stopped_is_certain_of_its_checkpoint(tmp_path):
    class Stopped(Regression):
        def on_update_end(self, result):
            if self.update == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                checkpointer.release_soon()

    checkpointer = Held(tmp_path)
    with pytest.raises(Requeue):
        make(Stopped, checkpointer=checkpointer, max_updates=9, ckpt_interval_updates=3).fit(one_epoch(9))
    assert not checkpointer.is_writing and (tmp_path / "step_00000003").exists()


def test_a_run_that_ends_by_an_error_has_written_what_it_began(tmp_path):
    class Broken(Regression):
        def compute_forward(self, batch, stage):
            if self.update == 3:
                checkpointer.release_soon()
                raise ZeroDivisionError
            return super().compute_forward(batch, stage)

    checkpointer = Held(tmp_path)
    with pytest.raises(ZeroDivisionError):
        make(Broken, checkpointer=checkpointer, max_updates=9, ckpt_interval_updates=3).fit(one_epoch(9))
    assert not checkpointer.is_writing and [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_a_failure_ends_the_run_at_the_next_update(tmp_path):
    class Unlucky(Regression):
        def on_update_end(self, result):
            if self.update == 4:
                break_folder(folder)
            if self.update == 6:
                wait_for(self.saver.has_failed)

    folder = tmp_path / "save"
    brain = make(Unlucky, checkpointer=Checkpointer(folder), max_updates=500, ckpt_interval_updates=5)
    with pytest.raises(CheckpointError) as caught:
        brain.fit(one_epoch(500))
    assert str(caught.value).startswith(f"the checkpoint {folder / 'step_00000005'} could not be written ")
    assert brain.update in (6, 7)  # the thread may fail before the sixth update is complete, or after


TWO_PROCESSES = """
import functools
from pathlib import Path
from tests.unit.training.test_brain import ListLoader, Regression, pairs
from tests.unit.training.test_checkpoint_background import break_folder, wait_for
from toolkit.training.brain import RunContext
folder = Path(sys.argv[0]).parent / "save"
class Unlucky(Regression):
    def on_update_end(self, result):
        if self.update == BROKEN and world.is_main:
            wait_for(lambda: not self.saver.checkpointer.is_writing)
            break_folder(folder)
        if self.update == 6 and world.is_main and INTERVAL > 1:
            wait_for(self.saver.has_failed)
torch.manual_seed(1)
options = {"precision": "fp32", "max_updates": 500, "ckpt_interval_minutes": None, "ckpt_interval_updates": INTERVAL}
brain = Unlucky({"model": nn.Linear(3, 1)}, functools.partial(torch.optim.AdamW, lr=0.01), run_opts=options,
                checkpointer=Checkpointer(folder, world=world), context=RunContext(world=world))
try:
    brain.fit(ListLoader(*[[pairs(2 * world.rank, 2 * world.rank + 2)]] * 500))
except CheckpointError as error:
    print(f"process {world.rank} ends at update {brain.update}: {error}")
world.close()
"""


@pytest.mark.parametrize(("interval", "broken"), [(5, 4), (1, 5)])
def test_a_failure_of_the_main_process_ends_both(tmp_path, interval, broken):
    """With few saves the failure travels with an update; with one after each update the next save may meet it first."""
    output = torchrun(tmp_path, TWO_PROCESSES.replace("INTERVAL", str(interval)).replace("BROKEN", str(broken)))
    said = f"ends at update %d: the checkpoint {tmp_path / 'save' / 'step_00000005'} could not be written (there is no"
    assert any(f"process 0 {said % last}" in output and f"process 1 {said % last}" in output for last in (6, 7))
