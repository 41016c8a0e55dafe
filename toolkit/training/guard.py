"""Watches for losses and gradients that are not finite: names the utterances, and ends the run after a patience."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import DivergenceError
from toolkit.training.distributed import World
from toolkit.training.folders import write_json
from toolkit.training.step import StepResult

REPORT_NAME = "crash_report.json"
"""In the output folder: what ended the run, and with which utterances."""

SHOWN = 8
"""Utterances named in a sentence; the report names all."""


@dataclass(frozen=True)
class Seen:
    """A micro-batch as far as the guard needs it: where it stood, its utterances, and the sum of its losses ()."""

    micro: int
    ids: tuple[str, ...]
    loss_sum: Tensor


class NonFiniteGuard:
    """Reads the outcome of updates some time after they were queued, so that the device is never waited for.

    The weights are safe without it (`UpdateStep` changes nothing at such an update); it is the guard's work to say
    whose audio it was.

    Arguments
    ---------
    world : the ranks; all of them look at the same updates at the same time.
    patience : after so many faulty updates in a row the run ends.
    folder : where ``crash_report.json`` goes; None = nowhere.
    say : called with each sentence.
    """

    def __init__(
        self, world: World, *, patience: int, folder: Path | None = None, say: Callable[[str], None] | None = None
    ) -> None:
        self.world, self.patience, self.folder = world, patience, folder
        self.in_a_row = 0
        self.total = 0
        self._say = say or (lambda sentence: None)
        self._waiting: list[tuple[StepResult, list[Seen]]] = []
        self._faults: list[dict[str, Any]] = []

    def note(self, result: StepResult, seen: Sequence[Seen]) -> None:
        """Remember an update; nothing is read."""
        self._waiting.append((result, list(seen)))

    def check(self, *, about: Mapping[str, Any]) -> None:
        """Read what was noted (waits for the device) and act on it.

        Arguments
        ---------
        about : facts of the run for the report (epoch, learning rate, options, ...).

        Raises
        ------
        DivergenceError : ``patience`` faulty updates in a row.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        faulty = torch.stack([result.faulty for result, _ in waiting]).tolist()  # allowed wait: log steps
        for (result, seen), fault in zip(waiting, faulty, strict=True):
            if not fault:
                self.in_a_row = 0
                self._faults.clear()
                continue
            self.in_a_row += 1
            self.total += 1
            self._report(result, seen, about)

    def findings(self) -> dict[str, Any]:
        """For a crash report: the updates in a row that were not finite, with their utterances; empty without any."""
        return {"in_a_row": self.in_a_row, "updates": self._faults} if self._faults else {}

    def state_dict(self) -> dict[str, int]:
        """Plain values, for a checkpoint (after ``check``)."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from ``state``."""
        self.in_a_row, self.total = int(state["in_a_row"]), int(state["total"])
        self._waiting.clear()

    def _report(self, result: StepResult, seen: list[Seen], about: Mapping[str, Any]) -> None:
        mine = [(item.micro, item.ids, float(item.loss_sum)) for item in seen]
        # The outcome is the same on every rank, so all of them come here together.
        everyone = sorted(item for part in self.world.gather_objects(mine) for item in part)
        culprits = [item for item in everyone if not math.isfinite(item[2])]
        what = "the loss" if culprits else "the gradient"
        ids = [name for _, names, _ in culprits or everyone for name in names]
        self._faults.append(
            {
                "update": result.update,
                "what": f"{what} is not finite",
                "grad_norm": _plain(float(result.grad_norm)),
                "utterances": ids,
                "micro_batches": [{"micro": m, "ids": list(i), "loss_sum": _plain(v)} for m, i, v in everyone],
            }
        )
        sentence = f"update {result.update}: {what} is not finite with the utterances {name_some(ids)}"
        if self.in_a_row < self.patience:
            self._say(
                f"{sentence}; nothing was changed ({self.in_a_row} in a row, the run ends after {self.patience})."
            )
            return
        where = self._write_report(about)
        raise DivergenceError(
            f"{sentence}, the {_ordinal(self.in_a_row)} such update in a row (nonfinite_patience is {self.patience}); "
            f"listen to these files, lower the learning rate or set max_grad_norm{where}."
        )

    def _write_report(self, about: Mapping[str, Any]) -> str:
        if self.folder is None:
            return ""
        path = self.folder / REPORT_NAME
        if self.world.is_main:
            write_json(path, {**about, **self.findings()})
        return f"; all of it is in {path}"


def name_some(ids: Sequence[str]) -> str:
    """The first few of some utterances, for a sentence.

    Example
    -------
    >>> name_some([f"u{number}" for number in range(10)])
    'u0, u1, u2, u3, u4, u5, u6, u7 and 2 more'
    """
    return ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")


def _plain(value: float) -> float | str:
    """JSON has no infinities."""
    return value if math.isfinite(value) else str(value)


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{ending}"
