"""What is left of a run that an error ends: which batch it was, whether the state is worth keeping, a report."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import (
    CheckpointError,
    DeviceError,
    DivergenceError,
    ToolkitError,
    TrainingError,
    WorkerError,
    describe_out_of_memory,
    is_out_of_memory,
)
from toolkit.training.distributed import World
from toolkit.training.folders import write_json
from toolkit.training.guard import REPORT_NAME, name_some
from toolkit.training.limits import EvaluationStopped, StopSignal
from toolkit.training.objective import Stage
from toolkit.training.progress import Progress
from toolkit.training.saving import Saver
from toolkit.training.step import UpdateStep

RANK_REPORT_NAME = "crash_report.rank{}.json"
"""The same of one rank, where the others could not be told."""


@dataclass(frozen=True)
class Place:
    """The batch that was worked on; plain values.

    Arguments
    ---------
    stage : "train", "valid" or "test".
    update : index (from 0) of the update, in training; else updates complete.
    micro : number of the micro-batch in the update, or of the batch in the set; None = between two batches.
    ids : its utterances.
    shapes : its tensors by name, with their sizes.

    Example
    -------
    >>> Place.of({"waveforms": torch.zeros(2, 800), "ids": ["a", "b"]}, stage="train", update=3, micro=0).words
    'a batch of 2 utterances (waveforms 2 x 800; a, b)'
    """

    stage: str
    update: int
    micro: int | None = None
    ids: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any, *, stage: str, update: int, micro: int | None) -> Place:
        """Where ``batch`` (any object, mapping or sequence with tensors; None = no batch) is worked on."""
        named = dict(_named_values(batch))
        shapes = {name: tuple(value.shape) for name, value in named.items() if isinstance(value, Tensor)}
        ids = named.get("ids", ())
        return cls(stage, update, micro, tuple(map(str, ids)) if isinstance(ids, Sequence) else (), shapes)

    @property
    def words(self) -> str:
        """The batch in words; empty without one."""
        # Sizes of more than one dimension are what memory is made of.
        wide = {name: shape for name, shape in self.shapes.items() if len(shape) > 1} or self.shapes
        shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in wide.items())
        details = "; ".join(part for part in (shapes, name_some(self.ids)) if part)
        if not details:
            return ""
        what = f"a batch of {len(self.ids)} utterance{'s' if len(self.ids) > 1 else ''}" if self.ids else "a batch"
        return f"{what} ({details})"


def _named_values(batch: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a batch by name."""
    if isinstance(batch, Mapping):
        yield from ((str(name), value) for name, value in batch.items())
    elif isinstance(batch, Tensor):
        yield "tensor", batch
    elif getattr(batch, "__dict__", None):
        yield from vars(batch).items()
    elif isinstance(batch, list | tuple):
        names = getattr(batch, "_fields", [f"part {index}" for index in range(len(batch))])
        yield from zip(names, batch, strict=True)


@dataclass(frozen=True)
class Failure:
    """An error of one rank; plain values, so that the others can be told.

    Arguments
    ---------
    rank : whose.
    kind, sentence : the error's class and words.
    place : the batch.
    is_users : whether its sentence is written for the user (a `ToolkitError`).
    is_stop : whether it only follows from the run having been told to stop.
    is_interrupt : whether that was by Ctrl-C.
    trace : the traceback in lines.
    """

    rank: int
    kind: str
    sentence: str
    place: Place
    is_users: bool = False
    is_stop: bool = False
    is_interrupt: bool = False
    trace: tuple[str, ...] = ()

    @property
    def is_mistake(self) -> bool:
        """Whether the user can mend it, and its sentence says how; a worker that died is nobody's mistake."""
        return self.is_users and self.kind != WorkerError.__name__

    @classmethod
    def of(
        cls, error: Exception, *, rank: int, place: Place, is_stop: bool = False, is_interrupt: bool = False
    ) -> Failure:
        """What ``error`` says; memory that ran out is told with the batch."""
        sentence = describe_out_of_memory(error, batch=place.words) if is_out_of_memory(error) else str(error)
        trace = tuple("".join(traceback.format_exception(error)).splitlines())
        return cls(
            rank, type(error).__name__, sentence, place, isinstance(error, ToolkitError), is_stop, is_interrupt, trace
        )


