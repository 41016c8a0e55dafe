"""A teacher whose weights are the exponential moving average of a student's (Tarvainen and Valpola 2017; data2vec,
Baevski et al. 2022, section 3.2)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from toolkit.errors import ModelError
from toolkit.nn.sizes import check_sizes


class DecayRamp(NamedTuple):
    """The decay after n updates: from ``start`` to ``end`` in a straight line over ``steps`` updates, then ``end``.

    Example
    -------
    >>> ramp = DecayRamp(0.9, 0.99, 10)
    >>> ramp.at(0), round(ramp.at(1), 6), ramp.at(10), ramp.at(1000)
    (0.9, 0.909, 0.99, 0.99)
    """

    start: float
    end: float
    steps: int

    def at(self, update: int) -> float:
        """The decay after ``update`` updates."""
        if update >= self.steps:
            return self.end
        return self.end - (self.end - self.start) * (1 - update / self.steps)

    @classmethod
    def checked(cls, values: Sequence[float]) -> DecayRamp:
        """From (start, end, steps); raises ModelError where they make no ramp."""
        advice = "expected (start, end, steps) with 0 <= start <= end <= 1, as (0.999, 0.9999, 30000)"
        try:
            start, end, steps = values
            start, end = float(start), float(end)
        except (TypeError, ValueError) as error:
            raise ModelError(f"ema_decay is {values!r}, {advice}.") from error
        if not (0 <= start <= end <= 1 and math.isfinite(end)):
            raise ModelError(f"ema_decay is {tuple(values)}, {advice}.")
        check_sizes(ema_decay_steps=steps)
        return cls(start, end, steps)


def _held(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, of sharded ones this rank's shard: the average of shards is the shard of the average."""
    return {
        name: (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()
        for name, parameter in module.named_parameters()
    }


class Teacher(nn.Module):
    """A copy of a module in float32 at least: never trained, but moved towards it; always in evaluation mode.

    Its tensors are parameters without gradient: they are saved and resumed with the model, and move with it to a
    device. All ranks of a distributed run move theirs alike, since their students are alike.

    Arguments
    ---------
    student : what to copy.
    decay : how much of the teacher stays at each move.
    copied : patterns (``positional.*``) of the student's names that are copied at each move instead of averaged.

    Raises
    ------
    ModelError : a pattern that fits no name of the student.

    Example
    -------
    >>> student = nn.Linear(1, 1, bias=False)
    >>> teacher = Teacher(student, DecayRamp(0.5, 0.5, 1))
    >>> _ = nn.init.constant_(student.weight, 1.0), nn.init.constant_(teacher.module.weight, 0.0)
    >>> teacher.move(student, update=1), teacher.module.weight.item()
    (0.5, 0.5)
    """

    def __init__(self, student: nn.Module, decay: DecayRamp, *, copied: Sequence[str] = ()) -> None:
        super().__init__()
        self.decay, self.copied = decay, tuple(copied)
        names = [name for name, _ in student.named_parameters()]
        for pattern in self.copied:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ModelError(f"no parameter of the student fits {pattern!r}, which was to be copied, not averaged.")
        # (update, tensors before its first move), of a teacher that moves in the middle of an update
        self._kept: tuple[int, list[torch.Tensor]] | None = None
        self.module = copy.deepcopy(student).requires_grad_(False).eval()
        for parameter in self.module.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, *args, **kwargs):
        """What the module says, without gradient."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        """Take the student's weights as they are."""
        theirs = _held(student)
        own = _held(self.module)
        torch._foreach_copy_(list(own.values()), [theirs[name] for name in own])

    def remember(self, update: int) -> None:
        """Keep the weights as they are, for :meth:`go_back`; only the first time for the same ``update``."""
        if self._kept is None or self._kept[0] != update:
            self._kept = update, [tensor.clone() for tensor in _held(self.module).values()]

    def forget(self) -> None:
        """What was kept is not needed any more: the update is finished."""
        self._kept = None

    @torch.no_grad()
    def go_back(self) -> None:
        """To the weights that were kept, if any were."""
        if self._kept is not None:
            torch._foreach_copy_(list(_held(self.module).values()), self._kept[1])
        self.forget()

    @torch.no_grad()
    def move(self, student: nn.Module, *, update: int) -> float:
        """One move: ``teacher = decay * teacher + (1 - decay) * student``, with the decay after ``update`` updates.

        Returns
        -------
        The decay that was used.
        """
        decay = self.decay.at(update)
        theirs = _held(student)
        averaged, copied = ([], []), ([], [])
        for name, own in _held(self.module).items():
            is_copied = any(fnmatchcase(name, pattern) for pattern in self.copied)
            targets, sources = copied if is_copied else averaged
            targets.append(own)
            sources.append(theirs[name].to(own.dtype))
        if averaged[0]:
            torch._foreach_lerp_(*averaged, 1.0 - decay)
        if copied[0]:
            torch._foreach_copy_(*copied)
        return decay
