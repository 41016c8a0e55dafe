"""Learning rates as pure functions of the update.

A schedule is called as ``schedule(update, total_updates)`` and returns a factor for the peak learning rate, which is
the ``lr`` of the optimizer. ``update`` is the number of updates that are complete, so the first update has 0, and a
schedule that warms up from 0 leaves the weights as they are in it (as fairseq does). Nothing is kept between calls:
a resumed run, or one whose total is estimated anew because its time is limited, needs no more than the two numbers.

A length such as ``warmup`` is a share of the total when it is below 1 and a number of updates from 1 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from toolkit.errors import ConfigError

Schedule = Callable[[int, int], float]
"""(update, total_updates) -> factor of the peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak rate throughout, after an optional linear warm-up from 0.

    Arguments
    ---------
    warmup : length of the warm-up (share of the total below 1, else updates).

    Example
    -------
    >>> [Constant(warmup=4)(update, 100) for update in (0, 1, 4, 99)]
    [0.0, 0.25, 1.0, 1.0]
    """

    warmup: float = 0

    def __post_init__(self) -> None:
        _check_length("warmup", self.warmup)

    def __call__(self, update: int, total_updates: int) -> float:
        warmup = _updates(self.warmup, total_updates)
        return update / warmup if update < warmup else 1.0


@dataclass(frozen=True, kw_only=True)
class TriStage:
    """Linear warm-up, a plateau, exponential decay (SpecAugment; fine-tuning of wav2vec 2.0).

    Arguments
    ---------
    warmup, hold : lengths of the first two stages (share of the total below 1, else updates).
    decay : length of the third; None = all that is left.
    init_factor : factor at update 0.
    final_factor : factor at the end of the decay and afterwards.

    Raises
    ------
    ConfigError : a length below 0, factors outside 0..1, or shares whose sum is above 1.

    Example
    -------
    >>> schedule = TriStage(warmup=0.1, hold=0.4)
    >>> [round(schedule(update, 100), 4) for update in (0, 5, 10, 49, 75, 100)]
    [0.01, 0.505, 1.0, 1.0, 0.2236, 0.05]
    """

    warmup: float = 0.1
    hold: float = 0.4
    decay: float | None = None
    init_factor: float = 0.01
    final_factor: float = 0.05

    def __post_init__(self) -> None:
        lengths = {"warmup": self.warmup, "hold": self.hold, "decay": 0 if self.decay is None else self.decay}
        for name, value in lengths.items():
            _check_length(name, value)
        shares = sum(value for value in lengths.values() if value < 1)
        if shares > 1 + 1e-6:
            raise ConfigError(f"the shares of TriStage add up to {shares:g}, expected 1 at most; shorten one of them.")
        _check_factor("init_factor", self.init_factor)
        _check_factor("final_factor", self.final_factor, above_zero=True)

    def __call__(self, update: int, total_updates: int) -> float:
        warmup = _updates(self.warmup, total_updates)
        plateau_end = warmup + _updates(self.hold, total_updates)
        rest = max(0, total_updates - plateau_end)
        decay = rest if self.decay is None else _updates(self.decay, total_updates)
        if update < warmup:
            return self.init_factor + (1.0 - self.init_factor) * update / warmup
        if update < plateau_end:
            return 1.0
        if update <= plateau_end + decay and decay > 0:
            return math.exp(math.log(self.final_factor) * (update - plateau_end) / decay)
        return self.final_factor


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """Linear warm-up from 0, then a fall to the end as a power of what is left (pretraining of wav2vec 2.0: linear).

    Arguments
    ---------
    warmup : length of the warm-up (share of the total below 1, else updates).
    power : 1 = linear.
    end_factor : factor at the end and afterwards.

    Example
    -------
    >>> schedule = Polynomial(warmup=0.1)
    >>> [schedule(update, 100) for update in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    warmup: float = 0.08
    power: float = 1.0
    end_factor: float = 0.0

    def __post_init__(self) -> None:
        _check_length("warmup", self.warmup)
        _check_factor("end_factor", self.end_factor)
        if not self.power > 0:
            raise ConfigError(f"power is {self.power!r}, expected a number greater than 0 (1: linear).")

    def __call__(self, update: int, total_updates: int) -> float:
        warmup = _updates(self.warmup, total_updates)
        if warmup and update <= warmup:
            return update / warmup
        if update >= total_updates:
            return self.end_factor
        left = 1.0 - (update - warmup) / (total_updates - warmup)
        return (1.0 - self.end_factor) * left**self.power + self.end_factor


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine down to the end (data2vec).

    Arguments
    ---------
    warmup : length of the warm-up (share of the total below 1, else updates).
    end_factor : factor at update 0, at the end, and afterwards.

    Example
    -------
    >>> [round(Cosine(warmup=0.1)(update, 100), 3) for update in (0, 10, 55, 100)]
    [0.0, 1.0, 0.5, 0.0]
    """

    warmup: float = 0.05
    end_factor: float = 0.0

    def __post_init__(self) -> None:
        _check_length("warmup", self.warmup)
        _check_factor("end_factor", self.end_factor)

    def __call__(self, update: int, total_updates: int) -> float:
        warmup = _updates(self.warmup, total_updates)
        if update < warmup:
            return self.end_factor + (1.0 - self.end_factor) * update / warmup
        done = min(1.0, (update - warmup) / max(1, total_updates - warmup))
        return self.end_factor + 0.5 * (1.0 - self.end_factor) * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class Noam:
    """Linear warm-up, then a fall with one over the square root of the update; the peak at the warm-up's end is 1.

    Arguments
    ---------
    warmup : length of the warm-up (share of the total below 1, else updates).

    Example
    -------
    >>> [Noam(warmup=100)(update, 1000) for update in (0, 50, 100, 400)]
    [0.0, 0.5, 1.0, 0.5]
    """

    warmup: float = 25000

    def __post_init__(self) -> None:
        _check_length("warmup", self.warmup)
        if self.warmup == 0:
            raise ConfigError("warmup of Noam is 0, expected a share or a number of updates greater than 0.")

    def __call__(self, update: int, total_updates: int) -> float:
        warmup = max(1, _updates(self.warmup, total_updates))
        return update / warmup if update < warmup else math.sqrt(warmup / update)


def _updates(length: float, total_updates: int) -> int:
    """A length given as a share or as updates, in updates."""
    # 0.1 * 30 is 3.0000000000000004 and 0.29 * 100 is 28.999999999999996: a hair's breadth must not cost an update.
    return int(length * total_updates + 1e-6) if length < 1 else int(length)


def _check_length(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and value >= 0 and (value < 1 or float(value).is_integer())):
        raise ConfigError(f"{name} is {value!r}, expected a share (0 to 1) or a whole number of updates.")


def _check_factor(name: str, value: float, *, above_zero: bool = False) -> None:
    if not (0 <= value <= 1) or (above_zero and value == 0):
        low = "above 0" if above_zero else "0"
        raise ConfigError(f"{name} is {value!r}, expected a factor of the peak rate from {low} to 1.")
