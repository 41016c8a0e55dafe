"""Which operators a device has: each that matters is tried on tiny tensors before a run, and held against the CPU's.

Torch passes an operator that a device lacks on to the host, with a warning at most: every call then copies all of its
tensors there and back. Where a run has another way it takes that on purpose (`Candidate.instead`); what is left is said
in the log.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.training.devices import Device, first_line

CTC_LOSS = "ctc_loss"
FUSED_OPTIMIZER = "fused_optimizer"

TOLERANCE = 2e-2
"""Largest accepted difference from the CPU, relative to the largest value: a device may round products to TF32 or
less, a wrong operator is off by more."""

OWN_KERNELS = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
"""Operators that torch itself takes apart into others: these are then asked about one by one."""


@dataclass(frozen=True)
class Candidate:
    """An operator, or a few that belong together.

    Arguments
    ---------
    name : in the log and in `Device.on_host`.
    run : computes it, forward and backward, on the device of the generator's tensors; returns what can be compared.
    instead : what a run does where the device has it not (half a sentence); empty where it has no other way.
    """

    name: str
    run: Callable[[Callable[..., Tensor]], list[Tensor]]
    instead: str = ""


@dataclass(frozen=True)
class Tried:
    """What trying gave: name to the reason (half a sentence) for each candidate that the device does not have."""

    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def host_operations(self) -> tuple[str, ...]:
        """The names of the candidates that are left to the host, or done in another way."""
        return tuple(self.reasons)


def try_device(device: Device) -> tuple[Device, list[str]]:
    """``device`` with what it leaves to the host, and the sentences for the log.

    Rows of the table that need no trial (the CPU; CUDA, for which torch has every operator) come back as they are.
    """
    if not device.kind.probed:
        return device, []
    tried = try_operators(device.torch_device)
    if not tried.reasons:
        return replace(device, host_operations=()), [f"Operators: {device.name} has all {len(CANDIDATES)} tried."]
    sentences = []
    for candidate in CANDIDATES:
        if candidate.name in tried.reasons:
            then = candidate.instead or "it stays where torch puts it, and slows every step down"
            sentences.append(f"Operators: {candidate.name} {tried.reasons[candidate.name]}; {then}.")
    return replace(device, host_operations=tried.host_operations), sentences


def try_operators(device: torch.device) -> Tried:
    """Run each of CANDIDATES on ``device`` and on the CPU."""
    reasons = {}
    for candidate in CANDIDATES:
        reason = _reason_against(candidate, device)
        if reason:
            reasons[candidate.name] = reason
    return Tried(reasons)


def _reason_against(candidate: Candidate, device: torch.device) -> str:
    """Why the device cannot be said to have it; empty where it has."""
    expected = candidate.run(_inputs(torch.device("cpu")))
    with warnings.catch_warnings(), _Recorder() as recorder:
        warnings.simplefilter("ignore")  # the fall-back's own words: ours say more
        try:
            found = [tensor.cpu() for tensor in candidate.run(_inputs(device))]
        except (RuntimeError, TypeError, ValueError) as error:  # NotImplementedError is a RuntimeError
            return f"is refused by {device.type} ({first_line(error)})"
    lacking = sorted(name for name in recorder.operators if not has_kernel(name, device.type))
    if lacking:
        return f"falls back to the CPU ({', '.join(lacking)} {'have' if len(lacking) > 1 else 'has'} no kernel)"
    for theirs, ours in zip(found, expected, strict=True):
        error = float((theirs.double() - ours.double()).abs().max() / ours.double().abs().max().clamp(min=1e-6))
        if not error < TOLERANCE:
            return f"is wrong on {device.type} (off by {error:.0e} of the CPU's result)"
    return ""


def has_kernel(operator: str, device_type: str) -> bool:
    """Whether torch knows a kernel of ``operator`` (``aten::_ctc_loss``) for a device, or takes it apart itself.

    A kernel from a source file of fall-backs is none: xpu names there what it passes on to the host. True where this
    torch cannot be asked.

    Example
    -------
    >>> has_kernel("aten::_ctc_loss", "cpu"), has_kernel("aten::_ctc_loss", "hpu")
    (True, False)
    """
    ask = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
    key_of = getattr(torch._C, "_dispatch_key_for_device", None)
    if ask is None or key_of is None:
        return True
    own = key_of(device_type)
    if ask(operator, own):
        return "fallback" not in registered_at(operator, own).lower()
    return any(ask(operator, key) for key in OWN_KERNELS)


def registered_at(operator: str, key: str) -> str:
    """The source file and line of a kernel, as torch noted it; empty where that cannot be asked."""
    dump = getattr(torch._C, "_dispatch_dump", lambda operator: "")(operator)
    lines = (line.partition(" :: ")[0] for line in dump.splitlines())
    return next((line.partition(" registered at ")[2] for line in lines if line.startswith(f"{key}: ")), "")


class _Recorder(TorchDispatchMode):
    """Notes the operators that reach a device, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.operators.add(func.name())
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------ what is tried


