"""A profile of a few updates: what they cost by operation, how often the host waited, and a trace."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.errors import describe_os_error
from toolkit.training.folders import write_atomic

TABLE_ROWS = 40
NAME_WIDTH = 70
"""Kernels' names are cut to so many characters."""

WAITS = re.compile(
    r"(Stream|Device|Event)Synchronize|Memcpy(Async)? ?DtoH|^aten::(item|_local_scalar_dense|nonzero|is_nonzero|equal)$"
)
"""Operations in which the host waits for a device: runtime calls, copies to the host, reads of a number."""


@dataclass(frozen=True)
class Cost:
    """What one kind of operation (on an accelerator: one kernel) costs in an update: name, calls, milliseconds of its
    own (without what it calls), and that as a share of the update's wall time."""

    name: str
    calls: float
    milliseconds: float
    share: float


@dataclass(frozen=True)
class Profile:
    """A profile of some updates.

    Arguments
    ---------
    updates : how many were seen.
    milliseconds : wall time of one.
    busy : share of the wall time in which the device (on a CPU: any operation) was at work.
    costs : the largest first.
    waits : how often an update had the host wait, by operation; empty on a CPU, where nothing is waited for.
    """

    updates: int
    milliseconds: float
    busy: float
    costs: tuple[Cost, ...]
    waits: dict[str, float]

    def largest(self, count: int = 3) -> list[dict[str, Any]]:
        """The largest costs as plain values, for a report."""
        return [asdict(cost) for cost in self.costs[:count]]

    def table(self) -> str:
        """The costs as text."""
        lines = [
            f"{self.updates} updates of {self.milliseconds:.1f} ms; at work {100 * self.busy:.0f} % of that; largest "
            "costs first, per update, each without what it calls",
            f"{'share':>7}{'ms':>11}{'calls':>9}  operation",
        ]
        lines += [
            f"{100 * cost.share:6.1f}%{cost.milliseconds:11.3f}{cost.calls:9.1f}  {cost.name[:NAME_WIDTH]}"
            for cost in self.costs[:TABLE_ROWS]
        ]
        if self.waits:
            lines += ["", "waits of the host for the device, per update (one synchronization is the profiler's own):"]
            lines += [f"{count:9.1f}  {name}" for name, count in self.waits.items()]
        return "\n".join(lines) + "\n"


def read_events(events: Iterable[Any], *, updates: int, seconds: float, on_device: bool) -> Profile:
    """A profile from torch's.

    Arguments
    ---------
    events : ``key_averages()`` of a `torch.profiler.profile`.
    updates, seconds : how many updates it saw, and in how much time altogether.
    on_device : count kernels of the accelerator, not operations of the host.
    """
    wall = seconds * 1000 / updates
    costs, waits = [], {}
    for event in events:
        there = event.device_type != torch.autograd.DeviceType.CPU
        if on_device and WAITS.search(event.key):
            waits[event.key] = event.count / updates
        if there != on_device or event.key.startswith("ProfilerStep"):
            continue
        spent = event.self_device_time_total if on_device else event.self_cpu_time_total  # microseconds
        milliseconds = spent / 1000 / updates
        if milliseconds > 0:
            costs.append(Cost(event.key, event.count / updates, milliseconds, milliseconds / wall))
    costs.sort(key=lambda cost: -cost.milliseconds)
    return Profile(updates, wall, sum(cost.share for cost in costs), tuple(costs), waits)


def profile_updates(
    run: Callable[[], Any], *, updates: int, synchronize: Callable[[], None], on_device: bool
) -> tuple[Profile, Any]:
    """Profile ``updates`` calls of ``run``; returns the profile and torch's own, for its trace."""
    synchronize()
    with torch.profiler.profile() as profiler:
        began = time.perf_counter()
        for _ in range(updates):
            run()
        synchronize()
        seconds = time.perf_counter() - began
    return read_events(profiler.key_averages(), updates=updates, seconds=seconds, on_device=on_device), profiler


class UpdateProfiler:
    """Profiles some updates of this session and writes ``profile.txt`` (table) and ``profile.json`` (trace, for
    chrome://tracing or ui.perfetto.dev).

    Arguments
    ---------
    folder : where to write; None = off.
    synchronize : waits for the device; called at both ends only.
    on_device : profile an accelerator's kernels, not the host's operations.
    say : called with a sentence on what came out, and where it is.
    skip : updates before (they warm everything up).
    count : updates that are profiled.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        synchronize: Callable[[], None] = lambda: None,
        on_device: bool = False,
        say: Callable[[str], None] = lambda sentence: None,
        skip: int = 2,
        count: int = 2,
    ) -> None:
        self.folder, self.skip, self.count = folder, skip, count
        self.synchronize, self.on_device, self.say = synchronize, on_device, say
        self._seen = 0
        self._profiler: Any = None
        self._done = False

    def step(self) -> None:
        """An update is complete."""
        if self.folder is None or self._done:
            return
        self._seen += 1
        if self._seen == self.skip:
            self.synchronize()
            self._profiler = torch.profiler.profile(record_shapes=False)
            self._profiler.__enter__()
            self._began = time.perf_counter()
        elif self._seen == self.skip + self.count:
            self._write()

    def close(self) -> None:
        """Training is over: write what there is."""
        if self.folder is None or self._done:
            return
        if self._seen > self.skip:
            self._write()
            return
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
        self._done = True
        self.say(f"profile: nothing to write; it begins after {self.skip} updates, and this session made {self._seen}.")

    def _write(self) -> None:
        assert self.folder is not None
        self.synchronize()
        seconds = time.perf_counter() - self._began
        self._profiler.__exit__(None, None, None)
        updates, self._done = self._seen - self.skip, True
        profile = read_events(
            self._profiler.key_averages(), updates=updates, seconds=seconds, on_device=self.on_device
        )
        torchs, self._profiler = self._profiler, None
        try:
            write_atomic(self.folder / "profile.txt", profile.table())
        except OSError as error:  # no reason to end the run, or to end it with another error than its own
            self.say(f"the profile could not be written: {describe_os_error(error)}")
            return
        with contextlib.suppress(OSError):  # hundreds of megabytes at worst
            torchs.export_chrome_trace(str(self.folder / "profile.json"))
        largest = ", ".join(f"{cost.name[:NAME_WIDTH]} {100 * cost.share:.0f} %" for cost in profile.costs[:3])
        self.say(
            f"profile of {updates} updates ({profile.milliseconds:.1f} ms each): {largest}; table in "
            f"{self.folder / 'profile.txt'}, trace in {self.folder / 'profile.json'}."
        )
