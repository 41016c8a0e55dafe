"""Saving a run and going on with it: which checkpoints there are, which to keep, what belongs into one."""

from __future__ import annotations

import math
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from toolkit.errors import CheckpointError, ConfigError, describe_os_error
from toolkit.training.background import BackgroundTask, Snapshot
from toolkit.training.checkpoint_format import (
    CHECKSUMS_NAME,
    Copy,
    TensorFile,
    clear_leftovers,
    delete_folder,
    host_tensor,
    join_state,
    load_module,
    name_of_tensor,
    optimizer_from_tensors,
    optimizer_to_tensors,
    present_folders,
    problem_of,
    read_state,
    set_aside,
    some_names,
    split_state,
    step_name,
    write_folder,
)
from toolkit.training.distributed import World, run_on_main
from toolkit.training.same_run import changed_settings, require_same_data

__all__ = ["CheckpointInfo", "Checkpointer", "optimizer_from_tensors", "optimizer_to_tensors"]

FORMAT = 1


@dataclass(frozen=True)
class CheckpointInfo:
    """A valid checkpoint: where it lies, after how many updates, with which metrics, when written (Unix time)."""

    path: Path
    update: int
    metrics: dict[str, float] = field(default_factory=dict)
    time: float = 0.0


class Checkpointer:
    """Checkpoints of one run under a folder (``<output_folder>/save``).

    Arguments
    ---------
    folder : made at the first save.
    keep_last : how many of the newest to keep (at least 1).
    keep_best : how many of the best by ``best_metric`` to keep besides.
    best_metric : name among the metrics given to `save`; None: there is no best.
    best_mode : ``min`` or ``max``.
    world : the main process writes, every process reads; an error of the main process is raised on all.
    manifests : name to fingerprint of the manifests whose rows the run goes through; another one on resuming is
        refused.
    settings : hyper-parameters of the run (`HparamsPlan.settings`); others on resuming are warned of.
    log : called with each warning, a sentence; None: ``warnings.warn``.

    ``describe_changes`` may hold, by the name of a manifest, what says how its rows differ from those of the run.
    ``validation`` is the fingerprint of the validation set ("" = none, or not known); another one on resuming is told.

    Example
    -------
    >>> import tempfile
    >>> model = torch.nn.Linear(2, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpointer = Checkpointer(folder)
    ...     checkpointer.add("model", model)
    ...     path = checkpointer.save(10, {"epoch": 1})
    ...     path.name, checkpointer.load(checkpointer.find_latest())
    ('step_00000010', {'epoch': 1})
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        best_metric: str | None = None,
        best_mode: str = "min",
        world: World | None = None,
        manifests: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        if keep_last < 1 or keep_best < 0:
            raise ConfigError(f"keep_last must be 1 or more and keep_best 0 or more, but are {keep_last}, {keep_best}.")
        if best_mode not in ("min", "max"):
            raise ConfigError(f"best_mode must be min or max, but is {best_mode!r}.")
        self.folder = Path(folder)
        self.keep_last, self.keep_best = keep_last, keep_best
        self.best_metric, self.best_mode = best_metric, best_mode
        self.world = world or World()
        self.manifests = dict(manifests or {})
        self.describe_changes: dict[str, Callable[[], str]] = {}
        self.settings = dict(settings or {})
        self.validation = ""
        self._log = log
        self._objects: dict[str, Any] = {}
        self._verified: set[Path] = set()
        self._damaged: set[Path] = set()
        self._warned: set[str] = set()
        self._snapshot = Snapshot()
        self._writer = BackgroundTask()
        self._is_pending = False

    def add(self, name: str, obj: Any) -> None:
        """Have ``obj`` saved and loaded under ``name``.

        A module's tensors go to ``name.safetensors``; an optimizer's state too, by parameter name (add its modules
        as well); of anything else with ``state_dict`` and ``load_state_dict`` the tensors go there and plain values
        to ``state.json``.
        """
        if not (hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")):
            raise ConfigError(f"{name!r} ({type(obj).__name__}) has no state_dict and load_state_dict to be saved by.")
        if not name.isidentifier() or name in ("state", "checksums"):
            raise ConfigError(f"{name!r} is no name for a part of a checkpoint; use letters, digits and underscores.")
        self._objects[name] = obj

    def save(
        self,
        update: int,
        state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        *,
        wait: bool = True,
    ) -> Path:
        """Write the checkpoint after ``update`` updates, then delete those that need not be kept.

        Arguments
        ---------
        state : plain values (numbers, text, lists, mappings) that `load` gives back.
        metrics : numbers by which the best are chosen.
        wait : False = return once the main process holds a copy of everything in host memory, which a thread writes;
            the memory is kept for the next time. Whatever needs the checkpoints waits for it: the next `save`,
            `list`, `load`, ... An error of it is raised there, or by `wait`: call that before the program ends.

        Raises
        ------
        CheckpointError : it, or the one that was still being written, could not be written (disk full, no rights);
            nothing half is left, and those written before stay as they were. A save that waits is tried in any case,
            as it may be the last: where it succeeds, the failure of the one before is a warning.
        """
        failure: CheckpointError | None = None
        try:
            self.wait()
        except CheckpointError as error:
            if not wait:
                raise
            failure = error
        snapshot = Snapshot(detached=False) if wait else self._snapshot
        snapshot.begin()
        tensors, values = self._collect(snapshot.copy if self.world.is_main else _not_needed)
        snapshot.end()
        content = {
            "format": FORMAT,
            "update": int(update),
            "time": time.time(),
            "metrics": split_state(dict(metrics or {}), where="the metrics")[0],
            "state": split_state(dict(state or {}), where="the run")[0],
            "objects": values,
            "manifests": dict(self.manifests),
            "validation": self.validation,
            "settings": split_state(self.settings, where="the settings")[0],
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        if wait:
            try:
                run_on_main(self.world, self._write, int(update), tensors, content)
            except CheckpointError:
                if failure is not None:
                    raise failure from None  # the first is the one to be told of
                raise
            if failure is not None:
                self._warn(_capitalized(failure))
        else:
            self._is_pending = True
            if self.world.is_main:
                self._writer.start(self._write, int(update), tensors, content)
        return self.folder / step_name(int(update))

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete (all processes call it).

        Raises
        ------
        CheckpointError : it could not be written; on every process.
        """
        if self._is_pending:
            try:
                run_on_main(self.world, self._writer.wait)
            finally:
                self._is_pending = False

    @property
    def is_writing(self) -> bool:
        """Whether this process is writing a checkpoint in the background."""
        return self._writer.is_running

    @property
    def has_failed(self) -> bool:
        """Whether this process could not write the last checkpoint, which `wait` will raise on all; asks no other."""
        return self._writer.has_failed

    def close(self) -> None:
        """Wait for what this process is writing, without the others; a failure that nobody was told of is a warning.

        For the end of a run that ends by an error of its own, where the others may not be waiting.
        """
        try:
            self._writer.wait()
        except Exception as error:
            self._warn(_capitalized(error))

    def _write(self, update: int, tensors: dict[str, dict[str, torch.Tensor]], content: dict[str, Any]) -> None:
        target = self.folder / step_name(update)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.folder)
            write_folder(target, tensors, content)
        except OSError as error:
            valid = [info.path.name for info in _present(self.folder)[0]]
            left = f"{', '.join(valid)} remain valid" if valid else "there is no earlier one"
            raise CheckpointError(
                f"the checkpoint {target} could not be written ({left}): {describe_os_error(error)}"
            ) from error
        self._verified.discard(target)
        self._damaged.discard(target)
        self._delete_old()

    def list(self) -> list[CheckpointInfo]:
        """The valid checkpoints, oldest first; of each other folder a warning says why it is passed over."""
        self.wait()
        found, problems = _present(self.folder)
        for problem in problems:
            self._warn(problem)
        return found

    def find_latest(self) -> Path | None:
        """The newest checkpoint all of whose files are sound, None without one."""
        return self._first_sound(reversed(self.list()))

    def find_best(self, metric: str | None = None, mode: str | None = None) -> Path | None:
        """The best sound checkpoint by ``metric`` (None: the one this Checkpointer keeps by), None without one."""
        return self._first_sound(_ranked(self.list(), metric or self.best_metric, mode or self.best_mode))

    def load(
        self, path: Path | str, *, names: tuple[str, ...] | None = None, resume: bool = True
    ) -> dict[str, Any]:
        """Put a checkpoint into the added objects and return the ``state`` it was saved with.

        Arguments
        ---------
        names : only these objects; None: all.
        resume : the run goes on from here: manifests must be the same; changed settings and another validation set are
            warned of.

        Raises
        ------
        CheckpointError : damaged, of another program, or not fitting the objects; says what and where.
        """
        self.wait()
        path = Path(path)
        self._check_sound(path)
        content = read_state(path)
        if int(content.get("format", 0)) > FORMAT:
            raise CheckpointError(f"the checkpoint {path} was written by a newer version of the toolkit; update it.")
        if resume:
            require_same_data(path, content.get("manifests", {}), self.manifests, describe=self.describe_changes)
            if content.get("validation") and self.validation and content["validation"] != self.validation:
                self._warn(
                    f"The validation set has changed since the checkpoint {path.name}: the best so far was found on "
                    "other data, and later validations do not compare with it."
                )
            saved = join_state(content.get("settings", {}), _no_tensor)
            if changed := changed_settings(saved, self.settings):
                self._warn(f"Settings differ from those of the checkpoint {path.name}: {changed}.")
        for name in names if names is not None else tuple(self._objects):
            if name not in self._objects:
                raise ConfigError(f"nothing called {name!r} was added; there are {some_names(self._objects)}.")
            self._load_object(path, name, content.get("objects", {}).get(name))
        return join_state(content.get("state", {}), _no_tensor)

    def resume(self) -> dict[str, Any] | None:
        """`load` the newest sound checkpoint; None when the run has not saved yet.

        Newer ones whose content is damaged are set aside (``step_00000010.damaged``): by their update they would stay
        among the ``keep_last`` newest, and what the run saves from here on would be deleted in their place.

        Raises
        ------
        CheckpointError : checkpoints were finished here, and none of them is sound any more.
        """
        path = self.find_latest()
        if path is None:
            finished = [path for _, path in present_folders(self.folder) if (path / CHECKSUMS_NAME).exists()]
            if finished:
                raise CheckpointError(
                    f"none of the checkpoints in {self.folder} is sound ({some_names(p.name for p in finished)}); "
                    "restore one from a copy, or delete the folder to begin anew."
                )
            return None
        state = self.load(path)  # a run that is refused here changes nothing in the folder
        run_on_main(self.world, self._set_damaged_aside)
        return state

    def average(self, k: int, *, metric: str | None = None, mode: str | None = None) -> dict[str, torch.Tensor]:
        """Mean of the model's tensors over the ``k`` newest checkpoints, or over the ``k`` best by ``metric``.

        Whole-number tensors are those of the first. Fewer than ``k`` are averaged, with a warning, when there are
        no more.
        """
        if k < 1:
            raise ConfigError(f"an average takes 1 checkpoint or more, but {k} were asked for.")
        infos = self.list()
        ranked = _ranked(infos, metric, mode or self.best_mode) if metric else list(reversed(infos))
        paths = [info.path for info in ranked if self._is_sound(info.path)][:k]
        if not paths:
            raise CheckpointError(f"there is no sound checkpoint in {self.folder} to average.")
        if len(paths) < k:
            self._warn(f"The average is over {len(paths)} checkpoints, because there are no {k}.")
        with ExitStack() as stack:
            files = [stack.enter_context(TensorFile(path, "model")) for path in paths]
            return {name: _mean([file[name] for file in files]) for name in files[0].names()}

    # ---------------------------------------------------------------- what goes into a checkpoint

    def _collect(self, copy: Copy) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Tensors by file and plain values by object; every process takes part, for tensors sharded over them."""
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        values: dict[str, Any] = {}
        for name, obj in self._objects.items():
            if isinstance(obj, torch.nn.Module):
                held = obj.state_dict().items()
                tensors[name] = {name_of_tensor(key): host_tensor(value, copy) for key, value in held}
            elif isinstance(obj, torch.optim.Optimizer):
                tensors[name], values[name] = optimizer_to_tensors(obj, self._parameter_names(), copy)
            else:
                values[name], found = split_state(obj.state_dict(), where=name, copy=copy)
                if found:
                    tensors[name] = found
        return tensors, values

    def _parameter_names(self) -> dict[str, torch.Tensor]:
        return {
            name_of_tensor(key if name == "model" else f"{name}.{key}"): parameter
            for name, obj in self._objects.items()
            if isinstance(obj, torch.nn.Module)
            for key, parameter in obj.named_parameters()
        }

    def _load_object(self, path: Path, name: str, value: Any) -> None:
        obj = self._objects[name]
        if isinstance(obj, torch.nn.Module):
            with TensorFile(path, name) as file:
                load_module(obj, file)
            return
        if value is None:
            raise CheckpointError(f"the checkpoint {path} holds nothing called {name!r}, which this run needs.")
        if isinstance(obj, torch.optim.Optimizer):
            with TensorFile(path, name) as file:
                tensors = {key: file[key].clone() for key in file.names()}  # not the file's own pages
            optimizer_from_tensors(obj, self._parameter_names(), tensors, value)
        elif (path / f"{name}.safetensors").exists():
            with TensorFile(path, name) as file:
                obj.load_state_dict(join_state(value, lambda place: file[place].clone()))
        else:
            obj.load_state_dict(join_state(value, _no_tensor))

    # ---------------------------------------------------------------- which are sound, which to keep

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warned and self.world.is_main:
            if self._log is not None:
                self._log(sentence)
            else:
                warnings.warn(sentence, stacklevel=3)
        self._warned.add(sentence)

    def _check_sound(self, path: Path) -> None:
        if path in self._verified:
            return
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint {path}; see which there are in {path.parent}.")
        problem = problem_of(path, thorough=True)
        if problem is not None:
            self._damaged.add(path)
            raise CheckpointError(f"the checkpoint {path} is not used: {problem}; take another, or a copy of it.")
        self._verified.add(path)

    def _is_sound(self, path: Path) -> bool:
        try:
            self._check_sound(path)
        except CheckpointError as error:
            self._warn(_capitalized(error))
            return False
        return True

    def _first_sound(self, infos: Any) -> Path | None:
        """The main process looks (it reads all files); the others take its word."""

        def look() -> Path | None:
            return next((info.path for info in infos if self._is_sound(info.path)), None)

        found = run_on_main(self.world, look)
        if found is not None:
            self._verified.add(found)
        return found

    def _set_damaged_aside(self) -> None:
        for path in sorted(path for path in self._damaged if path.parent == self.folder and path.is_dir()):
            try:
                aside = set_aside(path)
            except OSError as error:  # it still does not count, as long as this process runs
                self._warn(f"The damaged checkpoint {path} could not be set aside: {describe_os_error(error)}")
            else:
                self._damaged.discard(path)
                self._warn(
                    f"The damaged checkpoint {path.name} is set aside as {aside.name}; nothing uses it any more, "
                    "delete it when you like."
                )

    def _delete_old(self) -> None:
        # One that is known to be damaged takes no sound one's place.
        infos = [info for info in _present(self.folder)[0] if info.path not in self._damaged]
        kept = {info.path for info in infos[-self.keep_last :]}
        kept |= {info.path for info in _ranked(infos, self.best_metric, self.best_mode)[: self.keep_best]}
        for info in infos:
            if info.path not in kept:
                delete_folder(info.path)
                self._verified.discard(info.path)


def _no_tensor(place: str) -> torch.Tensor:
    raise CheckpointError(f"the checkpoint names a tensor {place!r} where there can be none.")


def _number(value: Any) -> float:
    number = join_state(value, _no_tensor)
    return float(number) if isinstance(number, int | float) else math.nan


def _present(folder: Path) -> tuple[list[CheckpointInfo], list[str]]:
    """The valid checkpoints, oldest first, and of each other folder a sentence why it is passed over."""
    found, problems = [], []
    for _, path in present_folders(folder):
        problem = problem_of(path, thorough=False)
        if problem is None:
            try:
                state = read_state(path)
            except CheckpointError as error:
                problem = str(error).rstrip(".")
            else:
                metrics = {name: _number(value) for name, value in state.get("metrics", {}).items()}
                found.append(CheckpointInfo(path, int(state["update"]), metrics, float(state.get("time", 0.0))))
                continue
        problems.append(f"The folder {path} is passed over: {problem}.")
    return found, problems


def _ranked(infos: list[CheckpointInfo], metric: str | None, mode: str) -> list[CheckpointInfo]:
    """Those that have the metric, the best first; of equal ones the later first."""
    if metric is None:
        return []
    sign = -1.0 if mode == "max" else 1.0
    able = [info for info in infos if not math.isnan(info.metrics.get(metric, math.nan))]
    return sorted(able, key=lambda info: (sign * info.metrics[metric], -info.update))


def _capitalized(error: Exception) -> str:
    return str(error)[:1].upper() + str(error)[1:]


def _not_needed(tensor: torch.Tensor, is_temporary: bool) -> torch.Tensor:
    """In place of a copy on the processes that write nothing."""
    return torch.empty(0)


def _mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    if not tensors[0].is_floating_point():
        return tensors[0].clone()
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)