def _inputs(device: torch.device) -> Callable[..., Tensor]:
    """Makes the same numbers on any device: ``inputs(2, 3)`` takes gradients, ``inputs(2, 3, below=5)`` are int64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, below: int | None = None) -> Tensor:
        if below is not None:
            return torch.randint(below, shape, generator=generator).to(device)
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    return draw


def _with_gradients(output: Tensor, *leaves: Tensor) -> list[Tensor]:
    output.square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _ctc_loss(draw: Callable[..., Tensor]) -> list[Tensor]:
    scores, tokens = draw(6, 2, 4), draw(2, 2, below=3) + 1
    frames, lengths = torch.tensor([6, 5]), torch.tensor([2, 1])  # on the host, as everywhere
    loss = F.ctc_loss(scores.log_softmax(-1), tokens, frames, lengths, reduction="sum", zero_infinity=True)
    return _with_gradients(loss, scores)


def _fused_optimizer(draw: Callable[..., Tensor]) -> list[Tensor]:
    """One update with a divisor, then one that must change nothing, as `toolkit.training.step` makes them."""
    weight = nn.Parameter(draw(3, 4).detach())
    weight.grad = draw(3, 4).detach()
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1, fused=True)
    for found_inf in (0.0, 1.0):
        optimizer.grad_scale = torch.full((), 8.0, device=weight.device)
        optimizer.found_inf = torch.full((), found_inf, device=weight.device)
        optimizer.step()
    return [weight.detach(), optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]]


def _weight_norm(draw: Callable[..., Tensor]) -> list[Tensor]:
    v, g = draw(4, 2, 3), draw(1, 1, 3)
    return _with_gradients(v * (g / v.square().sum((0, 1), keepdim=True).sqrt()), v, g)


def _convolutions(draw: Callable[..., Tensor]) -> list[Tensor]:
    waveforms, kernel, grouped = draw(2, 1, 30), draw(4, 1, 5), draw(4, 2, 4)
    features = F.gelu(F.group_norm(F.conv1d(waveforms, kernel, stride=2), 4))
    return _with_gradients(F.conv1d(features, grouped, padding=2, groups=2), waveforms, kernel, grouped)


def _attention(draw: Callable[..., Tensor]) -> list[Tensor]:
    q, k, v = draw(2, 2, 5, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 4)
    allowed = draw(2, 1, 1, 5, below=3) > 0
    allowed[..., 0] = True
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).reshape(2, 5, 8)
    return _with_gradients(F.layer_norm(heads, (8,)), q, k, v)


def _indexing(draw: Callable[..., Tensor]) -> list[Tensor]:
    rows, index = draw(6, 3), draw(5, below=6)
    mask = index > 2
    chosen = rows[index].masked_fill(mask[:, None], 0.0)
    found = [index.cumsum(0), torch.where(mask, index, -index), mask.logical_not() & (index >= 1), chosen.argmax(-1)]
    return [*_with_gradients(torch.cat([chosen, rows.index_select(0, index)]), rows), *found]


CANDIDATES: tuple[Candidate, ...] = (
    Candidate(CTC_LOSS, _ctc_loss, "it is computed on the host in float32, and its gradient comes back"),
    Candidate(FUSED_OPTIMIZER, _fused_optimizer, "the optimizer runs unfused, with one wait for the device per update"),
    Candidate("weight_norm", _weight_norm),
    Candidate("convolutions", _convolutions),
    Candidate("attention", _attention),
    Candidate("indexing", _indexing),
)
