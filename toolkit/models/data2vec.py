"""data2vec 1.0 (Baevski et al. 2022): predict a teacher's contextual features of what was hidden from the student.

The teacher is the student's moving average and sees everything; the target at a masked position is the average of its
last layers' feed-forward outputs, each normalized. Order and arithmetic are fairseq's, defaults BASE's.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import ModelError
from toolkit.models.data2vec_targets import Data2VecOutput, TargetRule
from toolkit.models.encoder import Encoded, Wav2Vec2Encoder, widened
from toolkit.models.text_encoder import TextEncoder
from toolkit.nn.ema import DecayRamp, Teacher
from toolkit.nn.fast.common import padding_mask
from toolkit.nn.precision import explicit_precision
from toolkit.nn.transfer import to_device
from toolkit.nn.transformer import INITIAL_STD
from toolkit.seeds import Randomness

EMA_TIMINGS = ("step", "fairseq")
TEACHER_INPUTS = ("paper", "fairseq")


class _Student(nn.Module, abc.ABC):
    """What the tasks of speech and text share: the teacher and when it moves."""

    def __init__(
        self, student: nn.Module, *, ema_decay: Sequence[float], ema_timing: str, copied: Sequence[str]
    ) -> None:
        super().__init__()
        if ema_timing not in EMA_TIMINGS:
            raise ModelError(f"ema_timing is {ema_timing!r}, expected one of {', '.join(EMA_TIMINGS)}.")
        self.ema_timing = ema_timing
        self.teacher = Teacher(student, DecayRamp.checked(ema_decay), copied=copied)

    @abc.abstractmethod
    def _student(self) -> nn.Module:
        """What the teacher follows."""

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
