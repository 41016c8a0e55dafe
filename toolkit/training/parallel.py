"""How the ranks share one model: whole on each of them (``ddp``), or cut into shards (``fsdp2``).

In both the gradient of an update is the sum over micro-batches and ranks; `toolkit.training.step` divides it by the
global number of targets. What differs is who holds what, and when the ranks meet: replicas once an update, shards in
every block of every forward and backward. So under ``fsdp2`` all ranks have to go through the same blocks in the same
order, whatever came to them; `Shards` sees to that.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _composable_state

from toolkit.errors import ConfigError
from toolkit.training.devices import Device
from toolkit.training.distributed import World, reduce_gradients

NEEDED = ("set_reduce_scatter_unused_params", "set_force_sum_reduction_for_comms", "reset_iter_state")
"""Methods of torch's FSDPModule without which ranks that do different work would wait for each other for ever."""


class Parallel(Protocol):
    """What the loop asks of either kind."""

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether this rank's micro-batches gave the parameter a gradient."""

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each gradient (this rank's part of it) the sum over all ranks."""

    def forget(self) -> None:
        """The update is over."""

    def follow_frozen(self) -> None:
        """``requires_grad`` of some parameters has changed."""

    def lent(self, micro: Any) -> tuple[Any, int] | None:
        """For a rank without a batch: the batch of another, with its index, that it has to go through as well."""

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Around each forward and backward."""

    def held(self) -> contextlib.AbstractContextManager[None]:
        """While it is open, ranks may run the modules without each other and without gradient."""

    def finish(self) -> Parallel:
        """Training is over: every rank has whole modules again; returns who answers from now on."""

    def abandon(self) -> None:
        """The run ends here, whatever the others do: let go of the process group."""


class Replicas:
    """Every rank holds the whole model; gradients are summed once an update, in flat pieces.

    Example
    -------
    >>> Replicas(World()).finish().has_gradient(nn.Parameter(torch.ones(1)))
    False
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        """See `Parallel`."""
        return parameter.grad is not None

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `Parallel`; gradients that this rank lacks count as zeros."""
        reduce_gradients(self.world, parameters)

    def forget(self) -> None:
        """Nothing was kept."""

    def follow_frozen(self) -> None:
        """Nothing has to follow."""

    def lent(self, micro: Any) -> None:
        """A rank without a batch waits at the update's end."""

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Each is alone."""
        return contextlib.nullcontext()

    def held(self) -> contextlib.AbstractContextManager[None]:
        """They always may."""
        return contextlib.nullcontext()

    def finish(self) -> Replicas:
        """They are whole already."""
        return self

    def abandon(self) -> None:
        """Nothing holds it."""


class Shards:
    """Torch's fully sharded data parallelism (FSDP2): parameters, gradients and the optimizer's state in shards.

    A model's ``blocks()`` (inner before outer ones) and then the model itself are gathered when they run and given
    back after; without that method there is one unit, the model. A rank that leaves a layer out in its micro-batch
    still takes part in gathering it (``keep_all`` of layer stacks), and one that has no batch goes through another's
    with a gradient of zero. Models have to be called as modules: a method that reads a parameter outside of
    ``forward`` finds a shard.

    Arguments
    ---------
    modules : changed in place; every rank gets the weights of the main process first.
    world : the ranks; one alone is allowed, and shares with nobody.
    device : where the modules are.

    Raises
    ------
    ConfigError : torch is too old.
    """

    def __init__(self, modules: nn.ModuleDict, world: World, device: Device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        lacking = [name for name in NEEDED if not hasattr(FSDPModule, name)]
        if lacking:
            raise ConfigError(
                f"--parallel fsdp2 needs FSDPModule.{lacking[0]}, which torch {torch.__version__} does not have; "
                "install torch 2.13 or later, or take --parallel ddp."
            )
        # Nothing in the toolkit writes into what a module returned.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        share_weights(world, modules)
        self.modules, self.world = modules, world
        self._own_group = not dist.is_initialized()
        if self._own_group:
            dist.init_process_group("gloo" if device.type == "cpu" else device.backend, store=dist.HashStore(),
                                    rank=0, world_size=1)  # fmt: skip
        mesh = init_device_mesh(device.type, (world.size,))
        # torch's caches keep meshes for ever; one that keeps the group would keep its threads, see `init_world`. The
        # mesh finds its group by name.
        getattr(mesh, "_pg_registry", {}).clear()
        self._before = [_Before(module) for module in modules.modules()]
        self._roots = [module for module in modules.values() if any(True for _ in module.parameters())]
        self._units: list[Any] = []
        self._ran: set[Any] = set()  # what runs for the first time is set up by torch for it
        for root in self._roots:
            blocks = root.blocks() if hasattr(root, "blocks") else []
            for unit in (*blocks, root):
                # The order of micro-batches and ranks is the only difference to replicas: sums, and nothing divided.
                fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not root)
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
                self._units.append(unit)
            root.set_reduce_scatter_unused_params(True)
            root.register_forward_pre_hook(lambda module, _: self._ran.add(module))
        for before in self._before:
            before.note_sharding()
        self._set_keep_all(True)
        self._used: set[str] = set()
        self._watched: set[str] = set()
        self._name_of = {id(parameter): name for name, parameter in modules.named_parameters()}
        self._trained: list[bool] = []

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        """See `Parallel`."""
        return self._name_of[id(parameter)] in self._used

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """They were summed in the backward passes; those that no rank used were given zeros there, and lose them."""
        chosen = {id(parameter) for parameter in parameters}
        for parameter in self.modules.parameters():
            if id(parameter) not in chosen:
                parameter.grad = None

    def forget(self) -> None:
        """See `Parallel`."""
        self._used.clear()

    def follow_frozen(self) -> None:
        """Gathered parameters are others than the shards that the optimizer knows: they are told, and watched."""
        trained = [parameter.requires_grad for parameter in self.modules.parameters()]
        if trained == self._trained:
            return
        self._trained = trained
        self._gather()
        for (name, parameter), trains in zip(self.modules.named_parameters(), trained, strict=True):
            parameter.requires_grad_(trains)
            if trains and name not in self._watched:
                self._watched.add(name)
                parameter.register_post_accumulate_grad_hook(partial(self._note, name))
        for unit in self._units:
            unit.reshard()

    def _note(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:  # a block that was left out comes here too, without one
            self._used.add(name)

    def lent(self, micro: Any) -> tuple[Any, int] | None:
        """See `Parallel` (a collective, once a micro-batch)."""
        if self.world.size == 1:
            return None
        indices = self.world.gather_objects(None if micro.batch is None else micro.micro)
        if None not in indices:
            return None
        lender = next((rank for rank, index in enumerate(indices) if index is not None), None)
        if lender is None:
            return None
        batch = self.world.broadcast_object(micro.batch if self.world.rank == lender else None, source=lender)
        return None if micro.batch is not None else (batch, indices[lender])

    def together(self) -> contextlib.AbstractContextManager[None]:
        """The ranks gather parameters and sum gradients in there: a failure is told in words."""
        return self.world.in_words("gather the parameters", only_collectives=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See `Parallel`; each rank holds all parameters as long (a collective at its beginning)."""
        self._set_resharding(False)
        self._gather()
        try:
            yield
        finally:
            self._set_resharding(True)
            for unit in self._units:
                unit.reshard()
            for root in self._ran:
                # Forget who ran what: ranks that ran less would otherwise prefetch less in the next backward.
                root.reset_iter_state()

    def finish(self) -> Replicas:
        """See `Parallel` (a collective)."""
        for unit in self._units:
            unit.reshard()
        with self.world.in_words("gather the whole model"):
            whole = {
                parameter: nn.Parameter(parameter.full_tensor().detach(), requires_grad=parameter.requires_grad)
                for parameter in self.modules.parameters()
            }
        self.abandon()
        # one of two names (tied weights) too
        for name, parameter in list(self.modules.named_parameters(remove_duplicate=False)):
            owner, _, last = name.rpartition(".")
            setattr(self.modules.get_submodule(owner), last, whole[parameter])
        return Replicas(self.world)

    def abandon(self) -> None:
        """See `Parallel`; parameters stay in shards."""
        for before in self._before:
            before.restore()
        self._set_keep_all(False)
        self._units.clear()
        self._ran.clear()
        # What held the group refers to itself in circles.
        gc.collect()
        if self._own_group and dist.is_initialized():
            dist.destroy_process_group()

    def _gather(self) -> None:
        with self.world.in_words("gather the parameters"):
            for unit in self._units:
                unit.unshard()

    def _set_resharding(self, on: bool) -> None:
        for unit in self._units:
            unit.set_reshard_after_forward(on and unit not in self._roots, recurse=False)

    def _set_keep_all(self, on: bool) -> None:
        for module in self.modules.modules():
            if hasattr(module, "keep_all"):
                module.keep_all = on


class _Before:
    """What a module was before it was sharded: its class, hooks and attributes. What a recipe adds later is its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, module.__class__
        self.names = set(module.__dict__)
        self.hooks = {name: set(value) for name, value in module.__dict__.items() if _is_hooks(name, value)}
        self.added: set[str] = set()
        self.added_hooks: dict[str, set[int]] = {}

    def note_sharding(self) -> None:
        """The module has just been sharded: what is new came from that."""
        self.added = self.module.__dict__.keys() - self.names
        self.added_hooks = {name: set(self.module.__dict__[name]) - known for name, known in self.hooks.items()}

    def restore(self) -> None:
        """Make it that again; parameters stay as they are now."""
        self.module.__class__ = self.kind
        for name in self.added:
            self.module.__dict__.pop(name, None)
        for name, added in self.added_hooks.items():
            hooks = self.module.__dict__[name]
            for key in [key for key, hook in hooks.items() if key in added or _is_of_torch(hook)]:
                del hooks[key]
        # torch's own list of what was sharded would not let it be sharded again.
        getattr(_composable_state, "_module_state_mapping", {}).pop(self.module, None)


def _is_of_torch(hook: Any) -> bool:
    """Whether torch's sharding made the hook, some of which it adds when a module first runs."""
    function = hook
    while hasattr(function, "func"):
        function = function.func
    return str(getattr(function, "__module__", "")).startswith("torch.distributed")


def _is_hooks(name: str, value: Any) -> bool:
    return isinstance(value, OrderedDict) and "hooks" in name


def make_parallel(kind: str, modules: nn.ModuleDict, world: World, device: Device) -> Parallel:
    """``ddp`` or ``fsdp2`` for ``modules`` (sharded in place)."""
    return Shards(modules, world, device) if kind == "fsdp2" else Replicas(world)


def share_weights(world: World, modules: nn.Module) -> None:
    """Give every rank the weights and buffers of the main process (a collective)."""
    if world.size > 1:
        with torch.no_grad():
            tensors = [value for value in modules.state_dict().values() if isinstance(value, Tensor)]
            for tensor in tensors:
                # Zeros elsewhere make the sum a copy; right before it, so that a weight of two names stays what it is.
                if not world.is_main:
                    tensor.zero_()
                world.all_reduce_sum(tensor)
