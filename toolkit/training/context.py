"""Where a Brain runs, and what it needs of a loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from toolkit.training.devices import Device, resolve_device
from toolkit.training.distributed import World
from toolkit.training.loggers import Loggers


class MicroBatches(Protocol):
    """What the loop needs of a loader (`toolkit.data.loader.Loader`)."""

    @property
    def updates_per_epoch(self) -> int:
        """The same for every epoch and rank."""

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[Any]:
        """Micro-batches (``batch``, ``update``, ``micro``, ``last``, ``bad``) from ``first_update`` on."""


@dataclass(frozen=True)
class RunContext:
    """Where a Brain runs: what `toolkit.training.experiment.start` finds out once for the whole script.

    Arguments
    ---------
    device : a row of the device table with its torch device.
    world : the ranks.
    loggers : who is told (on the main process; silent elsewhere).
    output_folder : for reports; None = nothing is written.

    Example
    -------
    >>> RunContext().world.size
    1
    """

    device: Device = field(default_factory=lambda: resolve_device("cpu"))
    world: World = field(default_factory=World)
    loggers: Loggers = field(default_factory=Loggers)
    output_folder: Path | None = None
