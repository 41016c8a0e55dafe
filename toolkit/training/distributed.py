"""Several processes as one run: the process group, sums that are the same on every rank, gradients in flat pieces."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from toolkit import errors
from toolkit.errors import DeviceError, ToolkitError
from toolkit.training.attendance import Attendance
from toolkit.training.devices import Device

BUCKET_MEGABYTES = 32.0
"""Gradients are summed in flat pieces of about this size: few messages, and the first travels while others pack."""


@dataclass(frozen=True)
class World:
    """This process among all of the run; ``World()`` is a run of one process, where every sum is the value itself.

    Example
    -------
    >>> world = World()
    >>> world.is_main, world.all_reduce_sum(3.5), world.gather_objects("a")
    (True, 3.5, ['a'])
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    backend: str | None = None
    timeout_minutes: float = 30.0
    attendance: Attendance | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def at(self, where: str) -> None:
        """Which part of the run comes now (``update 17``), for what is said when a process does not come."""
        if self.attendance is not None:
            self.attendance.where = where

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """``value`` of the process ``source``, on every process."""
        if self.size == 1:
            return value
        box = [value]
        with self.in_words("send an object"):
            dist.broadcast_object_list(box, src=source)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all processes in rank order, on every process."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        with self.in_words("gather objects"):
            dist.all_gather_object(box, value)
        return box

    def all_reduce_sum(self, value: Any) -> Any:
        """Sum over processes, the same bits on every one.

        Arguments
        ---------
        value : a tensor or a list of tensors, summed in place without waiting for the device; or a number, or a
            mapping of names to numbers, summed in float64 in rank order (whole numbers stay whole).

        Returns
        -------
        The same tensors, or the new number or dict.
        """
        if isinstance(value, torch.Tensor):
            self._sum_tensors([value])
            return value
        if isinstance(value, list):
            self._sum_tensors(value)
            return value
        if isinstance(value, Mapping):
            every = self.gather_objects({name: _host_number(item) for name, item in value.items()})
            names = dict.fromkeys(name for one in every for name in one)
            return {name: _ordered_sum([one.get(name, 0) for one in every]) for name in names}
        return _ordered_sum(self.gather_objects(_host_number(value)))

    def close(self) -> None:
        """Leave the process group; harmless without one."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _sum_tensors(self, tensors: list[torch.Tensor]) -> None:
        if self.size > 1:
            with self.in_words("sum tensors"):
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def in_words(self, action: str, *, only_collectives: bool = False) -> _InWords:
        """While it is open, the failure of a collective is raised as a DeviceError: one sentence.

        Arguments
        ---------
        action : what the processes do together, as "sum gradients".
        only_collectives : other work is done inside as well, whose errors are passed on as they are.
        """
        return _InWords(self, action, only_collectives)


@dataclass(frozen=True)
class _InWords:
    """Turns a collective's failure into one sentence."""

    world: World
    action: str
    only_collectives: bool

    def __enter__(self) -> None:
        if self.world.attendance is not None:
            self.world.attendance.note(self.action)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, ToolkitError):
            return
        if self.only_collectives and not _is_of_collective(error):
            return
        world, attendance = self.world, self.world.attendance
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "timeout" in first.lower() or "timed out" in first.lower():
            missing = "" if attendance is None else attendance.describe_missing()
            why = (
                f"{missing + ',' if missing else 'another process'} did not come within {world.timeout_minutes:g} "
                "minutes; look at its last lines, or raise --distributed_timeout_minutes"
            )
        else:
            why = "another process has ended or the network failed; look at the first error in all logs"
        where = f" in {attendance.where}" if attendance is not None and attendance.where else ""
        raise DeviceError(
            f"process {world.rank} of {world.size} could not {self.action}{where}: {why} ({first})."
        ) from error


def _is_of_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _host_number(value: Any) -> int | float:
    """A number on the host: whole numbers as int, others as float64."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, bool | int | np.integer):
        return int(value)
    return float(value)


def _ordered_sum(values: list[int | float]) -> int | float:
    """Plain addition in rank order: every process adds the same numbers the same way."""
    total: int | float = 0
    for value in values:
        total = total + value
    return total


def environment_rank(local_rank: int | None = None) -> tuple[int, int, int]:
    """(rank, local rank, number of processes) as a launcher set them; (0, 0, 1) without one.

    Raises
    ------
    DeviceError : a variable is no whole number, or some are missing.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 0, 1
    rank, size = _environment_number("RANK"), _environment_number("WORLD_SIZE")
    if not 0 <= rank < size:
        raise DeviceError(f"the environment sets RANK={rank} and WORLD_SIZE={size}; RANK must lie below WORLD_SIZE.")
    if "LOCAL_RANK" in os.environ:
        local_rank = _environment_number("LOCAL_RANK")
    return rank, rank if local_rank is None else local_rank, size


def _environment_number(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError) as error:
        raise DeviceError(
            f"the environment variable {name} is {os.environ.get(name)!r}, but a whole number is needed beside "
            "the others of a launcher; start with torchrun."
        ) from error


