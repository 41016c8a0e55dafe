"""When a run is saved, what of it, and how it goes on: the Brain's side of the Checkpointer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from toolkit.errors import CheckpointError, ConfigError
from toolkit.training.checkpoint import Checkpointer
from toolkit.training.limits import Interrupted, Requeue
from toolkit.training.options import RunOptions
from toolkit.training.progress import Progress

WEIGHTS = ("best", "last", "average")
"""Which weights can be evaluated."""


def check_weights(which: str) -> None:
    """ConfigError unless ``which`` is one of WEIGHTS."""
    if which not in WEIGHTS:
        raise ConfigError(f"the weights to evaluate are {which!r}, expected one of {', '.join(WEIGHTS)}.")


class Stateful(Protocol):
    """A part of the run with plain values to keep."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


class Saver:
    """Saves and resumes a run.

    Arguments
    ---------
    checkpointer : None = nothing is saved, nothing resumed.
    options : the intervals.
    modules : what "model" stands for in checkpoints.
    progress : the place of the run.
    say : called with each sentence.

    ``on_resume`` holds what to call (on every rank) once a checkpoint was accepted. ``saved_update`` is the update of
    the checkpoint that was saved or resumed last, 0 before. ``weights_update`` is the update after which the weights
    that `load_weights` loaded were saved, None before.
    """

    def __init__(
        self,
        checkpointer: Checkpointer | None,
        options: RunOptions,
        modules: nn.Module,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self.checkpointer, self.options = checkpointer, options
        self.modules, self.progress, self.say = modules, progress, say
        self.parts: dict[str, Stateful] = {"progress": progress}
        self.on_resume: list[Callable[[], object]] = []
        self.saved_update = 0
        self.weights_update: int | None = None
        self._last_save = time.monotonic()
        self._optimizer: torch.optim.Optimizer | None = None
        if checkpointer is not None:
            checkpointer.add("model", modules)

    def add(self, name: str, part: Stateful) -> None:
        """Another part whose plain values are kept in the state."""
        self.parts[name] = part

    def add_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's tensors are kept beside the model's; its settings are those of the YAML at each start."""
        self._optimizer = optimizer
        if self.checkpointer is not None:
            self.checkpointer.add("optimizer", optimizer)

    def is_due(self, update: int) -> bool:
        """Whether an interval ends with ``update`` updates done (ask the main process: clocks differ)."""
        minutes, updates = self.options.ckpt_interval_minutes, self.options.ckpt_interval_updates
        if updates is not None and update % updates == 0:
            return True
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def save(self, metrics: Mapping[str, float] | None = None, *, wait: bool = True) -> None:
        """Save the run as it stands (a collective).

        ``wait=False``, where ``async_save`` allows it: training may go on while it is written. For a checkpoint on
        the way only; what ends a run, or goes on from a checkpoint, has to be certain of it.
        """
        if self.checkpointer is None:
            return
        self._keep_best(metrics)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        wait = wait or not self.options.async_save
        self.checkpointer.save(self.progress.update, state, dict(metrics or {}), wait=wait)
        self._last_save, self.saved_update = time.monotonic(), self.progress.update

    def has_failed(self) -> bool:
        """Whether this process could not write in the background; costs nothing."""
        return self.checkpointer is not None and self.checkpointer.has_failed

    def wait(self) -> None:
        """Until what was saved is complete (a collective); CheckpointError if it could not be written."""
        if self.checkpointer is not None:
            self.checkpointer.wait()

    def close(self) -> None:
        """Wait for what this process is writing, without the others."""
        if self.checkpointer is not None:
            self.checkpointer.close()

    def save_and_stop(self, *, interrupted: bool, pause: Callable[[], None]) -> NoReturn:
        """Save the run, which was told to stop (a collective), say so and end it.

        Arguments
        ---------
        interrupted : it was told by Ctrl-C.
        pause : ends the progress bar, before anything is said.

        Raises
        ------
        Interrupted, Requeue : always the one or the other.
        """
        self.save()
        pause()
        why, update = "interrupted" if interrupted else "told to stop", self.progress.update
        if self.checkpointer is None:
            self.say(f"{why} at update {update}; nothing is saved, as this Brain has no checkpointer.")
        else:
            # Whoever sits at the terminal wants to know what Ctrl-C has left, and where.
            where = f" in {self.checkpointer.folder}" if interrupted else ""
            self.say(f"{why}: saved at update {update}{where}; run the same command again to go on.")
        raise Interrupted if interrupted else Requeue

    def resume(self) -> bool:
        """Go on from the last valid checkpoint; False if there is none."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        state = None if self.checkpointer is None else self.checkpointer.resume()
        if state is None:
            return False
        for group, wanted in zip(self._optimizer.param_groups if self._optimizer else [], settings, strict=True):
            group.update(wanted)
        for name, part in self.parts.items():
            if name in state:
                warning = part.load_state_dict(state[name])
                if isinstance(warning, str):
                    self.say(f"warning: {warning}")
        self.saved_update = self.progress.update
        self.say(f"resumed at update {self.progress.update} (epoch {self.progress.epochs}).")
        for accepted in self.on_resume:
            accepted()
        return True

    def rehearse(self) -> None:
        """Load what was just saved and compare (for --debug).

        Raises
        ------
        CheckpointError : the run that comes back is not the run that was saved.
        """
        if self.checkpointer is None:
            return
        before = {name: value.clone() for name, value in self.modules.state_dict().items()}
        update = self.progress.update
        self.resume()
        after = self.modules.state_dict()
        changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
        if changed or update != self.progress.update:
            what = f"the weights {', '.join(changed[:3])}" if changed else f"update {update}"
            raise CheckpointError(
                f"{what} did not come back from the checkpoint in {self.checkpointer.folder}; the module must keep "
                "all it needs in parameters and buffers that are saved."
            )

    def load_weights(self, which: str, *, metric: str | None = None, mode: str | None = None) -> bool:
        """Load the "best" or "last" weights, or the "average" of the last ``keep_last`` checkpoints.

        Returns
        -------
        False if there is no checkpoint: the weights stay as they are.
        """
        check_weights(which)
        found = [] if self.checkpointer is None else self.checkpointer.list()
        if not found or self.checkpointer is None:
            return False
        if which == "average":
            tensors = self.checkpointer.average(self.options.keep_last)
            own = self.modules.state_dict()
            with torch.no_grad():
                for name, tensor in tensors.items():
                    own[name].copy_(tensor)
            self.say(f"weights: the average of {min(self.options.keep_last, len(found))} checkpoints.")
            self._place(found[-1].update)
            return True
        path = self.checkpointer.find_best(metric, mode) if which == "best" else None
        path = path or self.checkpointer.find_latest()
        if path is None:
            return False
        self.checkpointer.load(path, names=("model",), resume=False)
        self.say(f"weights: {path.name} ({which}).")
        self._place(next(info.update for info in found if info.path == path))
        return True

    def _place(self, update: int) -> None:
        """Remember which weights are loaded; a session without training has no place of its own."""
        self.weights_update = update
        if self.progress.update == 0:
            self.progress.update = update

    def _keep_best(self, metrics: Mapping[str, float] | None) -> None:
        """Remember the best validation for the summary: of equal ones the later, as the checkpoints do."""
        metric = getattr(self.checkpointer, "best_metric", None) or "loss"
        value = (metrics or {}).get(metric, math.nan)
        if not math.isfinite(value):
            return
        sign = -1.0 if getattr(self.checkpointer, "best_mode", "min") == "max" else 1.0
        best = self.progress.best
        if not best or sign * value <= sign * best[metric]:
            self.progress.best = {"update": self.progress.update, **(metrics or {})}
