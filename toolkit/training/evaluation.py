"""One pass over a set that is shared out over the ranks: exact averages, and one end for all where one rank fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from toolkit.errors import TrainingError, is_out_of_memory
from toolkit.training.context import MicroBatches
from toolkit.training.crash import CurrentWork
from toolkit.training.limits import EvaluationStopped, StopSignal
from toolkit.training.metrics import MetricSums
from toolkit.training.objective import Objective, Stage, StageResult
from toolkit.training.parallel import Parallel
from toolkit.training.streams import close, passed_on

Rows = list[tuple[int, dict[str, Any]]]
"""Rows that a recipe recorded, each with the number of its batch in the whole set."""


def run_set(
    loader: MicroBatches,
    stage: Stage,
    objective_of: Callable[[Any], Objective | None],
    *,
    recorded: Rows,
    work: CurrentWork,
    parallel: Parallel,
    stop: StopSignal,
    max_steps: int | None = None,
) -> StageResult:
    """Run this rank's batches and bring the results of all ranks together (a collective).

    Arguments
    ---------
    loader : this rank's share of the set; closed at the end.
    stage : VALID or TEST.
    objective_of : from a micro-batch to its objective, without gradients; None = nothing of it could be read.
    recorded : where ``objective_of`` leaves this rank's rows.
    work : is told of each batch and, where a rank fails, of the errors of all.
    parallel : how the ranks share the model.
    stop : a rank that was told to stop leaves its share there; all hear of it when they have come to the end of theirs.
    max_steps : batches of each rank; None = all.

    Raises
    ------
    any error of this rank. TrainingError : memory ran out, or the error was another rank's.
    EvaluationStopped : on every rank without an error of its own, see ``stop``.
    """
    world, update = work.world, work.progress.update
    world.at(f"the {stage.value} set, after update {update}")
    sums = MetricSums()
    error: Exception | None = None
    try:
        with parallel.held(), contextlib.closing(passed_on(loader.epoch(0))) as micro_batches:
            for micro in micro_batches:
                if max_steps is not None and micro.update >= max_steps:
                    break
                if stop.received:
                    raise EvaluationStopped
                work.begin_batch(stage, micro)
                _add(sums, objective_of(micro))
    except Exception as caught:
        error = caught
    finally:
        # Where not all was read, workers would wait for nothing.
        close(loader)
    rows = _gather(recorded, error, work, stop)
    work.end_batch()
    reduced = sums.reduce(world)
    world.at(f"update {update + 1}")
    return StageResult(stage, update, reduced.averages(), reduced, rows)


def _add(sums: MetricSums, objective: Objective | None) -> None:
    if objective is not None:
        sums.add("loss", objective.loss_sum, objective.count)
        for name, (amount, count) in objective.metrics.items():
            sums.add(name, amount, count)


def _gather(recorded: Rows, error: Exception | None, work: CurrentWork, stop: StopSignal) -> list[dict[str, Any]]:
    """The rows of all ranks in the order of the batches.

    What one rank met (a bad file of its share) ends all of them here: nobody waits, and all can save.
    """
    mine = None if error is None else work.failure(error, stop)
    everyone = work.world.gather_objects((recorded, mine))
    failures = [failure for _, failure in everyone if failure is not None]
    if failures:
        work.failures = failures
        if any(failure.is_stop for failure in failures) and (mine is None or mine.is_stop):
            raise EvaluationStopped from error
        if error is None or is_out_of_memory(error):
            raise TrainingError((mine or failures[0]).sentence) from error
        raise error
    numbered = sorted((item for rows, _ in everyone for item in rows), key=lambda item: item[0])
    return [row for _, row in numbered]