def init_world(
    device: Device, *, backend: str | None = None, timeout_minutes: float = 30.0, local_rank: int | None = None
) -> World:
    """Join the process group that the environment describes (torchrun); one process without such.

    Arguments
    ---------
    backend : the collectives library; None takes the device's own (gloo for the CPU, nccl for CUDA, ...).
    timeout_minutes : how long a process waits for the others.

    Raises
    ------
    DeviceError : the group cannot be formed, or torch has no such library (also told with one process); says why.
    """
    rank, local_rank, size = environment_rank(local_rank)
    chosen = backend or device.backend
    if size > 1 and not dist.is_available():
        raise DeviceError("this build of torch has no torch.distributed; run one process, without torchrun.")
    if backend:
        _require_backend(backend)  # a device's own library may come with its plugin only when it is first used
    if size == 1:
        return World(timeout_minutes=timeout_minutes)
    # Its functions take the group that stands when it is imported (by the first optimizer) as a default and would keep
    # that alive: gloo's threads would then outlive `World.close` and now and then abort a process that is ending.
    importlib.import_module("torch.distributed.nn")
    # Objects and host tensors travel by gloo, the device's tensors by its own library.
    config = chosen if device.type == "cpu" or ":" in chosen else f"cpu:gloo,{device.type}:{chosen}"
    bound = device.torch_device if chosen == "nccl" else None
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        store = _of_this_start(store)
        store.set_timeout(timeout)
        dist.init_process_group(
            config, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout, device_id=bound
        )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeviceError(
            f"process {rank} of {size} on {socket.gethostname()} could not join the others at {address} by {chosen} "
            f"within {timeout_minutes:g} minutes ({reason}); are all started, with one address, and is the port free?"
        ) from error
    attendance = Attendance(dist.PrefixStore("attendance", store), rank, size)
    return World(rank, local_rank, size, chosen, timeout_minutes, attendance)


def _require_backend(backend: str) -> None:
    """DeviceError unless torch has the collectives library, or all of a list by device ("cpu:gloo,cuda:nccl")."""
    if not dist.is_available():
        raise DeviceError("this build of torch has no torch.distributed; leave out --distributed_backend.")
    for name in (word.rpartition(":")[2].strip() for word in backend.split(",")):
        if not dist.is_backend_available(name):
            known = [one for one in dist.Backend.backend_list if dist.is_backend_available(one)]
            known = sorted(set(known) - {"undefined", "fake"})
            raise DeviceError(
                f"torch has no collectives library {name!r} here (known: {', '.join(known) or 'none'}); name another "
                "by --distributed_backend, or install a build of torch or a plugin that has it."
            )


def _of_this_start(store: dist.Store) -> dist.Store:
    """``store`` without what earlier starts of these ranks left in it.

    torchrun starts ranks again (``--max-restarts``) with the store that they had: there they would find the addresses
    of processes that are gone, and wait for them. Only one node counts the restarts alike on all ranks; on several,
    the store has to be a new one (`toolkit.launch`, or TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return store
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def reduce_gradients(
    world: World, parameters: Iterable[torch.nn.Parameter], *, bucket_mb: float = BUCKET_MEGABYTES
) -> None:
    """Replace each gradient by its sum over all processes.

    Gradients travel in flat pieces, each sent while the next is packed. A gradient that a process does not have (a
    layer it left out) counts as zeros; afterwards every parameter that takes part has one. All processes must pass
    the same parameters in the same order. With one process nothing happens.
    """
    if world.size == 1:
        return
    sent: list[tuple[list[torch.nn.Parameter], torch.Tensor, Any]] = []
    with world.in_words("sum gradients"):
        for bucket in _buckets(parameters, int(bucket_mb * 2**20)):
            rows = [_gradient(parameter).reshape(-1) for parameter in bucket]
            flat = rows[0] if len(rows) == 1 else torch.cat(rows)
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in sent:
            work.wait()
            pieces = flat.split([parameter.numel() for parameter in bucket])
            gradients = [_gradient(parameter) for parameter in bucket]
            shaped = [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]
            torch._foreach_copy_(gradients, shaped)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter's gradient, made as zeros where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(parameters: Iterable[torch.nn.Parameter], limit: int) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters that take gradients, in groups of one type and device of at most ``limit`` bytes (or one alone)."""
    bucket: list[torch.nn.Parameter] = []
    held = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        size = parameter.numel() * parameter.element_size()
        alike = not bucket or (parameter.dtype, parameter.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (held + size > limit or not alike):
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += size
    if bucket:
        yield bucket


def run_on_main(world: World, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` on the main process while the others wait; its result comes to all.

    An error of the toolkit on the main process is raised on every process, so that none waits for ever; so is its end
    (SystemExit) where it was told to stop.
    """
    if world.size == 1:
        return function(*args, **kwargs)
    outcome: tuple[str, Any] = ("none", None)
    failure: BaseException | None = None
    if world.is_main:
        try:
            outcome = ("value", function(*args, **kwargs))
        except (ToolkitError, OSError) as error:
            failure, outcome = error, ("error", (type(error).__name__, _sentence(error)))
        except SystemExit as ended:
            failure, outcome = ended, ("exit", ended.code)
    kind, value = world.broadcast_object(outcome)
    if failure is not None:
        raise failure
    if kind == "exit":
        raise SystemExit(value)
    if kind == "error":
        raise getattr(errors, value[0], ToolkitError)(value[1])
    return value


def _sentence(error: BaseException) -> str:
    return errors.describe_os_error(error) if isinstance(error, OSError) and error.errno else str(error)
