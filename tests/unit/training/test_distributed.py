"""Several processes as one: real torchrun, two gloo processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from toolkit.errors import DeviceError
from toolkit.training.devices import resolve_device
from toolkit.training.distributed import World, _buckets, environment_rank, init_world, reduce_gradients, run_on_main

ROOT = Path(__file__).resolve().parents[3]

HEADER = """
import sys, torch, datetime
from torch import nn
from toolkit.errors import *
from toolkit.training.devices import resolve_device
from toolkit.training.distributed import *
from toolkit.training.checkpoint import Checkpointer
def print(*words, **_):  # a line in one write: the processes share one pipe
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()
device = resolve_device("cpu")
world = init_world(device, timeout_minutes={timeout})
"""


def torchrun(tmp_path: Path, body: str, *, processes: int = 2, timeout: float = 1.0, good: bool = True) -> str:
    """Run ``body`` in several processes started by torchrun; returns their output together."""
    script = tmp_path / "script.py"
    script.write_text(HEADER.replace("{timeout}", str(timeout)) + body, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode == 0) == good, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_one_process_needs_no_group():
    world = World()
    assert world.is_main and world.size == 1 and world.backend is None
    tensor = torch.ones(2)
    assert world.all_reduce_sum(tensor) is tensor and world.all_reduce_sum([tensor]) == [tensor]
    assert world.all_reduce_sum({"a": 1, "b": torch.tensor(2.5)}) == {"a": 1, "b": 2.5}
    assert world.broadcast_object("x") == "x" and world.gather_objects(3) == [3]
    assert run_on_main(world, max, 2, 3) == 3
    parameter = torch.nn.Parameter(torch.ones(2))
    reduce_gradients(world, [parameter])
    assert parameter.grad is None
    world.close()


def test_sums_objects_and_results_over_two_processes(tmp_path):
    output = torchrun(
        tmp_path,
        """
mine = [0.1, 2**-40][world.rank]
checks = dict(
    exact=world.all_reduce_sum(mine) == 0.1 + 2**-40,
    whole=world.all_reduce_sum({"n": 2**60 + world.rank, "x": 0.5}) == {"n": 2**61 + 1, "x": 1.0},
    uneven=world.all_reduce_sum({str(world.rank): 1}) == {"0": 1, "1": 1},
    tensor=world.all_reduce_sum(torch.full((3,), world.rank + 1.0)).tolist() == [3.0] * 3,
    tensors=[t.item() for t in world.all_reduce_sum([torch.tensor(1.0), torch.tensor(2.0)])] == [2.0, 4.0],
    objects=world.gather_objects({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}],
    sent=world.broadcast_object(f"from {world.rank}") == "from 0",
    other=world.broadcast_object(f"from {world.rank}", source=1) == "from 1",
    main=run_on_main(world, lambda: world.rank) == 0,
    backend=world.backend == "gloo" and world.size == 2,
)
world.gather_objects(None)
print("bad", world.rank, [name for name, good in checks.items() if not good], flush=True)
world.close()
""",
    )
    assert "bad 0 []" in output and "bad 1 []" in output


def test_gradients_are_summed_and_missing_ones_count_as_zeros(tmp_path):
    output = torchrun(
        tmp_path,
        """
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 5), nn.Linear(5, 1), nn.Linear(3, 3))
model[3].weight.requires_grad_(False)
x = torch.randn(4, 7)
reference = [p.clone() for p in model.parameters()]
def loss(x, skip):
    y = model[0](x)
    return model[2](y if skip else model[1](y)).sum()          # the second process leaves a layer out
loss(x[2 * world.rank : 2 * world.rank + 2], skip=world.rank == 1).backward()
reduce_gradients(world, model.parameters(), bucket_mb=1e-4)
ours = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
model.zero_grad()
(loss(x[:2], False) + loss(x[2:], True)).backward()
same = all(torch.allclose(a, torch.zeros_like(p) if p.grad is None else p.grad, atol=1e-6)
           for a, p in zip(ours, model.parameters()) if p.requires_grad)
every = world.gather_objects([None if g is None else g.tolist() for g in ours])
print("good", world.rank, same, every[0] == every[1], ours[6] is None, ours[7].abs().sum().item() == 0, flush=True)
world.close()
""",
    )
    assert "good 0 True True True True" in output and "good 1 True True True True" in output


def test_two_processes_train_like_one_with_twice_the_accumulation(tmp_path):
    output = torchrun(
        tmp_path,
        """
def train(rank, size, reduce):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.randn(20, 4, 6, generator=torch.Generator().manual_seed(2))
    for update in range(5):
        optimizer.zero_grad()
        for micro in range(4):
            if micro % size == rank:
                (model(data[4 * update + micro]).square().sum() / 16).backward()
        if reduce:
            reduce_gradients(world, model.parameters())
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
both, alone = train(world.rank, 2, True), train(0, 1, False)
every = world.gather_objects(both.tolist())
print("same", world.rank, (both - alone).abs().max().item() < 1e-6, every[0] == every[1], flush=True)
world.close()
""",
    )
    assert "same 0 True True" in output and "same 1 True True" in output


def test_an_error_of_the_main_process_reaches_all(tmp_path):
    output = torchrun(
        tmp_path,
        """
