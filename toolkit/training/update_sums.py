"""What the micro-batches of one update add up to on this rank, until the update is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.training.guard import Seen
from toolkit.training.metrics import Number
from toolkit.training.objective import Objective, on_device
from toolkit.training.progress import Progress


class UpdateSums:
    """The losses, targets, metrics and amounts of one update's micro-batches; nothing is read from the device.

    They count only once the update is made (`hand_over`): of one that is given up, nothing reaches the log.

    Arguments
    ---------
    device : where the losses and targets are summed.

    ``loss_sum`` and ``count`` are (), float32; ``seen`` is what the guard needs of each micro-batch.

    Example
    -------
    >>> sums = UpdateSums(torch.device("cpu"))
    >>> sums.add(Objective(torch.tensor(6.0), count=3), micro=0, ids=["a", "b"], amount=(1.5, 2.0))
    >>> sums.loss_sum, sums.count
    (tensor(6.), tensor(3.))
    """

    def __init__(self, device: torch.device) -> None:
        self.loss_sum: Tensor = torch.zeros((), device=device)
        self.count: Tensor = torch.zeros((), device=device)
        self.seen: list[Seen] = []
        self._device = device
        self._metrics: list[tuple[str, Number, Number]] = []
        self._amounts: list[tuple[float, float]] = []

    def add(self, objective: Objective, *, micro: int, ids: Sequence[str], amount: tuple[float, float]) -> None:
        """Add one micro-batch.

        Arguments
        ---------
        objective : what it gave.
        micro : its number in the update.
        ids : its utterances.
        amount : what is in it without padding and with it, in the run's unit.
        """
        loss_sum, count = on_device(objective.loss_sum, self._device), on_device(objective.count, self._device)
        self.loss_sum += loss_sum
        self.count += count
        self._metrics += [("loss", loss_sum, count), *((name, *pair) for name, pair in objective.metrics.items())]
        self.seen.append(Seen(micro, tuple(ids), loss_sum))
        self._amounts.append(amount)

    def hand_over(self, progress: Progress) -> None:
        """The update is made: add its metrics and amounts to those of the run."""
        for name, total, count in self._metrics:
            progress.add(name, total, count)
        for real, padded in self._amounts:
            progress.meter.add_batch(real, padded)
