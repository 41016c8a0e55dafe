"""data2vec 1.0 (Baevski et al. 2022): predict a teacher's contextual features of what was hidden from the student.

The teacher is the student's moving average and sees everything; the target at a masked position is the average of its
last layers' feed-forward outputs, each normalized. Order and arithmetic are fairseq's, defaults BASE's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import ModelError
from toolkit.models.encoder import Encoded, Wav2Vec2Encoder, widened
from toolkit.models.text_encoder import TextEncoder
from toolkit.nn.ema import DecayRamp, Teacher
from toolkit.nn.fast.common import padding_mask
from toolkit.nn.precision import explicit_precision
from toolkit.nn.sizes import check_sizes
from toolkit.nn.transfer import to_device
from toolkit.nn.transformer import INITIAL_STD
from toolkit.seeds import Randomness

EPSILON = 1e-5
"""Inside the norms of the targets."""

VARIANCE_EPSILON = 1e-6
"""Inside the square root of the reported deviations, as in fairseq."""

NORMS = ("instance", "layer")
EMA_TIMINGS = ("step", "fairseq")
TEACHER_INPUTS = ("paper", "fairseq")


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


class _Student(nn.Module):
    """What the tasks of speech and text share: the teacher and when it moves."""

    def __init__(
        self, student: nn.Module, *, ema_decay: Sequence[float], ema_timing: str, copied: Sequence[str]
    ) -> None:
        super().__init__()
        if ema_timing not in EMA_TIMINGS:
            raise ModelError(f"ema_timing is {ema_timing!r}, expected one of {', '.join(EMA_TIMINGS)}.")
        self.ema_timing = ema_timing
        self.teacher = Teacher(student, DecayRamp.checked(ema_decay), copied=copied)

    def _student(self) -> nn.Module:
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The encoder's and the teacher's.

        Student and teacher as a whole are among them, so that both are in shards (of the same kind) whenever the
        teacher moves, at the beginning of a forward too.
        """
        inner = self.encoder.blocks()
        outer = [] if self._student() in inner else [self._student()]
        return [*inner, *outer, *self.teacher.module.layers, self.teacher]

    def finish_update(self, update: int) -> None:
        """Move the teacher after ``update`` finished updates; a recipe calls it in ``on_update_end``.

        With ``ema_timing`` "fairseq" nothing happens here: there the teacher moves at the beginning of each
        micro-batch's forward, so that accumulation of k micro-batches moves it k times an update.
        """
        if self.ema_timing == "step":
            self.teacher.move(self._student(), update=update)
        self.teacher.forget()

    def give_up_update(self) -> None:
        """The teacher as it was before the moves of an update that is left unfinished, and will be made again; a
        recipe calls it in ``on_update_given_up``."""
        self.teacher.go_back()

    def _begin_forward(self, update: int) -> float:
        """Move as fairseq does, if asked to; the decay that the teacher was moved by last."""
        if self.training and self.ema_timing == "fairseq" and update > 0:
            self.teacher.remember(update)
            self.teacher.move(self._student(), update=update)
        return self.teacher.decay.at(update)