class CurrentWork:
    """What this rank is at, so that an error is told with its batch and it is known what can still be saved.

    Arguments
    ---------
    world : the ranks.
    progress : the place of the run.

    ``is_making`` : an update was begun and is not complete. ``is_changing`` : it may have changed some of the weights.
    ``failures`` : the errors of all ranks, where all were told of them; else empty.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> from toolkit.training.limits import RunLength
    >>> work = CurrentWork(World(), Progress(RunLength(3, None), World()))
    >>> work.begin_batch(Stage.VALID, SimpleNamespace(batch={"ids": ["a"]}, micro=2))
    >>> work.failure(ValueError("no such word"), StopSignal()).place
    Place(stage='valid', update=0, micro=2, ids=('a',), shapes={})
    """

    def __init__(self, world: World, progress: Progress) -> None:
        self.world, self.progress = world, progress
        self.is_making = self.is_changing = False
        self.failures: list[Failure] = []
        self.end_batch()

    def begin_batch(self, stage: Stage, micro: Any) -> None:
        """``micro`` (``batch``, ``micro``) is worked on from here."""
        self._stage, self._micro = stage, micro

    def end_batch(self) -> None:
        """What follows is between two batches."""
        self._stage, self._micro = Stage.TRAIN, None

    @property
    def all_were_told(self) -> bool:
        """Whether every rank knows that the run ends, and takes part in what is done about it."""
        return bool(self.failures) or self.world.size == 1

    @property
    def is_whole(self) -> bool:
        """Whether the state is that after a whole update, on all ranks, and all of them are here (for a collective)."""
        return self.all_were_told and not self.is_changing

    def given_up(self, failures: list[Failure]) -> TrainingError:
        """Other ranks have given the update up, and nothing was changed by it; returns the error that ends this one."""
        self.failures, self.is_changing = failures, False
        first = failures[0]
        return TrainingError(f"process {first.rank} of {self.world.size} ended ({first.kind}): {first.sentence}")

    def tell(self, error: Exception, stop: StopSignal, step: UpdateStep) -> None:
        """Tell the other ranks of an error before the update's gradients were ready, and hear of theirs.

        The weights have not changed since the last update. Where each rank holds the whole model, the others come to no
        other exchange before their gradients are ready: there they learn that this update will not be made, and all
        can save what was.
        """
        if self.world.size > 1 and not isinstance(error, DeviceError):
            with contextlib.suppress(DeviceError):
                self.failures = step.give_up(self.failure(error, stop))

    def failure(self, error: Exception, stop: StopSignal) -> Failure:
        """``error`` with the batch that is worked on; ``stop`` says whether the run was told to stop."""
        batch, number = (None, None) if self._micro is None else (self._micro.batch, self._micro.micro)
        place = Place.of(batch, stage=self._stage.value, update=self.progress.update, micro=number)
        # What a scheduler tells to stop are often all processes, and the workers go at once.
        is_stop = isinstance(error, EvaluationStopped | WorkerError) and stop.received
        is_interrupt = is_stop and stop.interrupted
        return Failure.of(error, rank=self.world.rank, place=place, is_stop=is_stop, is_interrupt=is_interrupt)


def save_and_report(
    saver: Saver,
    optimizer: torch.optim.Optimizer | None,
    work: CurrentWork,
    *,
    failures: Sequence[Failure],
    folder: Path | None,
    about: Mapping[str, Any],
) -> str:
    """Save what is worth it, write the report, and return the sentence on where the run broke off and what was done.

    Arguments
    ---------
    failures : what ends the run; where all ranks were told, all give the same.
    folder : for the report; None = nowhere.
    about : facts of the run for it (epoch, learning rate, options, ...).
    """
    outcome = save_crashed(saver, optimizer, work, failures)
    path, world = None, work.world
    if world.is_main or not work.all_were_told:
        name = REPORT_NAME if world.is_main else RANK_REPORT_NAME.format(world.rank)
        path = write_report(folder, failures, about=about, outcome=outcome, name=name)
    first = failures[0]
    where = f" with {first.place.words}" if first.place.words else ""
    why = "" if first.is_users else f": {first.kind}"
    report = f"; all of it is in {path}" if path else ""
    return f"update {work.progress.update} broke off{where}{why}; {outcome}{report}."


