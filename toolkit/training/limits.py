"""How long a run goes: updates, minutes, or whichever ends first; and the signal that ends it early."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from toolkit.errors import INTERRUPTED, ConfigError
from toolkit.training.distributed import World
from toolkit.training.options import RunOptions

REQUEUE = 75
"""Exit code of a run that was told to stop and has saved its state (EX_TEMPFAIL: try again)."""

ECHO_SECONDS = 2.0
"""A launcher passes Ctrl-C on to processes that have had it from the terminal; so soon after, it is the same one."""

FIRST_INTERRUPT = "\ninterrupted: saving at the end of this update; Ctrl-C again ends at once, without saving.\n"

LEAVING = "\ntold to stop: no training is going on here that could be saved; run the same command again to go on.\n"

UNKNOWN = 10**9
"""Total of a run limited by time only, before its first update."""


class Requeue(SystemExit):
    """Ends the process, which was told to stop, with code 75; the same command goes on from what it has saved."""

    def __init__(self) -> None:
        super().__init__(REQUEUE)


class Interrupted(SystemExit):
    """Ends the process with code 130 after Ctrl-C and a checkpoint; the same command goes on from there."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED)


class EvaluationStopped(Exception):
    """A validation or a test was broken off because the run was told to stop; the next session makes up for it."""