class Data2VecAudio(_Student):
    """data2vec for speech, on the encoder that wav2vec 2.0 uses too.

    Arguments
    ---------
    encoder : the encoder to pretrain (BASE: extractor_norm "layer", pos_depth 5, pos_kernel 95).
    top_layers, layer_norms, target_norms, loss_beta, loss_scale : see :class:`TargetRule`. With the encoder's
        ``norm_over_padding`` instance norms look at padding too, as fairseq's do.
    ema_decay : (start, end, updates of the ramp) of the teacher.
    ema_layers_only : the positional convolution is copied from the student, not averaged.
    ema_timing : "step" moves the teacher once an update, "fairseq" once a micro-batch.

    Raises
    ------
    ModelError : settings that make no sense.

    Example
    -------
    >>> encoder = Wav2Vec2Encoder(conv_layers=[(8, 10, 5), (8, 8, 4)], dim=16, num_layers=2, ffn_dim=32,
    ...     num_heads=2, pos_kernel=6, pos_groups=2, pos_depth=2)
    >>> model = Data2VecAudio(encoder, top_layers=2)
    >>> out = model(torch.randn(2, 1600), rng=Randomness(1), update=0)
    >>> out.predictions.shape == (out.num_masked, 16), bool(out.loss_sum.isfinite())
    (True, True)
    """

    def __init__(
        self,
        encoder: Wav2Vec2Encoder,
        *,
        top_layers: int = 8,
        layer_norms: Sequence[str] = ("instance",),
        target_norms: Sequence[str] = (),
        loss_beta: float = 0.0,
        loss_scale: float | None = None,
        ema_decay: Sequence[float] = (0.999, 0.9999, 30000),
        ema_layers_only: bool = True,
        ema_timing: str = "step",
    ) -> None:
        super().__init__(
            encoder.transformer,
            ema_decay=ema_decay,
            ema_timing=ema_timing,
            copied=["positional.*"] if ema_layers_only else [],
        )
        self.rule = TargetRule.checked(
            len(encoder.transformer.layers),
            top_layers=top_layers,
            layer_norms=layer_norms,
            target_norms=target_norms,
            loss_beta=loss_beta,
            loss_scale=loss_scale,
        )
        self.config = {
            "encoder": encoder.config,
            "top_layers": top_layers,
            "layer_norms": list(layer_norms),
            "target_norms": list(target_norms),
            "loss_beta": loss_beta,
            "loss_scale": loss_scale,
            "ema_decay": list(ema_decay),
            "ema_layers_only": ema_layers_only,
            "ema_timing": ema_timing,
        }
        self.encoder = encoder
        self.prediction = nn.Linear(encoder.dim, encoder.dim)

    def _student(self) -> nn.Module:
        return self.encoder.transformer

    def forward(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        *,
        rng: Randomness | None = None,
        update: int = 0,
        time_mask: np.ndarray | Tensor | None = None,
    ) -> Data2VecOutput:
        """Mask a batch and score the predictions.

        Arguments
        ---------
        waveforms, lengths : see :meth:`Wav2Vec2Encoder.forward`.
        rng : this micro-batch's randomness; draws the mask unless it is given, and in training mode drops out.
        update : finished updates, for the teacher's decay.
        time_mask : (batch, frames) bool.

        Raises
        ------
        ModelError : neither ``rng`` nor the mask is given.
        """
        if rng is None and time_mask is None:
            raise ModelError("data2vec needs masks in evaluation too: give rng or time_mask.")
        decay = self._begin_forward(update)
        if time_mask is None:
            time_mask = self.encoder.draw_mask_for(waveforms, lengths, rng)
        encoded = self.encoder(waveforms, lengths, rng=rng, time_mask=time_mask, masked_only=True)
        with explicit_precision(waveforms.device.type):
            predictions = self.prediction(widened(encoded.features))
            targets = self._targets(encoded, encoded.features.dtype)
        return self.rule.output(
            predictions,
            targets,
            decay=decay,
            num_positions=int(encoded.frame_lengths.sum()),
            weights=encoded.masked.weights,
            num_masked=encoded.masked.total,
        )

    @torch.no_grad()
    def _targets(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        """The teacher's features of the unmasked input at the masked frames, (S, D)."""
        frames = encoded.extractor_features.shape[1]
        padded = encoded.padded
        padding_too = padded and self.encoder.norm_over_padding
        _, layers = self.teacher(
            self.encoder.project(encoded.extractor_features, dtype),
            encoded.frame_lengths if padded else None,
            dtype=dtype,
            layers=True,
            padding_too=padding_too,
        )
        padding = None
        if padded and not padding_too:
            padding = padding_mask(to_device(encoded.frame_lengths, encoded.features.device), frames)
        # (batch, frames, D) -> (S, D)
        return self.rule.targets([ffn for _, ffn in layers], padding).flatten(0, 1)[encoded.masked.positions]


class Data2VecText(_Student):
    """data2vec for text.

    Arguments
    ---------
    encoder : the encoder to pretrain; its vocabulary holds the mask symbol.
    mask_id : the token that stands for hidden ones.
    head_layers : linear layers that predict from the student's features: 2 (D -> 2 D -> D with a GELU) or 1.
    top_layers, layer_norms, target_norms, loss_beta, loss_scale : see :class:`TargetRule`.
    ema_decay : (start, end, updates of the ramp) of the teacher.
    ema_layers_only : embeddings and their norm are copied from the student, not averaged.
    ema_timing : "step" moves the teacher once an update, "fairseq" once a micro-batch.
    teacher_input : "paper" shows the teacher the whole text; "fairseq" only the tokens that the student does not see,
        without their sentence and with positions counted among themselves, as fairseq's released code does (its issue
        4881).

    Raises
    ------
    ModelError : settings that make no sense.

    Example
    -------
    >>> encoder = TextEncoder(vocab_size=20, dim=16, num_layers=2, ffn_dim=32, num_heads=2, max_positions=8)
    >>> model = Data2VecText(encoder, mask_id=19, top_layers=2)
    >>> tokens = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])
    >>> out = model(tokens.clone().index_fill_(1, torch.tensor([1]), 19), tokens)
    >>> out.num_masked, out.num_positions
    (2, 7)
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        mask_id: int,
        head_layers: int = 2,
        top_layers: int = 10,
        layer_norms: Sequence[str] = ("layer",),
        target_norms: Sequence[str] = (),
        loss_beta: float = 4.0,
        loss_scale: float | None = 1.0,
        ema_decay: Sequence[float] = (0.999, 0.9999, 300000),
        ema_layers_only: bool = True,
        ema_timing: str = "step",
        teacher_input: str = "paper",
    ) -> None:
        embeddings = ["token_embedding.*", "position_embedding.*", "embedding_norm.*"]
        if encoder.token_type_embedding is not None:
            embeddings.append("token_type_embedding.*")
        copied = embeddings if ema_layers_only else []
        super().__init__(encoder, ema_decay=ema_decay, ema_timing=ema_timing, copied=copied)
        self.rule = TargetRule.checked(
            len(encoder.layers),
            top_layers=top_layers,
            layer_norms=layer_norms,
            target_norms=target_norms,
            loss_beta=loss_beta,
            loss_scale=loss_scale,
        )
        if teacher_input not in TEACHER_INPUTS:
            raise ModelError(f"teacher_input is {teacher_input!r}, expected one of {', '.join(TEACHER_INPUTS)}.")
        if not 0 <= mask_id < encoder.vocab_size or mask_id == encoder.padding_id:
            raise ModelError(
                f"mask_id is {mask_id}, expected one of the {encoder.vocab_size} token ids, and not the padding's."
            )
        if head_layers not in (1, 2):
            raise ModelError(f"head_layers is {head_layers}, expected 1 or 2.")
        self.config = {
            "encoder": encoder.config,
            "mask_id": mask_id,
            "head_layers": head_layers,
            "top_layers": top_layers,
            "layer_norms": list(layer_norms),
            "target_norms": list(target_norms),
            "loss_beta": loss_beta,
            "loss_scale": loss_scale,
            "ema_decay": list(ema_decay),
            "ema_layers_only": ema_layers_only,
            "ema_timing": ema_timing,
            "teacher_input": teacher_input,
        }
        self.encoder, self.mask_id, self.teacher_input = encoder, mask_id, teacher_input
        widths = [encoder.dim, *[2 * encoder.dim] * (head_layers - 1), encoder.dim]
        self.prediction = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for layer in self.prediction:
            nn.init.normal_(layer.weight, std=INITIAL_STD)
            nn.init.zeros_(layer.bias)

    def _student(self) -> nn.Module:
        return self.encoder

    def forward(
        self,
        source: Tensor,
        tokens: Tensor,
        *,
        chosen: Tensor | None = None,
        rng: Randomness | None = None,
        update: int = 0,
    ) -> Data2VecOutput:
        """Score the predictions at the masked tokens.

        Arguments
        ---------
        source : (batch, length) int64, what the student sees: ``mask_id`` where a token is hidden.
        tokens : (batch, length) int64, the text itself.
        chosen : (batch, length) bool, the tokens that were hidden, replaced or kept on purpose, for ``teacher_input``
            "fairseq"; None: those hidden. Only hidden ones are predicted.
        rng : this micro-batch's randomness; in training mode it drops out.
        update : finished updates, for the teacher's decay.
        """
        decay = self._begin_forward(update)
        hidden = source == self.mask_id
        # How many are hidden is known on a CPU alone: to ask a device is to wait for it. There every position is
        # predicted, and those that were not hidden have no weight; the head is 2 % of the work.
        positions = hidden.flatten().nonzero().squeeze(1) if source.device.type == "cpu" else None
        encoded = self.encoder(source, rng=rng, positions=positions)
        if self.teacher_input == "fairseq":
            tokens = tokens.masked_fill(~(hidden if chosen is None else chosen), self.encoder.padding_id)
        shown = self.teacher(tokens, layers=True)
        with explicit_precision(source.device.type):
            predictions = self._predicted(widened(encoded.features.view(-1, self.encoder.dim)))
            # Norms over positions look at real ones; the text's own padding does not count.
            targets = self.rule.targets([ffn for _, ffn in shown.layers], shown.padding)
            targets = targets.flatten(0, 1)
            targets = targets if positions is None else targets.index_select(0, positions)
        real = (~encoded.padding).sum()
        return self.rule.output(
            predictions,
            targets,
            decay=decay,
            num_positions=int(real) if positions is not None else real,
            weights=None if positions is not None else hidden.flatten().float(),
        )

    def _predicted(self, features: Tensor) -> Tensor:
        """(S, D) -> (S, D), in float32."""
        for number, layer in enumerate(self.prediction):
            features = F.gelu(features) if number else features
            features = layer(features)
        return features
