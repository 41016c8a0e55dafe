"""Several processes give the loss curve of one at the same effective batch, whole on each or in shards."""

from __future__ import annotations

import pytest

from tests.distributed.matrix import (
    FEW,
    KINDS,
    MATRIX,
    WHOLE,
    largest_difference,
    largest_relative_difference,
    run,
)

LOSS = 1e-5
"""Largest relative difference between losses of the same update."""

WEIGHTS = 1e-6
"""Largest difference between weights at the end, a teacher's among them: sums of ranks come in another order."""


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process, made once for each model."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("one")
            run(KINDS[name], made[name])
        return made[name]

    return make


@pytest.mark.parametrize(("name", "parallel", "processes"), MATRIX if WHOLE else FEW)
def test_processes_give_the_curve_of_one(one, tmp_path, name, parallel, processes):
    expected = one(name)
    ended = run(KINDS[name], tmp_path, processes=processes, parallel=parallel)
    loss = largest_relative_difference(tmp_path, expected)
    norm = largest_relative_difference(tmp_path, expected, ["grad_norm"])
    weights, tensor = largest_difference(tmp_path, expected)
    what = f"loss {loss:.1e} and gradient norm {norm:.1e} relative, weights {weights:.1e} ({tensor})"
    print(f"{name}, {parallel}, {processes}: {what}")
    assert loss <= LOSS
    assert norm <= 1e-4  # Adam would hide a gradient of another scale
    assert weights <= WEIGHTS, tensor
    # one that outlives the group aborts the ending process now and then, and torchrun then calls the run failed
    assert "threads of the process group left: []" in ended.stderr


def the_teacher_moves_alike(tmp_path):
    """It moves once a micro-batch of each rank, so that two processes are compared with two."""
    folders = {parallel: tmp_path / parallel for parallel in ("ddp", "fsdp2")}
    for parallel, folder in folders.items():
        run(KINDS["data2vec, fairseq"], folder, processes=2, parallel=parallel)
    weights, tensor = largest_difference(folders["fsdp2"], folders["ddp"])
    print(f"data2vec, fairseq, fsdp2 and ddp: weights {weights:.1e} ({tensor})")
    assert weights <= WEIGHTS, tensor


if WHOLE:
    test_a_teacher_that_moves_in_the_forward_moves_in_shards_too = the_teacher_moves_alike


@pytest.mark.parametrize("name", ["data2vec, step"])
def test_one_process_alone_may_shard_too(one, tmp_path, name):
    run(KINDS[name], tmp_path, parallel="fsdp2")
    weights, tensor = largest_difference(tmp_path, one(name))
    assert largest_relative_difference(tmp_path, one(name)) <= LOSS and weights <= WEIGHTS, tensor


@pytest.mark.parametrize("name", ["pretraining", "data2vec, step"])
def test_recomputed_blocks_give_the_same_curve_in_shards(one, tmp_path, name):
    checkpointing = {"model.encoder.gradient_checkpointing": True}
    run(KINDS[name], tmp_path, processes=2, parallel="fsdp2", **checkpointing)
    weights, tensor = largest_difference(tmp_path, one(name))
    assert largest_relative_difference(tmp_path, one(name)) <= LOSS and weights <= WEIGHTS, tensor
