"""Who stands where: each rank notes its place before it waits for the others, so that a missing one can be named."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ANSWER_SECONDS = 5.0
"""How long the store is asked: it may live in the very process that is missing."""

NAMED = 8
"""Missing ranks named in a sentence."""


@dataclass(frozen=True)
class Place:
    """Where a rank was when it last waited for the others: its number of waits so far, part of the run, purpose."""

    count: int
    where: str
    action: str

    def __str__(self) -> str:
        return f"{self.where} ({self.action})" if self.where else self.action


class Attendance:
    """Notes this rank's place in a store that all ranks share, and reads those of the others.

    All ranks wait for each other in the same order, so a rank that has waited fewer times than this one is the one
    that this one waits for. A note is one small message without an answer. Where the store's keeper has ended, a
    warning says so once, and no more is noted.

    Arguments
    ---------
    store : of `torch.distributed`.
    rank, size : which of how many.

    ``where`` is the part of the run, set by the loop ("update 17").

    Example
    -------
    >>> import torch.distributed as dist
    >>> store = dist.HashStore()
    >>> first, second = (Attendance(store, rank, 2) for rank in (0, 1))
    >>> second.where = "update 3"
    >>> second.note("sum gradients"), first.note("sum gradients"), first.note("gather objects")
    (None, None, None)
    >>> first.describe_missing()
    'process 1, whose last sign of life came from update 3 (sum gradients)'
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size, self.where = rank, size, ""
        self._store, self._count, self._is_lost = store, 0, False

    def note(self, action: str) -> None:
        """This rank is about to wait for the others, to ``action``."""
        self._count += 1
        if self._is_lost:
            return
        try:
            self._store.set(f"place of {self.rank}", f"{self._count}\n{self.where}\n{action}")
        except RuntimeError as error:
            # A lost connection does not come back, and torch prints its stack at every try. The processes themselves
            # may be well: without the launcher they go on, and where one of them has ended, what follows says it.
            self._is_lost = True
            warnings.warn(_lost(self.rank, self.size, error), stacklevel=2)

    def describe_missing(self) -> str:
        """The ranks that are behind this one, in words; empty where none is known to be."""
        places = self._places()
        if places is None:  # a launcher keeps the store, or else the first rank
            return "" if self.rank == 0 else "a process, perhaps process 0, whose list of places does not answer"
        behind = [(rank, place) for rank, place in enumerate(places) if place is None or place.count < self._count]
        if not behind:
            return ""
        lowest = behind[0][1]
        if len({None if place is None else str(place) for _, place in behind}) == 1:
            silent = f"which {'has' if len(behind) == 1 else 'have'} given no sign of life"
            came = f"whose last sign of life came from {lowest}" if lowest else silent
            return f"{_ranks([rank for rank, _ in behind])}, {came}"
        named = [f"{rank} (last seen in {place or 'nothing'})" for rank, place in behind[:NAMED]]
        more = f" and {len(behind) - NAMED} more" if len(behind) > NAMED else ""
        return f"processes {', '.join(named)}{more}"

    def _places(self) -> Sequence[Place | None] | None:
        """By rank; None where the store does not answer."""
        if self._is_lost:
            return None
        found: list[list[Place | None]] = []

        def read() -> None:
            with contextlib.suppress(RuntimeError):
                found.append([self._place(rank) for rank in range(self.size)])

        # The store's client waits for ever for a server that was stopped.
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(ANSWER_SECONDS)
        return found[0] if found else None

    def _place(self, rank: int) -> Place | None:
        key = f"place of {rank}"
        if not self._store.check([key]):
            return None
        count, where, action = self._store.get(key).decode().split("\n")
        return Place(int(count), where, action)


def _lost(rank: int, size: int, error: RuntimeError) -> str:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return (
        f"Process {rank} of {size} cannot reach the store of the launcher or of process 0 any more, which has probably "
        f"ended ({first}); it goes on as long as the others do, but one that does not come will not be named, and "
        "without the launcher one that dies is not started again."
    )


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:NAMED])) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
    return f"process {named}" if len(ranks) == 1 else f"processes {named}"
