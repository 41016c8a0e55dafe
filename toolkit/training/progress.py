"""How far a run has come: its place, its sums and rates since the last row, and all of that as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.data.units import SECONDS, Unit
from toolkit.errors import ConfigError
from toolkit.training.context import MicroBatches
from toolkit.training.distributed import World
from toolkit.training.limits import RunLength
from toolkit.training.metrics import Meter, MetricSums, Number, rates
from toolkit.training.options import RunOptions


class Progress:
    """The place of a run and what was summed up on the way.

    Arguments
    ---------
    length : when the run ends.
    world : the ranks.
    unit : what ``amount``, all that has gone through the run, is measured in.

    ``update`` counts complete updates, ``epoch`` complete epochs, ``epoch_update`` complete updates of this epoch.
    ``row_sums`` are this rank's since the last row of the log, ``epoch_sums`` since the epoch began.
    """

    def __init__(self, length: RunLength, world: World, unit: Unit = SECONDS) -> None:
        self.length, self.world, self.unit = length, world, unit
        self.update = self.epoch = self.epoch_update = 0
        self.updates_per_epoch = 1
        self.plan_digest = ""
        self.row_sums, self.epoch_sums, self.meter = MetricSums(), MetricSums(), Meter()
        self.amount = self.train_seconds = 0.0
        self.best: dict[str, Any] = {}
        self.final: dict[str, Any] = {}
        self._since_row = dict.fromkeys(("real", "seen", "waited", "worked"), 0.0)

    @property
    def epochs(self) -> float:
        """Epochs done, with the fraction."""
        return round(self.epoch + self.epoch_update / self.updates_per_epoch, 4)

    @property
    def throughput(self) -> float:
        """Amount (seconds of audio, tokens) per second of training over the whole run, all ranks together."""
        return self.amount / self.train_seconds if self.train_seconds else 0.0

    @property
    def is_validated(self) -> bool:
        """Whether the last validation was after the last update."""
        return self.final.get("valid", {}).get("update") == self.update

    def is_valid_due(self, options: RunOptions) -> bool:
        """Whether a validation is due: every ``valid_interval_updates``, or (None) at each epoch's end."""
        every = options.valid_interval_updates
        return self.epoch_update == 0 if every is None else self.update % every == 0

    def plan(self, loader: MicroBatches) -> None:
        """Take over how many updates an epoch of ``loader`` has; ConfigError if it has none."""
        self.updates_per_epoch, self.plan_digest = loader.updates_per_epoch, getattr(loader, "plan_digest", "")
        if self.updates_per_epoch < 1:
            raise ConfigError("the training set gives no batch at all; check the manifest and the shortest duration.")

    def advance(self) -> None:
        """One more update is complete."""
        self.update += 1
        self.epoch_update += 1
        if self.epoch_update >= self.updates_per_epoch:
            self.epoch, self.epoch_update = self.epoch + 1, 0

    def take_row(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The row since the last one, ``extra`` standing before the averages (a collective; waits for the device)."""
        reduced = self.row_sums.reduce(self.world)
        self.row_sums.clear()
        # The device is waited for in any case: let it have the memory of the epoch's sums back.
        self.epoch_sums.collect()
        self._collect_meter()
        row: dict[str, Any] = {"stage": "train", "update": self.update, "total_updates": self.length.total}
        row |= {"epoch": self.epochs, **extra, **reduced.averages(), **rates([self._since_row])}
        row |= {self.unit.total: round(self.amount, 3), "elapsed_seconds": round(self.length.elapsed(), 3)}
        self._since_row = dict.fromkeys(self._since_row, 0.0)
        self.final["train"] = row
        return row

    def valid_row(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """The row of a validation that gave ``metrics``."""
        row = {"stage": "valid", "update": self.update, "epoch": self.epochs, **metrics}
        self.final["valid"] = row
        return row

    def add(self, name: str, total: Number, count: Number = 1) -> None:
        """Add to the sums of the row and of the epoch; nothing is read."""
        self.row_sums.add(name, total, count)
        self.epoch_sums.add(name, total, count)

    def end_epoch(self) -> dict[str, float]:
        """Averages since the epoch began, over all ranks; new sums begin (a collective; waits for the device)."""
        averages = self.epoch_sums.reduce(self.world).averages()
        self.epoch_sums.clear()
        return averages

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint, the same on every rank (a collective; waits for the device)."""
        self._collect_meter()
        return {
            "update": self.update,
            "epoch": self.epoch,
            "epoch_update": self.epoch_update,
            "updates_per_epoch": self.updates_per_epoch,
            "plan_digest": self.plan_digest,
            "length": self.length.state_dict(),
            "row_sums": self.row_sums.reduce(self.world).state_dict(),
            "epoch_sums": self.epoch_sums.reduce(self.world).state_dict(),
            "since_row": self._since_row,
            self.unit.total: self.amount,
            "train_seconds": self.train_seconds,
            "best": self.best,
            "final": self.final,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> str | None:
        """Continue from ``state``; returns a warning when the plan of an epoch has changed since.

        Where the number of updates in an epoch differs (another effective batch), the run goes on at the same share
        of the epoch: utterances may then come twice or not at all in it.
        """
        self.update, self.epoch = int(state["update"]), int(state["epoch"])
        before, here = int(state["updates_per_epoch"]), int(state["epoch_update"])
        self.epoch_update = here if before == self.updates_per_epoch else here * self.updates_per_epoch // before
        self.length.load_state_dict(state["length"])
        # The saved sums are those of all ranks; one rank carries them on, or they would count several times.
        for sums, name in ((self.row_sums, "row_sums"), (self.epoch_sums, "epoch_sums")):
            sums.clear()
            if self.world.is_main:
                sums.load_state_dict(state[name])
        self._since_row = {name: float(value) for name, value in state["since_row"].items()}
        self.amount, self.train_seconds = float(state[self.unit.total]), float(state["train_seconds"])
        self.best, self.final = dict(state["best"]), dict(state["final"])
        planned = str(state.get("plan_digest", ""))
        if before == self.updates_per_epoch and planned and self.plan_digest and planned != self.plan_digest:
            return (
                "the updates of an epoch hold other utterances than when the checkpoint was saved (was "
                "effective_batch, batch_seconds or the number of processes changed?); in this epoch some may come "
                "twice or not at all."
            )
        if before == self.updates_per_epoch:
            return None
        return (
            f"an epoch had {before} updates when the checkpoint was saved and has {self.updates_per_epoch} now (was "
            "effective_batch or the number of processes changed?); going on at the same share of the epoch."
        )

    def _collect_meter(self) -> None:
        """Add what the meters of all ranks have shown since the last call to the totals."""
        parts = self.world.gather_objects(self.meter.take()) if self.world.size > 1 else [self.meter.take()]
        total = {
            "real": sum(part["real"] for part in parts),
            "seen": sum(part["seen"] for part in parts),
            "waited": sum(part["waited"] for part in parts) / len(parts),
            "worked": max(part["worked"] for part in parts),
        }
        self._since_row = {name: self._since_row[name] + value for name, value in total.items()}
        self.amount += total["real"]
        self.train_seconds += total["worked"]
