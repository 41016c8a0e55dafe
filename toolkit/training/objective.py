"""What travels between a recipe and the loop: the stage, the objective of a batch, the result of a stage."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ModelError
from toolkit.training.metrics import MetricSums, Number


class Stage(enum.Enum):
    """What the modules are run for."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"


@dataclass(frozen=True)
class Objective:
    """The objective of one micro-batch, as sums, so that uneven batches, accumulation and ranks change nothing.

    Arguments
    ---------
    loss_sum : (), the sum of the losses of all targets (in nats), with its graph in TRAIN.
    count : how many targets were summed: masked frames, tokens, utterances, ...; a number or a tensor ().
    metrics : name to (sum, count) of what shall be logged; the average over batches and ranks is exact. A percentage is
        (100 * errors, words).

    Example
    -------
    >>> Objective(torch.tensor(6.0), count=3, metrics={"accuracy": (2, 3)}).count
    3
    """

    loss_sum: Tensor
    count: Number
    metrics: Mapping[str, tuple[Number, Number]] = field(default_factory=dict)


@dataclass(frozen=True)
class StageResult:
    """What a pass over a validation or test set gave.

    Arguments
    ---------
    stage : VALID or TEST.
    update : updates that were complete.
    metrics : averages over the whole set, all ranks together; ``loss`` is among them.
    sums : what they are averages of (to pool several sets).
    rows : what the recipe recorded, in the order of the batches, from all ranks.
    """

    stage: Stage
    update: int
    metrics: dict[str, float]
    sums: MetricSums
    rows: list[dict[str, Any]]


def as_objective(returned: Any, batch: Any, *, owner: str, tell: Callable[[str], None]) -> Objective:
    """What ``compute_objectives`` returned, as an `Objective`; a mean loss () is weighted by the size of ``batch``.

    Arguments
    ---------
    owner : name of the class whose method it was.
    tell : called with a sentence on what was assumed.

    Raises
    ------
    ModelError : it is neither.
    """
    if isinstance(returned, Objective):
        return returned
    if not isinstance(returned, Tensor) or returned.ndim != 0:
        raise ModelError(
            f"compute_objectives of {owner} returned {type(returned).__name__}, expected an Objective or a scalar "
            "tensor with the mean loss."
        )
    tell(
        "compute_objectives returned a mean loss; it is weighted by the number of items in the batch. Return an "
        "Objective(loss_sum, count) where targets differ in number."
    )
    return Objective(returned * len(batch), len(batch))


def batch_on_device(batch: Any, device: torch.device) -> Any:
    """The batch on ``device``, if it can be moved; copies from pinned memory run beside the computation."""
    return batch.to(device, non_blocking=True) if hasattr(batch, "to") else batch


def on_device(value: Number, device: torch.device) -> Tensor:
    """``value`` as a float32 tensor () on ``device``; a number is written there by the device, without a wait."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float32).reshape(())
    return torch.full((), float(value), device=device)
