"""Checkpoints: whole or not at all, sound or refused, the same run or told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from toolkit.errors import CheckpointError, ConfigError
from toolkit.training.checkpoint import Checkpointer, optimizer_from_tensors, optimizer_to_tensors
from toolkit.training.checkpoint_format import join_state, problem_of, split_state, without_copies
from toolkit.training.folders import open_output_folder, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[3]


class Counter:
    """Something with a state of numbers and tensors."""

    def __init__(self) -> None:
        self.state = {"epoch": 0, "best": float("inf"), "history": [torch.zeros(2)], "note": None}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def make_model(value: float = 0.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    if value:
        nn.init.constant_(model[0].weight, value)
    return model


def make_checkpointer(folder, value=0.0, **options):
    """A checkpointer over a model, an optimizer that has stepped, and a counter; and these three."""
    warned: list[str] = []
    torch.manual_seed(1)
    model = make_model(value)
    optimizer = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}])
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    checkpointer = Checkpointer(folder, log=warned.append, **options)
    counter = Counter()
    for name, part in (("model", model), ("optimizer", optimizer), ("counter", counter)):
        checkpointer.add(name, part)
    checkpointer.warned = warned
    return checkpointer, model, optimizer, counter


def flip_bit(path: Path, offset: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def same_tensors(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_gives_everything_back(tmp_path):
    checkpointer, model, optimizer, counter = make_checkpointer(tmp_path)
    counter.state = {"epoch": 3, "best": float("-inf"), "history": [torch.arange(3), 2.5], "note": "x"}
    path = checkpointer.save(12345, {"epoch": 3, "loss": 0.1, "nan": float("nan"), "n": np.int64(4)}, {"wer": 0.5})
    assert sorted(item.name for item in path.iterdir()) == [
        "checksums.json", "counter.safetensors", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    assert path == tmp_path / "step_00012345"
    other, model2, optimizer2, counter2 = make_checkpointer(tmp_path, value=9.0)
    state = other.load(other.find_latest())
    assert state["epoch"] == 3 and state["loss"] == 0.1 and state["n"] == 4 and state["nan"] != state["nan"]
    assert same_tensors(model.state_dict(), model2.state_dict())
    tensors, values = optimizer_to_tensors(optimizer, dict(model.named_parameters()))
    tensors2, values2 = optimizer_to_tensors(optimizer2, dict(model2.named_parameters()))
    assert same_tensors(tensors, tensors2) and values == values2
    assert counter2.state["best"] == float("-inf") and counter2.state["note"] == "x"
    assert torch.equal(counter2.state["history"][0], torch.arange(3)) and counter2.state["history"][1] == 2.5


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    path = make_checkpointer(tmp_path)[0].save(1)
    for file in path.iterdir():
        content = file.read_bytes()
        assert file.suffix in (".json", ".safetensors") and not content.startswith((b"\x80", b"PK"))


@pytest.mark.parametrize("opt_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_training_goes_on_to_the_bit(tmp_path, opt_class):
    def run(updates, resume_at=None):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        options = {"momentum": 0.9} if opt_class is torch.optim.SGD else {}
        optimizer = opt_class(model.parameters(), lr=0.05, **options)
        data = torch.randn(10, 8, 4)
        checkpointer = Checkpointer(tmp_path / opt_class.__name__)
        checkpointer.add("model", model)
        checkpointer.add("optimizer", optimizer)
        start = 0
        if resume_at is not None:
            nn.init.zeros_(model[0].weight)
            start = checkpointer.resume()["update"]
            assert start == resume_at
        for update in range(start, updates):
            optimizer.zero_grad()
            model(data[update]).square().sum().backward()
            optimizer.step()
        checkpointer.save(updates, {"update": updates})
        return model.state_dict()

    straight = run(10)
    for path in (tmp_path / opt_class.__name__).iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    run(4)
    assert same_tensors(run(10, resume_at=4), straight)


def test_optimizer_settings_come_back_and_the_machines_stay():
    model = nn.Linear(2, 2)
    names = dict(model.named_parameters())
    first = torch.optim.AdamW(model.parameters(), lr=0.5, betas=(0.8, 0.9), fused=True)
    second = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
    optimizer_from_tensors(second, names, *optimizer_to_tensors(first, names))
    group = second.param_groups[0]
    assert group["lr"] == 0.5 and group["betas"] == (0.8, 0.9) and group["foreach"] and not group["fused"]


def test_optimizer_over_other_parameters_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = dict(model.named_parameters())
    saved = optimizer_to_tensors(torch.optim.SGD(model[0].parameters(), lr=1.0), names)
    with pytest.raises(CheckpointError) as caught:
        optimizer_from_tensors(torch.optim.SGD(model.parameters(), lr=1.0), names, *saved)
    assert str(caught.value) == (
        "parameter group 0 of the optimizer does not fit the checkpoint: 1.bias, 1.weight only here, none only there; "
        "use the parameter groups that the run began with."
    )
    with pytest.raises(CheckpointError, match="belongs to no added module"):
        optimizer_to_tensors(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=1.0), names)


def test_tied_weights_and_views(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer("view", self.a.weight.detach()[0])

    model = Tied()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.add("model", model)
    checkpointer.save(1)
    with torch.no_grad():
        model.a.weight.zero_()
    checkpointer.resume()
    assert same_tensors(wanted, model.state_dict()) and same_tensors(wanted, checkpointer.average(1))
    distinct, aliases = without_copies({"x": torch.zeros(0), "y": torch.zeros(0)})
    assert set(distinct) == {"x", "y"} and not aliases


def test_compiled_modules_have_the_same_names(tmp_path):
    class Wrapper(nn.Module):
        """What torch.compile makes of a module, as to names."""

        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

    model = nn.Linear(2, 2)
    for part in (Wrapper(model), model):
        checkpointer = Checkpointer(tmp_path)
        checkpointer.add("model", part)
        checkpointer.save(1)
        assert sorted(checkpointer.average(1)) == ["bias", "weight"]
        checkpointer.resume()


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpointer = make_checkpointer(tmp_path, keep_last=2, keep_best=2, best_metric="wer")[0]
    for update, wer in enumerate([50.0, 10.0, 30.0, 20.0, 10.0, 40.0, float("nan"), 60.0], start=1):
        checkpointer.save(update, metrics={"wer": wer})
    assert [info.update for info in checkpointer.list()] == [2, 5, 7, 8]
    assert checkpointer.find_latest().name == "step_00000008"
    assert checkpointer.find_best().name == "step_00000005"
    assert checkpointer.find_best(mode="max").name == "step_00000008"
    assert checkpointer.find_best("loss") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_0000000{n}" for n in (2, 5, 7, 8)]


def test_saving_the_same_update_again_replaces_it(tmp_path):
    checkpointer, model, *_ = make_checkpointer(tmp_path)
    checkpointer.save(1, {"a": 1})
    checkpointer.find_latest()
    nn.init.constant_(model[0].weight, 3.0)
    checkpointer.save(1, {"a": 2})
    assert checkpointer.resume() == {"a": 2} and [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_average_of_the_last_and_of_the_best(tmp_path):
    checkpointer, model, *_ = make_checkpointer(tmp_path, keep_last=5)
    for update, value in enumerate([1.0, 2.0, 6.0], start=1):
        nn.init.constant_(model[0].weight, value)
        model[1].num_batches_tracked.fill_(update)
        checkpointer.save(update, metrics={"wer": value})
    average = checkpointer.average(2)
    assert average["0.weight"].unique().tolist() == [4.0] and average["1.num_batches_tracked"] == 3
    assert checkpointer.average(2, metric="wer")["0.weight"].unique().tolist() == [1.5]
    assert checkpointer.average(9)["0.weight"].unique().tolist() == [3.0]
    assert checkpointer.warned == ["The average is over 3 checkpoints, because there are no 9."]
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        Checkpointer(tmp_path / "empty").average(1)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "counter.safetensors", "state.json"])
def test_a_flipped_bit_is_refused_by_name_and_the_one_before_taken(tmp_path, name):
    checkpointer = make_checkpointer(tmp_path)[0]
    checkpointer.save(1, {"n": 1})
    checkpointer.save(2, {"n": 2})
    flip_bit(tmp_path / "step_00000002" / name, -3)
    other = make_checkpointer(tmp_path)[0]
    with pytest.raises(CheckpointError) as caught:
        other.load(tmp_path / "step_00000002")
    assert f"step_00000002 is not used: the checksum of its {name} is wrong" in str(caught.value)
    assert other.resume() == {"n": 1}
    assert any("step_00000002" in words and name in words for words in other.warned)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_damaged_checkpoint_takes_no_sound_ones_place(tmp_path):
    """By its update the damaged one would be the newest, and each later one be deleted as soon as it is written."""
    first = make_checkpointer(tmp_path, keep_last=2)[0]
    for update in (1, 9):
        first.save(update, {"n": update})
    flip_bit(tmp_path / "step_00000009" / "model.safetensors")
    resumed = make_checkpointer(tmp_path, keep_last=1)[0]
    assert resumed.resume() == {"n": 1}
    assert names_in(tmp_path) == ["step_00000001", "step_00000009.damaged"]
    assert "step_00000009 is set aside as step_00000009.damaged" in resumed.warned[-1]
    for update in (2, 3):
        resumed.save(update, {"n": update})
        assert names_in(tmp_path) == [f"step_0000000{update}", "step_00000009.damaged"]
    assert make_checkpointer(tmp_path)[0].resume() == {"n": 3}
    # The same update again, and damaged again.
    resumed.save(9, {"n": 9})
    assert make_checkpointer(tmp_path)[0].resume() == {"n": 9}
    resumed.keep_last = 2
    resumed.save(10, {"n": 10})
    flip_bit(tmp_path / "step_00000009" / "model.safetensors")
    flip_bit(tmp_path / "step_00000010" / "model.safetensors")
    resumed = make_checkpointer(tmp_path)[0]
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        resumed.resume()
    assert names_in(tmp_path) == ["step_00000009", "step_00000009.damaged", "step_00000010"]
    resumed.save(8, {"n": 8})
    assert resumed.resume() == {"n": 8}
    assert names_in(tmp_path) == ["step_00000008", "step_00000009.damaged", "step_00000009.damaged2",
                                  "step_00000010.damaged"]  # fmt: skip


def test_who_only_reads_sets_nothing_aside(tmp_path):
    first = make_checkpointer(tmp_path, keep_best=2, best_metric="wer")[0]
    for update in (1, 2):
        first.save(update, {"n": update}, {"wer": 1 / update})
    flip_bit(tmp_path / "step_00000002" / "model.safetensors")
    reader, *_ = make_checkpointer(tmp_path, best_metric="wer")
    assert reader.find_latest() == reader.find_best() == tmp_path / "step_00000001"
    reader.load(tmp_path / "step_00000001", resume=False)
    reader.average(1)
    other_data = make_checkpointer(tmp_path, manifests={"train": "other"})[0]
    first.manifests = {"train": "these"}
    first.save(1)
    with pytest.raises(CheckpointError, match="the data changed"):  # refused: it is no run of this folder
        other_data.resume()
    assert names_in(tmp_path) == ["step_00000001", "step_00000002"]


def test_what_is_found_damaged_on_the_way_does_not_count(tmp_path):
    checkpointer = make_checkpointer(tmp_path, keep_last=1, keep_best=1, best_metric="wer")[0]
    for update, wer in ((1, 1.0), (2, 3.0), (3, 2.0)):
        checkpointer.save(update, metrics={"wer": wer})
        checkpointer.keep_last = 2
    flip_bit(tmp_path / "step_00000001" / "model.safetensors")
    assert checkpointer.find_best().name == "step_00000003"
    checkpointer.keep_last = 1
    checkpointer.save(4, metrics={"wer": 4.0})
    assert names_in(tmp_path) == ["step_00000001", "step_00000003", "step_00000004"]


def test_half_and_foreign_folders_never_count(tmp_path):
    checkpointer = make_checkpointer(tmp_path)[0]
    checkpointer.save(3, {"n": 3})
    sound = tmp_path / "step_00000003"
    (tmp_path / "step_00000009").mkdir()
    (tmp_path / "notes").mkdir()
    for update, damage in ((4, "missing"), (5, "short"), (6, "sums"), (7, "foreign")):
        folder = tmp_path / f"step_0000000{update}"
        folder.mkdir()
        for file in sound.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if damage == "missing":
            (folder / "model.safetensors").unlink()
        elif damage == "short":
            content = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(content[:-10])
        elif damage == "sums":
            (folder / "checksums.json").write_text("{", encoding="utf-8")
        else:
            (folder / "checksums.json").write_text('{"files": {}}', encoding="utf-8")
    other = make_checkpointer(tmp_path)[0]
    assert other.resume() == {"n": 3}
    reasons = {words.split(" is passed over: ")[0][-1]: words.split(" is passed over: ")[1] for words in other.warned}
    assert reasons["9"] == "it has no checksums.json, so it was never finished."
    assert reasons["4"] == "its model.safetensors is missing."
    assert "bytes instead of" in reasons["5"] and reasons["6"] == "its checksums.json is damaged."
    assert reasons["7"] == "its checksums.json names no state.json."


def test_none_sound_left_is_an_error_none_there_is_a_fresh_start(tmp_path):
    checkpointer = make_checkpointer(tmp_path)[0]
    assert checkpointer.resume() is None and checkpointer.find_best() is None
    path = checkpointer.save(1)
    flip_bit(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* is sound \(step_00000001\)"):
        make_checkpointer(tmp_path)[0].resume()


def test_another_architecture_is_told_with_names_and_shapes(tmp_path):
    path = make_checkpointer(tmp_path)[0].save(1)
    other = Checkpointer(tmp_path)
    other.add("model", nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.Linear(1, 1)))
    with pytest.raises(CheckpointError) as caught:
        other.load(path)
    assert str(caught.value).endswith(
        "does not fit the model: 2 of 11 tensors are missing (3.bias, 3.weight), 0 are not known (none), 2 have "
        "another shape (2.bias is (2,) there and (5,) here, 2.weight is (2, 4) there and (5, 4) here); use the "
        "architecture that the run began with."
    )


def test_changed_manifests_are_refused_and_changed_settings_told(tmp_path):
    settings = {"lr": 0.1, "encoder.num_layers": 4, "best": float("inf")}
    checkpointer = make_checkpointer(tmp_path, manifests={"train.csv": "aa", "more.csv": "bb"}, settings=settings)[0]
    path = checkpointer.save(1)
    other = make_checkpointer(tmp_path, manifests={"train.csv": "cc", "more.csv": "bb"}, settings=settings)[0]
    with pytest.raises(CheckpointError) as caught:
        other.resume()
    assert str(caught.value) == (
        f"the data changed since the checkpoint {path}: train.csv; its place in the epoch means other data now. "
        "Restore the former data to go on with this run, or give another --output_folder to begin one on the new data."
    )
    other.load(path, resume=False)
    changed = {"lr": 0.2, "best": float("inf"), "dropout": 0.1}
    other = make_checkpointer(tmp_path, manifests={"train.csv": "aa", "more.csv": "bb"}, settings=changed)[0]
    assert other.resume() == {}
    assert other.warned == [
        "Settings differ from those of the checkpoint step_00000001: dropout (not set) -> 0.1, encoder.num_layers 4 -> "
        "(not set), lr 0.1 -> 0.2."
    ]


def test_what_cannot_be_saved_is_told_with_its_place(tmp_path):
    checkpointer = make_checkpointer(tmp_path)[0]
    with pytest.raises(CheckpointError, match=r"the state of the run holds a set at 'a\.b'"):
        checkpointer.save(1, {"a": {"b": {1, 2}}})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"'x' \(int\) has no state_dict"):
        checkpointer.add("x", 3)
    with pytest.raises(ConfigError, match="is no name for a part"):
        checkpointer.add("../x", nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="best_mode must be min or max"):
        Checkpointer(tmp_path, best_mode="lowest")


def test_states_go_through_json_and_back():
    value = {"a": [1, 2.5, None, True, "x"], "b": {"c": torch.ones(2)}, "d": float("-inf")}
    plain, tensors = split_state(value, where="x")
    again = join_state(json.loads(json.dumps(plain, allow_nan=False)), tensors.__getitem__)
    assert torch.equal(again["b"]["c"], torch.ones(2)) and again["a"] == value["a"] and again["d"] == value["d"]


def test_a_newer_format_is_told(tmp_path):
    path = make_checkpointer(tmp_path)[0].save(1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    checkpointer = make_checkpointer(tmp_path)[0]
    checkpointer._verified.add(path)
    with pytest.raises(CheckpointError, match="written by a newer version"):
        checkpointer.load(path)


# ---------------------------------------------------------------- disks and processes that fail

SAVE_UNDER_LIMIT = """
import resource, signal, sys
import torch
from toolkit.errors import run_main
from toolkit.training.checkpoint import Checkpointer
def main(argv):
    folder, megabytes = argv
    model = torch.nn.Linear(16, 16)
    checkpointer = Checkpointer(folder, keep_last=5)
    checkpointer.add("model", model)
    checkpointer.save(1, {"n": 1}); checkpointer.save(2, {"n": 2})
    big = Checkpointer(folder, keep_last=5)
    big.add("model", torch.nn.Linear(1024, 1024 * 3))
    if float(megabytes):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(float(megabytes) * 2**20),) * 2)
    big.save(3)
