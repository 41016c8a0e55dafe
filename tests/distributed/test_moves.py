"""A run goes on from its checkpoints in another number of processes, and from whole models in shards and back."""

from __future__ import annotations

import signal

import pytest

from tests.distributed.matrix import KINDS, WHOLE, largest_difference, largest_relative_difference, run
from tests.faults.real_runs import Stop

WEIGHTS = 1e-6
"""As between any two numbers of processes: what the order of sums does, nothing that the moves add."""


@pytest.mark.parametrize("name", ["ctc", "pretraining", "data2vec, step"] if WHOLE else ["data2vec, step"])
def test_a_run_moves_between_worlds_and_between_whole_models_and_shards(tmp_path, name):
    kind = KINDS[name]
    run(kind, tmp_path / "undisturbed")
    moved = tmp_path / "moved"
    keys = {"ckpt_interval_updates": 1, "valid_interval_updates": 4}
    worlds = [("ddp", 2), ("fsdp2", 2), ("fsdp2", 4 if WHOLE else 1), ("ddp", 1)]
    for update, (parallel, processes) in enumerate(worlds):
        last = update == len(worlds) - 1
        stop = None if last else Stop(update, 1 if processes == 1 else 0, signal.SIGTERM)
        ended = run(kind, moved, processes=processes, parallel=parallel, stop=stop, code=0 if last else 75, **keys)
        if update:
            assert "resumed at update " in ended.stderr
    weights, tensor = largest_difference(moved, tmp_path / "undisturbed")
    assert weights <= WEIGHTS, tensor
    assert largest_relative_difference(moved, tmp_path / "undisturbed") <= 1e-5


def test_shards_are_written_and_read_as_one_file(tmp_path):
    """The checkpoint of a sharded run holds what the one of an unsharded holds, optimizer's state included."""
    from toolkit.training.checkpoint_format import TensorFile, read_state

    kind, folders = KINDS["pretraining"], [tmp_path / "whole", tmp_path / "sharded"]
    run(kind, folders[0], max_updates=2)
    run(kind, folders[1], max_updates=2, processes=2, parallel="fsdp2")
    steps = [folder / "save" / "step_00000002" for folder in folders]
    for part in ("model", "optimizer"):
        with TensorFile(steps[0], part) as whole, TensorFile(steps[1], part) as sharded:
            assert sorted(whole.names()) == sorted(sharded.names())
            assert all(whole.shape(name) == sharded.shape(name) for name in whole.names())
    assert read_state(steps[0])["objects"]["optimizer"] == read_state(steps[1])["objects"]["optimizer"]
