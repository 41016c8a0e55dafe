"""One optimizer update: from the gradients of micro-batches and ranks to new weights, without a wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.training.distributed import World
from toolkit.training.optim import LossScale, takes_divisor, trained_parameters
from toolkit.training.parallel import Parallel, Replicas

NORM_EPSILON = 1e-6
"""Added to the norm before it divides the clipping threshold, as in fairseq and in torch's own clipping."""


@dataclass(frozen=True)
class StepResult:
    """What one update gave; tensors () that stay on the device until somebody asks.

    Arguments
    ---------
    update : index of the update, from 0.
    loss_sum, count : sum of the losses and number of targets over all micro-batches and ranks.
    grad_norm : norm of the mean gradient over all groups, before clipping.
    skipped : 1 where the weights were left as they were, else 0.
    faulty : 1 where a loss or a gradient was not finite and no scale of fp16 was to blame, else 0.
    """

    update: int
    loss_sum: Tensor
    count: Tensor
    grad_norm: Tensor
    skipped: Tensor
    faulty: Tensor


class UpdateGivenUp(Exception):
    """Another rank has given this update up before it began to change anything; ``failures`` are the reasons told."""

    def __init__(self, failures: list[Any]) -> None:
        super().__init__(failures)
        self.failures = failures


class UpdateStep:
    """Adds gradients up and turns them into an update.

    The gradient of an update is the sum over micro-batches and ranks divided by the global number of targets. Division
    and clipping ride in the fused optimizer's own pass (``grad_scale``), and so does leaving everything as it was
    after a non-finite gradient (``found_inf``), so nothing here asks the device for a number.

    Arguments
    ---------
    optimizer : fused ones take the fast path, others wait once per update.
    world : the ranks.
    max_grad_norm : clip the norm over all groups to this; None = off.
    loss_scale : for fp16 gradients that would underflow, else None.
    parallel : how the ranks share the model; None = each holds all of it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        max_grad_norm: float | None = None,
        loss_scale: LossScale | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self.optimizer, self.world = optimizer, world
        self.parallel: Parallel = parallel or Replicas(world)
        self.max_grad_norm, self.loss_scale = max_grad_norm, loss_scale

    def backward(self, loss_sum: Tensor) -> None:
        """Add the gradient of one micro-batch's loss sum ()."""
        if self.loss_scale is not None:
            loss_sum = loss_sum.float() * self.loss_scale.value
        loss_sum.backward()

    def finish(self, update: int, loss_sum: Tensor, count: Tensor, values: Sequence[float] = ()) -> Finished:
        """End the update: reduce over ranks, guard, clip, step, forget the gradients.

        Arguments
        ---------
        update : its index.
        loss_sum, count : (), float32 on the device, of this rank's micro-batches.
        values : numbers of this rank that are wanted as sums over ranks with no extra exchange (wishes to stop, ...).

        Returns
        -------
        Finished(result, values): the outcome, and the sums of ``values``.

        Raises
        ------
        UpdateGivenUp : on all ranks, where one called `give_up` instead; nothing has changed then.
        """
        parameters, values = self._agree(trained_parameters(self.optimizer), list(values))
        self.parallel.reduce(parameters)
        if self.world.size > 1:
            totals = torch.stack([loss_sum, count])
            self.world.all_reduce_sum(totals)
            loss_sum, count = totals.unbind()
        result = self._step(update, parameters, loss_sum, count)
        self.optimizer.zero_grad(set_to_none=True)
        self.parallel.forget()
        return Finished(result, values)

    def give_up(self, failure: Any) -> list[Any]:
        """Instead of `finish`: tell the other ranks of ``failure`` (plain); returns the failures of all ranks."""
        return [told for flags, told in self.world.gather_objects((None, failure)) if flags is None]

    def _agree(self, parameters: list[nn.Parameter], values: list[float]) -> tuple[list[nn.Parameter], list[float]]:
        """The parameters that have a gradient on any rank (zeros stand in elsewhere), and the sums of ``values``.

        A layer that was left out in every micro-batch of all ranks must not be touched, with one rank or with many:
        so the ranks tell each other in one small exchange between the hosts; the device is not asked.
        """
        mine = bytes(self.parallel.has_gradient(parameter) for parameter in parameters)
        if self.world.size == 1:
            return [parameter for parameter, has in zip(parameters, mine, strict=True) if has], values
        # One byte a parameter; gathered by the hosts, in rank order.
        everyone = self.world.gather_objects((mine, values))
        failures = [told for flags, told in everyone if flags is None]
        if failures:
            raise UpdateGivenUp(failures)
        chosen = []
        for parameter, *flags in zip(parameters, *(flags for flags, _ in everyone), strict=True):
            if any(flags):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                chosen.append(parameter)
        return chosen, [sum(column) for column in zip(*(numbers for _, numbers in everyone), strict=True)]

    def _step(self, update: int, parameters: list[nn.Parameter], loss_sum: Tensor, count: Tensor) -> StepResult:
        targets = torch.where(count > 0, count, torch.ones_like(count))
        unit = targets if self.loss_scale is None else targets * self.loss_scale.value
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(gradients)).float().to(unit.device) / unit
        loss_is_finite = torch.isfinite(loss_sum)
        skipped = (~(loss_is_finite & torch.isfinite(norm))).float()
        divisor = unit
        if self.max_grad_norm is not None:
            divisor = unit * ((norm + NORM_EPSILON) / self.max_grad_norm).clamp(min=1.0)
        if takes_divisor(self.optimizer):
            self.optimizer.grad_scale, self.optimizer.found_inf = divisor, skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skipped.item():  # allowed wait: an optimizer without a fused pass has to be told on the host
            for gradient in gradients:
                gradient.div_(divisor)
            self.optimizer.step()
        faulty = skipped
        if self.loss_scale is not None:
            # An overflow is how the scale finds its height; a loss that is not finite is nobody's scale.
            faulty = torch.where(loss_is_finite, skipped * self.loss_scale.exhausted(), torch.ones_like(skipped))
            self.loss_scale.advance(skipped)
        return StepResult(update, loss_sum, count, norm, skipped, faulty)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that is the same on all ranks, of one that may be theirs together (of sharded gradients)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@dataclass(frozen=True)
class Finished:
    """A finished update: its outcome, and the sums over ranks of the values that rode along."""

    result: StepResult
    values: list[float]