sys.exit(run_main(main))
"""


def check_nothing_half_stays(folder: Path, done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: the checkpoint ")
    assert "could not be written (step_00000001, step_00000002 remain valid): " in done.stderr and reason in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001", "step_00000002"]
    assert all(problem_of(path, thorough=True) is None for path in folder.iterdir())


def run_code(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)


def test_a_full_disk_leaves_nothing_half(tmp_path):
    """On a real file system of 8 MiB where it may be mounted."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        done = run_code(SAVE_UNDER_LIMIT, str(tmp_path / "save"), "0")
        check_nothing_half_stays(tmp_path / "save", done, "no space left on the device")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_limit_on_file_sizes_leaves_nothing_half(tmp_path):
    done = run_code(SAVE_UNDER_LIMIT, str(tmp_path / "save"), "4")
    check_nothing_half_stays(tmp_path / "save", done, "File too large")


def test_killed_while_saving_every_folder_is_sound(tmp_path):
    """A process that saves all the time is killed at a few moments; what stays named like a checkpoint is one."""
    code = (
        "import sys, torch, itertools\n"
        "from toolkit.training.checkpoint import Checkpointer\n"
        "c = Checkpointer(sys.argv[1]); c.add('model', torch.nn.Linear(500, 500))\n"
        "for n in itertools.count(int(sys.argv[2])):\n"
        "    c.save(n); print(n, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for round_number in range(3):
        command = [sys.executable, "-c", code, str(tmp_path), str(1000 * round_number)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        process.stdout.readline()
        time.sleep(0.037 * (1 + round_number))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        folders = [path for path in tmp_path.iterdir() if path.name.startswith("step_")]
        assert folders and all(problem_of(path, thorough=True) is None for path in folders)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.add("model", nn.Linear(500, 500))
    checkpointer.resume()
    checkpointer.save(10**6)
    assert all(path.name.startswith("step_") for path in tmp_path.iterdir())


def test_a_folder_that_stepped_aside_comes_back(tmp_path):
    checkpointer = make_checkpointer(tmp_path)[0]
    path = checkpointer.save(1)
    os.replace(path, tmp_path / ".step_00000001.old")
    (tmp_path / ".step_00000005.new").mkdir()
    checkpointer.save(2)
    assert [info.update for info in checkpointer.list()] == [1, 2]
    assert not list(tmp_path.glob(".step_*"))


def test_a_second_run_on_one_folder_is_told(tmp_path):
    lock = open_output_folder(tmp_path / "run")
    code = (
        "import sys\nfrom toolkit.errors import run_main\nfrom toolkit.training.folders import open_output_folder\n"
        "sys.exit(run_main(lambda argv: open_output_folder(argv[0]) and None))\n"
    )
    done = run_code(code, str(tmp_path / "run"))
    assert done.returncode == 2 and done.stderr.startswith(
        f"error: another run is writing to {tmp_path / 'run'} (process {os.getpid()} on "
    )
    assert done.stderr.endswith("); wait until it has ended, stop it, or choose another --output_folder.\n")
    lock.release()
    assert run_code(code, str(tmp_path / "run")).returncode == 0
    with open_output_folder(tmp_path / "run") as again:
        assert again.is_held
    assert not again.is_held


def test_output_folders_that_cannot_be_are_told(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError) as caught:
            open_output_folder(folder)
        words = f"--output_folder {folder} lies at or under a file, not a folder; choose another name."
        assert str(caught.value) == words
    with pytest.raises(ConfigError) as caught:
        open_output_folder("/proc/no_such_run")
    words = "--output_folder /proc/no_such_run cannot be made there; choose another folder."
    assert str(caught.value) == words


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = write_atomic(tmp_path / "a" / "b.txt", "one")
    write_atomic(path, b"two")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomic(path, fail)
    assert path.read_text() == "two" and [item.name for item in path.parent.iterdir()] == ["b.txt"]
    assert json.loads(write_json(tmp_path / "c.json", {"a": [1, "é"]}).read_text(encoding="utf-8")) == {"a": [1, "é"]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "c.json", float("nan"))
