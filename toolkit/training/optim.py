"""Parameter groups, optimizers, and the scale of fp16 losses."""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Settings of the parameters whose names fit; a parameter goes to the first group that fits it.

    Arguments
    ---------
    match : patterns for full parameter names (``model.encoder.layers.0.fc1.weight``): ``*`` stands for anything;
        a name without ``*`` stands for a module and everything in it. One pattern or several.
    lr_factor : factor of the learning rate.
    weight_decay : None keeps the optimizer's own.
    freeze_updates : the parameters stand still in the first so many updates.
    vectors_only : only parameters with one dimension at most (biases, norms).

    Example
    -------
    >>> no_decay = ParameterGroup(match="*", vectors_only=True, weight_decay=0.0)
    >>> model = nn.Linear(2, 3)
    >>> [no_decay.fits(name, parameter) for name, parameter in model.named_parameters()]
    [False, True]
    """

    match: str | Sequence[str] = "*"
    lr_factor: float = 1.0
    weight_decay: float | None = None
    freeze_updates: int = 0
    vectors_only: bool = False

    def __post_init__(self) -> None:
        for name in ("lr_factor", "weight_decay", "freeze_updates"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} of the parameter group {self.name!r} is {value!r}, expected 0 or more.")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns as a tuple."""
        return (self.match,) if isinstance(self.match, str) else tuple(self.match)

    @property
    def name(self) -> str:
        """The patterns in one word, for logs and errors."""
        return ",".join(self.patterns)

    def fits(self, name: str, parameter: Tensor) -> bool:
        """Whether the parameter called ``name`` belongs here."""
        if self.vectors_only and parameter.ndim > 1:
            return False
        return any(
            fnmatch.fnmatchcase(name, pattern) or name == pattern or name.startswith(pattern + ".")
            for pattern in self.patterns
        )