class RunLength:
    """The end of a run in updates, re-estimated from its pace where time is limited.

    ``total`` is what schedules are given, so that a run of 30 minutes ends with its schedule finished. Minutes count
    over all sessions of a run: training, validation and checkpoints, not preparation and tests.

    Arguments
    ---------
    max_updates, max_minutes : the limits; None = no such limit.
    clock : seconds; replaceable for tests.

    Example
    -------
    >>> seconds = iter([0.0, 10.0, 10.0]).__next__
    >>> length = RunLength(max_updates=None, max_minutes=1.0, clock=seconds)
    >>> length.start(update=0)
    >>> length.estimate(update=5)
    30
    """

    def __init__(
        self, max_updates: int | None, max_minutes: float | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_updates = max_updates
        self.max_seconds = None if max_minutes is None else 60.0 * max_minutes
        self.total = UNKNOWN if max_updates is None else max_updates
        self.reserve = 0.0
        self.finished_limits: dict[str, Any] | None = None
        self._clock = clock
        self._before, self._began = 0.0, 0.0
        self._anchors: list[tuple[float, int]] = []

    @property
    def limits(self) -> dict[str, Any]:
        """Both limits, to compare sessions by."""
        return {"max_updates": self.max_updates, "max_seconds": self.max_seconds}

    def require_limit(self) -> None:
        """ConfigError if neither limit is given."""
        if self.max_updates is None and self.max_seconds is None:
            raise ConfigError("neither max_updates nor max_minutes is set; give one, so that the run has an end.")

    def start(self, update: int) -> None:
        """Training begins or goes on with ``update`` updates done."""
        self._began = self._clock()
        self._anchors = [(0.0, update)]

    def elapsed(self) -> float:
        """Seconds of the run so far, all sessions together."""
        return self._before + (self._clock() - self._began if self._anchors else 0.0)

    def estimate(self, update: int) -> int:
        """The total number of updates as it looks now; ask on the main rank only and ``set_total`` on all."""
        if self.max_seconds is None:
            return self.total
        session = self._clock() - self._began
        # The pace of the last three quarters: a slow start (compilation, cold files) is soon forgotten.
        recent = next((anchor for anchor in self._anchors if anchor[0] >= 0.25 * session), self._anchors[-1])
        anchor = recent if recent[1] < update else self._anchors[0]
        left = self.max_seconds - self.reserve - self._before - session
        total = update
        if left > 0:
            pace = (session - anchor[0]) / (update - anchor[1]) if update > anchor[1] else 0.0
            total = update + int(left / pace) if pace > 0 else self.total
        if update > self._anchors[-1][1]:
            self._anchors.append((session, update))
        return total if self.max_updates is None else min(total, self.max_updates)

    def total_after(self, update: int, log_interval: int) -> int:
        """The total number of updates as this process sees it with ``update`` updates done."""
        if self.is_over_time():
            return update
        is_power_of_two = update & (update - 1) == 0
        # Often at first, when little is known about the pace, later with the rows of the log.
        return self.estimate(update) if is_power_of_two or update % log_interval == 0 else self.total

    def is_over_time(self) -> bool:
        """Whether the time is used up (main rank)."""
        return self.max_seconds is not None and self.elapsed() + self.reserve >= self.max_seconds

    def is_reached(self, update: int) -> bool:
        """Whether the run ends with ``update`` updates done, or ended in an earlier session under the same limits."""
        return update >= self.total or self.finished_limits == self.limits

    def mark_finished(self) -> None:
        """The run has come to its end; the same limits need no more training."""
        self.finished_limits = self.limits

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        state = {"elapsed_seconds": self.elapsed(), "total": self.total, "reserve": self.reserve}
        return state | {"finished_limits": self.finished_limits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; a limit that changed since is the one that counts."""
        self._before = float(state["elapsed_seconds"])
        self.reserve = float(state["reserve"])
        self.finished_limits = state["finished_limits"]
        if self.max_seconds is not None:
            self.total = int(state["total"])
            if self.max_updates is not None:
                self.total = min(self.total, self.max_updates)
            if self.finished_limits != self.limits and self.finished_limits is not None:
                self.total = UNKNOWN if self.max_updates is None else self.max_updates


class StopSignal:
    """Notices SIGTERM, SIGUSR1 and the first Ctrl-C while it is open: the run saves and ends at the next update.

    SIGTERM is what schedulers send at the end, SIGUSR1 what Slurm sends so long before it as ``--signal`` asks.
    ``received`` is True after any, ``interrupted`` after Ctrl-C; a second Ctrl-C ends at once (KeyboardInterrupt).

    Arguments
    ---------
    world : the ranks; the main process says what the first Ctrl-C does.
    interrupts : False leaves Ctrl-C as it is.
    """

    def __init__(self, world: World | None = None, *, interrupts: bool = True) -> None:
        self.received = self.interrupted = False
        self._world, self._interrupts = world or World(), interrupts
        self._previous: dict[int, Any] = {}
        self._owner = os.getpid()
        self._first = 0.0

    def __enter__(self) -> StopSignal:
        # Only a main thread may install handlers; elsewhere the caller's own handling stands.
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._notice)
            if hasattr(signal, "SIGUSR1"):  # not on Windows
                self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._notice)
            # A shell starts jobs of the background with Ctrl-C ignored; that is not for us to change.
            if self._interrupts and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._notice_interrupt)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, previous in self._previous.items():
            if previous is not None:
                signal.signal(number, previous)
        self._previous.clear()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            self._told()
        elif number == signal.SIGTERM:
            # A worker process inherited this handler; it must die when it is told to.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # SIGUSR1, which a scheduler may send to all processes of a job, is no reason for a worker to go.

    def _told(self) -> None:
        self.received = True

    def _notice_interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # The terminal tells the workers too; they are needed until the update is complete.
            return
        now = time.monotonic()
        if not self.interrupted:
            self.received = self.interrupted = True
            self._first = now
            self._write(FIRST_INTERRUPT)
        elif self._world.size == 1 or now - self._first > ECHO_SECONDS:
            raise KeyboardInterrupt

    def _write(self, sentence: str) -> None:
        """A sentence of the main process. Not print: the signal may have come in the middle of one."""
        if self._world.is_main:
            with contextlib.suppress(OSError):
                os.write(2, sentence.encode())


class LeaveSignal(StopSignal):
    """Ends the process with code 75 (`Requeue`) on SIGTERM and SIGUSR1 while it is open.

    For the parts of a run in which nothing is trained (preparing, loading, writing the model): the same command makes
    them again. `StopSignal` takes its place inside.
    """

    def __init__(self, world: World | None = None) -> None:
        super().__init__(world, interrupts=False)

    def _told(self) -> None:
        now = time.monotonic()
        if self.received and now - self._first < ECHO_SECONDS:
            return  # a launcher's echo of it must not break off what is put away on the way out
        self.received, self._first = True, now
        self._write(LEAVING)
        raise Requeue


def shortened(options: RunOptions) -> RunOptions:
    """The options of a debug run: everything happens, within a few updates.

    Example
    -------
    >>> short = shortened(RunOptions(debug=True, max_minutes=60.0))
    >>> short.max_updates, short.max_minutes, short.valid_interval_updates
    (4, None, 2)
    """
    half = half_way(options)
    return dataclasses.replace(
        options,
        max_updates=options.debug_updates,
        max_minutes=None,
        log_interval=1,
        valid_interval_updates=half,
        ckpt_interval_updates=half,
    )


def half_way(options: RunOptions) -> int:
    """The update of a debug run at which it is saved and resumed."""
    return max(1, options.debug_updates // 2)