def fail():
    raise ManifestError("the manifest is empty; prepare it again.")
try:
    run_on_main(world, fail)
except ManifestError as error:
    print("told", world.rank, error, flush=True)
try:
    run_on_main(world, open, "/nowhere/file")
except (OSError, ToolkitError) as error:
    print("second", world.rank, type(error).__name__, flush=True)
try:
    run_on_main(world, sys.exit, 75)
except SystemExit as ended:
    print("ended", world.rank, ended.code, flush=True)
world.close()
""",
    )
    for rank in (0, 1):
        assert f"told {rank} the manifest is empty; prepare it again." in output
        assert f"ended {rank} 75" in output
    assert "second 0 FileNotFoundError" in output and "second 1 ToolkitError" in output


def test_weights_of_two_names_come_to_all_as_they_are(tmp_path):
    output = torchrun(
        tmp_path,
        """
from toolkit.training.parallel import share_weights
model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "out": nn.Linear(2, 3)})
model["out"].weight = model["embedding"].weight
nn.init.constant_(model["out"].weight, 3.0 + world.rank)
nn.init.constant_(model["out"].bias, 5.0 + world.rank)
share_weights(world, model)
print("shared", world.rank, [sorted(set(p.flatten().tolist())) for p in model.parameters()], flush=True)
world.close()
""",
    )
    assert "shared 0 [[3.0], [5.0]]" in output and "shared 1 [[3.0], [5.0]]" in output


def test_a_process_that_ends_is_told_in_words(tmp_path):
    output = torchrun(
        tmp_path,
        """
if world.rank == 1:
    sys.exit(0)
sys.exit(run_main(lambda argv: world.gather_objects(None), []))
""",
        timeout=0.1,
        good=False,
    )
    assert "error: process 0 of 2 could not gather objects: another process" in output


def test_checkpoints_of_two_processes(tmp_path):
    output = torchrun(
        tmp_path,
        f"""
model = nn.Linear(2, 2)
nn.init.constant_(model.weight, 5.0)
checkpointer = Checkpointer({str(tmp_path / "save")!r}, world=world)
checkpointer.add("model", model)
path = checkpointer.save(3, {{"rank": world.rank}})
nn.init.zeros_(model.weight)
state = checkpointer.resume()
print("state", world.rank, state, model.weight.sum().item(), path.name, flush=True)
import shutil, pathlib
world.gather_objects(None)
if world.is_main:
    shutil.rmtree({str(tmp_path / "save")!r}); pathlib.Path({str(tmp_path / "save")!r}).write_text("a file")
world.gather_objects(None)
try:
    checkpointer.save(4)
except CheckpointError as error:
    print("refused", world.rank, str(error)[:14], flush=True)
world.close()
""",
    )
    for rank in (0, 1):
        assert f"state {rank} {{'rank': 0}} 20.0 step_00000003" in output
        assert f"refused {rank} the checkpoint" in output


def test_environment_in_words(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert environment_rank() == (0, 0, 1)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DeviceError, match="the environment variable WORLD_SIZE is None, but a whole number"):
        environment_rank()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(DeviceError, match="the environment variable WORLD_SIZE is 'two'"):
        environment_rank()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(DeviceError, match="RANK=1 and WORLD_SIZE=1; RANK must lie below WORLD_SIZE"):
        environment_rank()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert environment_rank() == (1, 1, 4)
    assert environment_rank(local_rank=0) == (1, 0, 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment_rank(local_rank=0) == (1, 1, 4)


def test_a_group_that_cannot_be_formed_is_told_in_words(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        values = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1]}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(DeviceError) as caught:
            init_world(resolve_device("cpu"), timeout_minutes=0.02)
    words = str(caught.value)
    assert words.startswith("process 1 of 2 on ") and "could not join the others at 127.0.0.1:" in words
    assert "\n" not in words


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("backend", ["nosuch", "cpu:gloo,cuda:nosuch"])
def test_a_library_that_torch_lacks_is_told_before_anyone_is_waited_for(monkeypatch, size, backend):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    if size:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(DeviceError, match=r"^torch has no collectives library 'nosuch' here \(known: .*gloo"):
        init_world(resolve_device("cpu"), backend=backend)
    if not torch.distributed.is_mpi_available():  # torch lists its name all the same
        with pytest.raises(DeviceError, match="no collectives library 'mpi' here"):
            init_world(resolve_device("cpu"), backend="mpi")
    if not size:
        assert init_world(resolve_device("cpu"), backend="gloo").size == 1


def test_buckets_hold_one_type_and_no_frozen_parameter():
    sizes = [(100, torch.float32), (100, torch.float32), (100, torch.float64), (500, torch.float32), (1, torch.float32)]
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in sizes]
    parameters.append(torch.nn.Parameter(torch.zeros(3), requires_grad=False))
    shapes = [[len(parameter) for parameter in bucket] for bucket in _buckets(parameters, 1000)]
    assert shapes == [[100, 100], [100], [500], [1]]
