"""Sums that reduce over ranks, and the rates of a training run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from toolkit.training.distributed import World

Number = Tensor | float | int


class MetricSums:
    """Named pairs (sum, count) whose averages are exact whatever the batches and ranks were.

    ``add`` keeps tensors where they are and never waits for the device; ``collect`` brings all of them to the host in
    one transfer and adds them in float64. A pair with a sum that is not finite is left out and counted in
    ``nonfinite``.

    Example
    -------
    >>> sums = MetricSums()
    >>> sums.add("loss", torch.tensor(6.0), 2)
    >>> sums.add("loss", 1.0, 2)
    >>> sums.averages()
    {'loss': 1.75}
    """

    def __init__(self) -> None:
        self.totals: dict[str, list[float]] = {}
        self.nonfinite = 0
        self._pending: list[tuple[str, Number, Number]] = []

    def add(self, name: str, total: Number, count: Number = 1) -> None:
        """Add a sum over ``count`` things; scalars or tensors of one element on any device."""
        self._pending.append((name, _detached(total), _detached(count)))

    def collect(self) -> dict[str, tuple[float, float]]:
        """Name to (sum, count) of this process; waits for the device if tensors are there."""
        values = _to_host([value for _, *pair in self._pending for value in pair])
        for position, (name, _, _) in enumerate(self._pending):
            total, count = values[2 * position], values[2 * position + 1]
            entry = self.totals.setdefault(name, [0.0, 0.0])
            if math.isfinite(total) and math.isfinite(count):
                entry[0] += total
                entry[1] += count
            else:
                self.nonfinite += 1
        self._pending.clear()
        return {name: (total, count) for name, (total, count) in self.totals.items()}

    def reduce(self, world: World) -> MetricSums:
        """The sums over all ranks, the same on each (a collective: every rank must call it)."""
        result = MetricSums()
        # Added in rank order in float64, so that every rank holds the same bits.
        for sums, nonfinite in world.gather_objects((self.collect(), self.nonfinite)):
            result.nonfinite += nonfinite
            for name, (total, count) in sums.items():
                entry = result.totals.setdefault(name, [0.0, 0.0])
                entry[0] += total
                entry[1] += count
        return result

    def averages(self) -> dict[str, float]:
        """Name to sum / count; NaN for a name that only had counts of 0."""
        return {name: total / count if count else math.nan for name, (total, count) in self.collect().items()}

    def merge(self, other: MetricSums) -> None:
        """Add all sums of ``other``."""
        for name, (total, count) in other.collect().items():
            self.add(name, total, count)

    def clear(self) -> None:
        """Back to no sums."""
        self.totals, self.nonfinite = {}, 0
        self._pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"sums": {name: list(pair) for name, pair in self.collect().items()}, "nonfinite": self.nonfinite}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self.clear()
        self.totals = {name: [float(total), float(count)] for name, (total, count) in state["sums"].items()}
        self.nonfinite = int(state["nonfinite"])


@dataclass
class Meter:
    """Where the time of training goes, and how much went through it; sums of this process since the last row.

    Arguments
    ---------
    clock : seconds; replaceable for tests.

    All amounts are in the run's unit (seconds of audio, tokens): ``real`` without padding, ``seen`` with it.
    """

    clock: Callable[[], float] = time.perf_counter
    real: float = 0.0
    seen: float = 0.0
    waited: float = 0.0
    worked: float = 0.0
    _since: float | None = field(default=None, repr=False)

    def start(self) -> None:
        """Training goes on from here (after a validation, a checkpoint, ...)."""
        self._since = self.clock()

    def pause(self) -> None:
        """What follows is not training."""
        if self._since is not None:
            self.worked += self.clock() - self._since
            self._since = None

    def add_batch(self, real: float, seen: float) -> None:
        """One micro-batch of the amount ``real`` without and ``seen`` with padding."""
        self.real += real
        self.seen += seen

    def take(self) -> dict[str, float]:
        """The sums since the last call; starts new ones."""
        running = self._since is not None
        self.pause()
        result = {"real": self.real, "seen": self.seen, "waited": self.waited, "worked": self.worked}
        self.real = self.seen = self.waited = self.worked = 0.0
        if running:
            self.start()
        return result


def rates(parts: list[Mapping[str, float]]) -> dict[str, float]:
    """Throughput (real amount per second, all ranks together), padding share and loader wait share.

    Arguments
    ---------
    parts : what ``Meter.take`` gave on each rank.

    Example
    -------
    >>> rates([{"real": 8.0, "seen": 10.0, "waited": 1.0, "worked": 4.0}])
    {'throughput': 2.0, 'padding_share': 0.2, 'loader_wait_share': 0.25}
    """
    real, seen = sum(part["real"] for part in parts), sum(part["seen"] for part in parts)
    worked = max(part["worked"] for part in parts)
    waited = sum(part["waited"] for part in parts) / len(parts)
    return {
        "throughput": real / worked if worked > 0 else 0.0,
        "padding_share": round(1.0 - real / seen, 6) if seen > 0 else 0.0,
        "loader_wait_share": min(1.0, waited / worked) if worked > 0 else 0.0,
    }


def _detached(value: Number) -> Number:
    return value.detach() if isinstance(value, Tensor) else value


def _to_host(values: list[Number]) -> list[float]:
    """All values as floats, tensors of one device and dtype in one transfer."""
    result: list[float] = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, value in enumerate(values):
        if isinstance(value, Tensor):
            kinds.setdefault((value.device, value.dtype), []).append(position)
    for positions in kinds.values():
        stacked = torch.stack([values[position].reshape(()) for position in positions])  # type: ignore[union-attr]
        for position, number in zip(positions, stacked.tolist(), strict=True):  # the wait for the device
            result[position] = float(number)
    return result