def write_report(
    folder: Path | None, failures: Sequence[Failure], *, about: Mapping[str, Any], outcome: str, name: str = REPORT_NAME
) -> Path | None:
    """Write what is known into ``folder`` (None: nowhere), and return where; None where it cannot be written."""
    if folder is None:
        return None
    first = failures[0]
    values = {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "error": f"{first.kind}: {first.sentence}",
        "update": first.place.update,
        "utterances": list(first.place.ids),
        "batch": {name: list(shape) for name, shape in first.place.shapes.items()},
        "outcome": outcome,
        **about,
        "failures": [asdict(failure) for failure in failures],
    }
    try:
        return write_json(folder / name, values)
    except OSError:  # a full disk, for one, which is told by the error itself
        return None


def remove_reports(folder: Path | None) -> list[str]:
    """Remove the reports of earlier starts from ``folder`` (None: nothing); returns their names."""
    reports = [] if folder is None else [folder / REPORT_NAME, *sorted(folder.glob(RANK_REPORT_NAME.format("*")))]
    removed = []
    for path in reports:
        with contextlib.suppress(OSError):  # there is none, or no right to remove it: no reason to end a whole run
            path.unlink()
            removed.append(path.name)
    return removed


def save_crashed(
    saver: Saver, optimizer: torch.optim.Optimizer | None, work: CurrentWork, failures: Sequence[Failure]
) -> str:
    """Save the state after the last whole update where that can be done and is worth it, and say what was done."""
    world, saved_update = work.world, saver.saved_update
    update = saver.progress.update
    counts = f"the checkpoint of update {saved_update} counts" if saved_update else "there is no earlier checkpoint"
    if saver.checkpointer is None:
        return "nothing is saved, as this Brain has no checkpointer"
    if work.is_whole:
        try:
            saver.wait()  # the last one may still be on its way to the disk
        except Exception as second:  # the error that ends the run is the one to be raised
            return f"{second} The last sound checkpoint counts"
    if update == saved_update:
        return f"{counts}, nothing was trained after it" if saved_update else "no update was complete, nothing is saved"
    kinds = {failure.kind for failure in failures}
    if CheckpointError.__name__ in kinds:
        return "the last sound checkpoint counts"
    if DivergenceError.__name__ in kinds:
        return f"no checkpoint is made of a training that went wrong; {counts}"
    if not work.is_whole:
        why = "the other processes were not there to save" if world.size > 1 else "the weights were being changed"
        return f"no checkpoint could be made, as {why}; {counts}"
    wrong = next((name for name in world.gather_objects(not_finite(saver.modules, optimizer)) if name), None)
    if wrong is not None:
        return f"no checkpoint is made, as {wrong} is not finite; {counts}"
    try:
        saver.save()
    except Exception as second:  # the error that ends the run is the one to be raised
        return f"a checkpoint could not be made ({second}); {counts}"
    return f"saved at update {update}; run the same command again to go on from there"


def not_finite(modules: nn.Module, optimizer: torch.optim.Optimizer | None) -> str | None:
    """The first weight or optimizer state that is not finite, by name; None where all are (waits for the device).

    A buffer counts only where it is not a number: an infinity may be meant, in a mask for instance.
    """
    names = {}
    for name, parameter in modules.named_parameters():
        names[parameter] = name
        if not bool(torch.isfinite(parameter.detach()).all()):
            return name
    for name, buffer in modules.named_buffers():
        if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
            return name
    for parameter, state in ({} if optimizer is None else optimizer.state).items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                return f"the optimizer's {key} of {names.get(parameter, 'a weight')}"
    return None
