"""data2vec's targets: from a teacher's layers to what is to be predicted, the loss, and whether all became the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import ModelError
from toolkit.models.encoder import widened
from toolkit.nn.sizes import check_sizes

EPSILON = 1e-5
"""Inside the norms of the targets."""

VARIANCE_EPSILON = 1e-6
"""Inside the square root of the reported deviations, as in fairseq."""

NORMS = ("instance", "layer")


@dataclass(frozen=True)
class Data2VecOutput:
    """What the task says about a batch; S masked positions, D channels.

    On devices other than the CPU there are more rows than masked positions, always equally many for one shape of
    batch; ``weights`` says which count, and what nobody on the host has counted is a tensor.

    loss_sum : scalar with a gradient: the regression loss summed over positions and channels, times the scale; to be
        divided by the sum of num_masked over all micro-batches and ranks.
    num_masked : S, or a tensor () with it.
    target_deviation, prediction_deviation : scalars, mean over the channels of the standard deviation over the S
        positions; near 0 when all targets (or predictions) have become the same.
    predictions, targets : (S, D) float32.
    decay : of the teacher's last move.
    num_positions : real positions in the batch, or a tensor () with their number.
    weights : (S,) float32, 1 for a masked position and 0 for a row that fills up; None: all count.
    """

    loss_sum: Tensor
    num_masked: int | Tensor
    target_deviation: Tensor
    prediction_deviation: Tensor
    predictions: Tensor
    targets: Tensor
    decay: float
    num_positions: int | Tensor
    weights: Tensor | None = None

    def metrics(self) -> dict[str, tuple[Tensor | float, Tensor | int]]:
        """What to log, as (sum, count): by fairseq's names, where target_var and pred_var are the deviations."""
        if isinstance(self.num_masked, Tensor):
            masked, batches = self.num_masked, (self.num_masked > 1).float()
        else:
            masked, batches = float(self.num_masked), int(self.num_masked > 1)
        return {
            "target_var": (self.target_deviation * batches, batches),
            "pred_var": (self.prediction_deviation * batches, batches),
            "ema_decay": (self.decay, 1),
            "masked_share": (masked, self.num_positions),
        }