def build_optimizer(
    modules: nn.Module,
    opt_class: Callable[..., torch.optim.Optimizer],
    groups: Sequence[ParameterGroup] = (),
    *,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of ``modules``, fused where torch has it so.

    Arguments
    ---------
    modules : parameters with ``requires_grad`` False belong to no group and never move.
    opt_class : an optimizer class or a partial of one (``!name:torch.optim.AdamW`` with ``lr``, ``betas``, ...).
    groups : first fit counts; parameters that fit none form the last group with the optimizer's own settings.
    fused : False for a device without the fused kernels, whose weights would all go to the host and back.

    Returns
    -------
    The optimizer; each of its ``param_groups`` also has ``name``, ``base_lr`` (peak rate with the group's factor) and
    ``freeze_updates``.

    Raises
    ------
    ConfigError : nothing to train, a group that fits no parameter, or settings that the optimizer refuses.

    Example
    -------
    >>> make = functools.partial(torch.optim.AdamW, lr=0.1)
    >>> optimizer = build_optimizer(nn.Linear(2, 3), make, [ParameterGroup(match="bias", lr_factor=0.5)])
    >>> [(group["name"], group["base_lr"]) for group in optimizer.param_groups]
    [('bias', 0.05), ('rest', 0.1)]
    """
    members: list[list[nn.Parameter]] = [[] for _ in range(len(groups) + 1)]
    names: list[str] = []
    for name, parameter in modules.named_parameters():
        if parameter.requires_grad:
            names.append(name)
            members[next((i for i, group in enumerate(groups) if group.fits(name, parameter)), -1)].append(parameter)
    if not names:
        raise ConfigError("the modules have no trainable parameter; check what is frozen.")
    for group, found in zip(groups, members, strict=False):
        if not found:
            raise ConfigError(
                f"the parameter group {group.name!r} fits no trainable parameter that an earlier group left; names "
                f"begin like {', '.join(sorted({'.'.join(name.split('.')[:3]) for name in names})[:8])}."
            )
    described: list[dict[str, Any]] = []
    for group, found in zip(groups, members, strict=False):
        entry: dict[str, Any] = {"params": found, "name": group.name, "lr_factor": group.lr_factor}
        entry["freeze_updates"] = group.freeze_updates
        if group.weight_decay is not None:
            entry["weight_decay"] = group.weight_decay
        described.append(entry)
    if members[-1]:
        described.append({"params": members[-1], "name": "rest", "lr_factor": 1.0, "freeze_updates": 0})
    try:
        optimizer = (_fused_where_possible(opt_class) if fused else opt_class)(described)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        name = getattr(getattr(opt_class, "func", opt_class), "__name__", str(opt_class))
        raise ConfigError(f"opt_class: {name} cannot be made with these settings ({error}); correct them.") from error
    for entry in optimizer.param_groups:
        entry["base_lr"] = float(entry["lr"]) * entry["lr_factor"]
    return optimizer


def _fused_where_possible(opt_class: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """``opt_class`` with torch's fused kernel, unless it has none or the user chose an implementation."""
    chosen = opt_class.keywords if isinstance(opt_class, functools.partial) else {}
    if {"fused", "foreach", "capturable", "differentiable"} & set(chosen):
        return opt_class
    bare = opt_class.func if isinstance(opt_class, functools.partial) else opt_class
    fused = "fused" in inspect.signature(bare).parameters
    return functools.partial(opt_class, fused=True) if fused else opt_class


def takes_divisor(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``step`` divides by ``grad_scale`` and skips at ``found_inf`` inside its own pass (the fused ones do)."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's rate to ``base_lr * factor``; returns the highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)


def set_frozen(optimizer: torch.optim.Optimizer, update: int) -> list[str]:
    """Freeze and thaw groups as their ``freeze_updates`` ask at ``update``; returns the names of the frozen ones.

    A frozen parameter needs no gradient, so the backward pass does not work for it and the step passes it over.
    """
    frozen = []
    for group in optimizer.param_groups:
        trains = update >= group["freeze_updates"]
        if not trains:
            frozen.append(group["name"])
        for parameter in group["params"]:
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
                parameter.grad = None
    return frozen


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups that are not frozen now, in a fixed order."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


class LossScale:
    """The scale of fp16 losses: halved when a gradient overflows, doubled after ``window`` good updates.

    All of it stays on the device, so that no update waits for it.

    Arguments
    ---------
    device : where the losses are.
    initial, minimum, maximum : first, lowest and highest scale. Losses are summed over frames and tokens, not averaged:
        the first is low, as fairseq's (``fp16_init_scale``, 128).
    window : good updates in a row before it doubles.

    Example
    -------
    >>> scale = LossScale(torch.device("cpu"), initial=8.0, window=1)
    >>> scale.advance(torch.tensor(1.0))
    >>> float(scale.value)
    4.0
    """

    def __init__(
        self,
        device: torch.device,
        *,
        initial: float = 128.0,
        minimum: float = 2.0**-14,
        maximum: float = 2.0**24,
        window: int = 2000,
    ) -> None:
        self.value = torch.full((), initial, device=device)
        self.good = torch.zeros((), device=device)
        self.minimum, self.maximum, self.window = minimum, maximum, window

    def advance(self, overflow: Tensor) -> None:
        """After an update; ``overflow`` () is 1 where its gradient was not finite, else 0."""
        bad = overflow > 0
        good = torch.where(bad, torch.zeros_like(self.good), self.good + 1)
        grows = good >= self.window
        value = torch.where(bad, self.value * 0.5, torch.where(grows, self.value * 2.0, self.value))
        self.value = value.clamp(self.minimum, self.maximum)
        self.good = torch.where(grows, torch.zeros_like(good), good)

    def exhausted(self) -> Tensor:
        """(): 1 where the scale is at its lowest, so that an overflow is no longer the scale's fault."""
        return (self.value <= self.minimum).to(self.value.dtype)

    def state_dict(self) -> dict[str, float]:
        """Plain values, for a checkpoint (waits for the device)."""
        return {"value": float(self.value), "good": float(self.good)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from ``state``."""
        self.value.fill_(state["value"])
        self.good.fill_(state["good"])