@dataclass(frozen=True)
class TargetRule:
    """How the teacher's layers become targets, and how far predictions are from them.

    top_layers : how many of the last layers are averaged.
    layer_norms : norms of each layer's output before the average, one after the other: "instance" (over the
        positions of an utterance, per channel), "layer" (over the channels).
    target_norms : norms of the average.
    loss_beta : smooth L1 with this beta; 0 is the squared error.
    loss_scale : factor of the loss; None is 1 / sqrt(D).
    """

    top_layers: int
    layer_norms: tuple[str, ...]
    target_norms: tuple[str, ...]
    loss_beta: float
    loss_scale: float | None

    @classmethod
    def checked(
        cls,
        num_layers: int,
        *,
        top_layers: int,
        layer_norms: Sequence[str],
        target_norms: Sequence[str],
        loss_beta: float,
        loss_scale: float | None,
    ) -> TargetRule:
        """The rule; raises ModelError for settings that make no sense."""
        check_sizes(top_layers=top_layers)
        if top_layers > num_layers:
            raise ModelError(f"top_layers is {top_layers}, but the encoder has {num_layers} layers; take fewer.")
        for name, norms in (("layer_norms", layer_norms), ("target_norms", target_norms)):
            if isinstance(norms, str) or any(norm not in NORMS for norm in norms):
                raise ModelError(f"{name} is {norms!r}, expected a list of some of {', '.join(NORMS)}.")
        if not 0 <= loss_beta < math.inf:
            raise ModelError(f"loss_beta is {loss_beta}, expected 0 (squared error) or a positive number.")
        if loss_scale is not None and not 0 < loss_scale < math.inf:
            raise ModelError(f"loss_scale is {loss_scale}, expected null (1 / sqrt of the width) or a positive number.")
        return cls(top_layers, tuple(layer_norms), tuple(target_norms), float(loss_beta), loss_scale)

    def targets(self, layers: Sequence[Tensor], padding: Tensor | None) -> Tensor:
        """The average of the last layers, (batch, positions, D) float32.

        Arguments
        ---------
        layers : feed-forward outputs of the teacher's layers, (batch, positions, D) each.
        padding : (batch, positions) bool, True where an instance norm is not to look; None: it looks everywhere.
        """
        total: Tensor | None = None
        for layer in layers[-self.top_layers :]:
            normed = _normed(widened(layer), self.layer_norms, padding)
            total = normed if total is None else total + normed
        assert total is not None
        return _normed(total / self.top_layers, self.target_norms, padding)

    def loss(self, predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The scaled sum over positions and channels, times the positions' ``weights`` (S,)."""
        reduction = "sum" if weights is None else "none"
        if self.loss_beta:
            total = F.smooth_l1_loss(predictions, targets, beta=self.loss_beta, reduction=reduction)
        else:
            total = F.mse_loss(predictions, targets, reduction=reduction)
        if weights is not None:
            total = (total * weights[:, None]).sum()
        return total * (predictions.shape[1] ** -0.5 if self.loss_scale is None else self.loss_scale)

    def output(
        self,
        predictions: Tensor,
        targets: Tensor,
        *,
        decay: float,
        num_positions: int | Tensor,
        weights: Tensor | None = None,
        num_masked: int | None = None,
    ) -> Data2VecOutput:
        """Loss and statistics of the S masked positions; where S is 0 the loss is 0, and so are its gradients.

        Arguments
        ---------
        predictions, targets : (S, D) float32.
        decay, num_positions, weights : as in :class:`Data2VecOutput`.
        num_masked : how many of the rows count, where the host knows it; None: all, or the sum of the weights.
        """
        if num_masked is None:
            num_masked = len(predictions) if weights is None else weights.sum()
        return Data2VecOutput(
            loss_sum=self.loss(predictions, targets, weights),
            num_masked=num_masked,
            target_deviation=deviation(targets, weights),
            prediction_deviation=deviation(predictions.detach(), weights),
            predictions=predictions,
            targets=targets,
            decay=decay,
            num_positions=num_positions,
            weights=weights,
        )


def deviation(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the channels of the standard deviation over the rows that count: (S, D) -> (); 0 of fewer than two.

    Arguments
    ---------
    rows : (S, D) float32.
    weights : (S,) 1 for a row that counts, 0 for one that does not; None: all count.
    """
    if weights is None:
        return (rows.var(0) + VARIANCE_EPSILON).sqrt().mean() if len(rows) > 1 else rows.new_zeros(())
    count, weights = weights.sum(), weights[:, None]
    centered = (rows - (rows * weights).sum(0) / count.clamp(min=1)) * weights
    variance = centered.square().sum(0) / (count - 1).clamp(min=1)
    return (variance + VARIANCE_EPSILON).sqrt().mean() * (count > 1)


def _normed(x: Tensor, norms: Sequence[str], padding: Tensor | None) -> Tensor:
    for norm in norms:
        x = F.layer_norm(x, x.shape[-1:], eps=EPSILON) if norm == "layer" else instance_norm(x, padding)
    return x


def instance_norm(x: Tensor, padding: Tensor | None) -> Tensor:
    """Each channel of each utterance to zero mean and unit variance over its positions: (batch, positions, D).

    Arguments
    ---------
    x : float32.
    padding : (batch, positions) bool, True where a position does not count (and gives nothing of meaning).
    """
    if padding is None:
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + EPSILON)
    real = (~padding)[..., None].to(x.dtype)
    count = real.sum(1, keepdim=True).clamp(min=1)
    mean = (x * real).sum(1, keepdim=True) / count
    centered = x - mean
    variance = (centered * real).square().sum(1, keepdim=True) / count
    return centered * torch.rsqrt(variance + EPSILON)
