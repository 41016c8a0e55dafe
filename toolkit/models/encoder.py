"""The encoder of wav2vec 2.0 (Baevski et al. 2020, section 2), which every recipe shares.

The way of a batch: waveforms -> strided convolutions -> features -> layer norm -> projection -> spans of frames
and channels masked -> transformer. Defaults are BASE's; order and arithmetic are fairseq's.

Randomness: a forward with ``rng`` on a model in training mode drops and masks, one without (or in evaluation
mode) does not; masks that are given take the same way as masks that are drawn.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import CheckpointError, ModelError
from toolkit.nn.fast.bits import DropoutBits, check_drop_probabilities, dropout
from toolkit.nn.feature_extractor import BASE_CONV_LAYERS, FeatureExtractor
from toolkit.nn.masking import MaskedFrames, check_mask_settings, most_masked, span_mask
from toolkit.nn.precision import compute_dtype, explicit_precision
from toolkit.nn.sizes import check_sizes
from toolkit.nn.transfer import to_device
from toolkit.nn.transformer import TransformerEncoder
from toolkit.seeds import Randomness


@dataclass(frozen=True)
class Encoded:
    """What the encoder makes of a batch.

    features : (batch, frames, dim), or (R, dim) of the rows of ``masked`` if only these were asked for, in the format
        that was computed in.
    frame_lengths : (batch,) int64 on the host, real frames of each utterance.
    extractor_features : (batch, frames, channels) float32, after the layer norm and before any masking.
    feature_penalty : mean square of the convolutions' output, a scalar.
    projected : (batch, frames, dim), what the transformer got, masks applied.
    masked : where frames were masked; None if nowhere. On devices other than the CPU filled up to a number of rows
        that depends on the shape of the batch alone.
    layers : (output, feed-forward output) of each layer if they were asked for.
    padded : whether there is padding, or on devices other than the CPU may be: there lengths that were given count as
        such even if all are full, so that what is computed depends on the shape of the batch alone.
    """

    features: Tensor
    frame_lengths: Tensor
    extractor_features: Tensor
    feature_penalty: Tensor
    projected: Tensor
    masked: MaskedFrames | None
    layers: Sequence[tuple[Tensor, Tensor]] | None
    padded: bool = False


class _ScaleGradient(torch.autograd.Function):
    """The input itself forward; its gradient times a factor backward."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 at least; float64 stays. What statistics, norms and losses are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Wav2Vec2Encoder(nn.Module):
    """Waveforms to contextual features, one every 20 ms with the default convolutions.

    Arguments
    ---------
    conv_layers : (channels, kernel, stride) of each convolution.
    extractor_norm : "group" (per channel over time, after the first convolution only; BASE) or "layer" (after
        each; LARGE).
    conv_bias : whether the convolutions have biases (LARGE).
    norm_over_padding : True takes the group norm's statistics, the feature penalty and a stack of positional
        convolutions over padding too, as the originals do, so that an utterance's features depend on how far its
        batch is padded. False: each utterance gets what it gets alone.
    always_project : project features that have the transformer's width already, too (data2vec); False: they go in as
        they are (wav2vec 2.0).
    dim, num_layers, ffn_dim, num_heads : width, depth, inner width and heads of the transformer.
    pre_norm : layer norms before (LARGE) or after (BASE) each block.
    pos_kernel, pos_groups, pos_depth : the positional convolution (depth above 1: data2vec's stack).
    dropout, attention_dropout, activation_dropout, dropout_input : drop probabilities in the transformer's
        residuals, on attention weights, inside the feed-forward blocks, and on the projected features.
    layerdrop : probability of leaving a layer out.
    feature_grad_mult : factor on the gradient into the convolutions; 0 trains without them.
    mask_prob, mask_length, min_masks : spans of frames replaced by a learned vector, see
        :func:`toolkit.nn.masking.span_positions`; mask_prob 0.65 masks about 49 %.
    mask_channel_prob, mask_channel_length : spans of channels set to zero on all frames.
    equal_mask_counts : bring all utterances of a batch to the smallest number of masked frames (channels
        likewise), as fairseq does.
    gradient_checkpointing : recompute convolutions and layers in the backward pass to save memory.

    Raises
    ------
    ModelError : settings that do not fit together.

    Example
    -------
    >>> encoder = Wav2Vec2Encoder(conv_layers=[(8, 10, 5), (8, 8, 4)], dim=16, num_layers=1, ffn_dim=32,
    ...     num_heads=2, pos_kernel=4, pos_groups=2)
    >>> encoder(torch.randn(2, 1600)).features.shape
    torch.Size([2, 78, 16])
    """

    def __init__(
        self,
        *,
        conv_layers: Sequence[Sequence[int]] = BASE_CONV_LAYERS,
        extractor_norm: str = "group",
        conv_bias: bool = False,
        norm_over_padding: bool = False,
        always_project: bool = False,
        dim: int = 768,
        num_layers: int = 12,
        ffn_dim: int = 3072,
        num_heads: int = 12,
        pre_norm: bool = False,
        pos_kernel: int = 128,
        pos_groups: int = 16,
        pos_depth: int = 1,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.0,
        dropout_input: float = 0.1,
        layerdrop: float = 0.05,
        feature_grad_mult: float = 0.1,
        mask_prob: float = 0.65,
        mask_length: int = 10,
        min_masks: int = 2,
        mask_channel_prob: float = 0.0,
        mask_channel_length: int = 64,
        equal_mask_counts: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        # Before any other local name exists: exactly the arguments.
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_mask_settings(mask_prob, mask_length, "mask")
        check_mask_settings(mask_channel_prob, mask_channel_length, "mask_channel")
        check_drop_probabilities(dropout_input=dropout_input)
        check_sizes(
            ffn_dim=ffn_dim, num_heads=num_heads, pos_kernel=pos_kernel, pos_groups=pos_groups,
            pos_depth=pos_depth, mask_length=mask_length, mask_channel_length=mask_channel_length,
        )  # fmt: skip
        check_sizes(least=0, num_layers=num_layers, min_masks=min_masks)
        if not 0 <= feature_grad_mult < math.inf:
            raise ModelError(f"feature_grad_mult is {feature_grad_mult}, expected 0 (frozen) or a positive factor.")
        try:
            conv_layers = tuple(tuple(int(n) for n in layer) for layer in conv_layers)
        except (TypeError, ValueError) as error:
            if isinstance(conv_layers, str):  # of a foreign config.json: its reader says so
                raise
            raise ModelError(
                f"conv_layers is {conv_layers}; expected at least one (channels, kernel, stride), all positive."
            ) from error
        self.config = arguments | {"conv_layers": [list(layer) for layer in conv_layers]}
        self.feature_extractor = FeatureExtractor(
            conv_layers,
            norm=extractor_norm,
            bias=conv_bias,
            norm_over_padding=norm_over_padding,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.feature_norm = nn.LayerNorm(conv_layers[-1][0])
        # As in the originals, which differ from each other only where the widths are equal.
        projects = always_project or conv_layers[-1][0] != dim
        self.projection = nn.Linear(conv_layers[-1][0], dim) if projects else None
        self.mask_embedding = nn.Parameter(torch.empty(dim).uniform_())
        self.transformer = TransformerEncoder(
            num_layers=num_layers,
            dim=dim,
            ffn_dim=ffn_dim,
            num_heads=num_heads,
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
            layerdrop=layerdrop,
            pre_norm=pre_norm,
            pos_kernel=pos_kernel,
            pos_groups=pos_groups,
            pos_depth=pos_depth,
            pos_over_padding=norm_over_padding,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.dim, self.dropout_input = dim, dropout_input
        self.norm_over_padding, self.feature_grad_mult = norm_over_padding, feature_grad_mult
        self.mask_prob, self.mask_length, self.min_masks = mask_prob, mask_length, min_masks
        self.mask_channel_prob, self.mask_channel_length = mask_channel_prob, mask_channel_length
        self.equal_mask_counts = equal_mask_counts

    def blocks(self) -> list[nn.Module]:
        """The modules that are gathered (where parameters are sharded) and compiled one by one, inner before outer."""
        return [self.feature_extractor, *self.transformer.layers, self.transformer]

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """Frames of waveforms of ``lengths`` samples: (batch,) int64, at least one each."""
        return self.feature_extractor.frame_lengths(lengths.clamp(min=self.feature_extractor.receptive_field))

    def draw_time_mask(self, frame_lengths: Sequence[int], num_frames: int, rng: Randomness) -> np.ndarray:
        """A mask of spans of frames, (batch, num_frames) bool, by the encoder's settings."""
        return span_mask(
            frame_lengths,
            num_frames,
            mask_prob=self.mask_prob,
            mask_length=self.mask_length,
            min_masks=self.min_masks,
            equal_counts=self.equal_mask_counts,
            rng=rng,
            stream="mask",
        )

    def mask_capacity(self, frames: int) -> int:
        """The most frames that can be masked in an utterance of a batch padded to ``frames``."""
        return most_masked(
            frames, mask_prob=self.mask_prob, mask_length=self.mask_length, min_masks=self.min_masks
        )

    def draw_mask_for(self, waveforms: Tensor, lengths: Tensor | None, rng: Randomness) -> np.ndarray:
        """The same for a batch of waveforms; ``lengths`` None: all are full."""
        batch, samples = waveforms.shape
        frames = int(self.frame_lengths(torch.tensor([samples])))
        counts = [frames] * batch if lengths is None else self.frame_lengths(lengths).tolist()
        return self.draw_time_mask(counts, frames, rng)

    def draw_channel_mask(self, batch: int, rng: Randomness) -> np.ndarray:
        """A mask of spans of channels, (batch, dim) bool, by the encoder's settings."""
        return span_mask(
            [self.dim] * batch,
            self.dim,
            mask_prob=self.mask_channel_prob,
            mask_length=self.mask_channel_length,
            equal_counts=self.equal_mask_counts,
            rng=rng,
            stream="channel mask",
        )

    def forward(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        *,
        rng: Randomness | None = None,
        time_mask: np.ndarray | Tensor | None = None,
        channel_mask: np.ndarray | Tensor | None = None,
        layers: bool = False,
        masked_only: bool = False,
    ) -> Encoded:
        """Encode a batch.

        Arguments
        ---------
        waveforms : (batch, samples) float32. Waveforms shorter than one frame are taken as followed by silence.
        lengths : (batch,) int64, real samples of each, best kept on the host (a tensor on a device is fetched,
            which waits for it); None: all are full.
        rng : this micro-batch's randomness. In training mode it drops, and masks where no mask is given.
        time_mask : (batch, frames) bool, True where a frame is replaced by the mask vector.
        channel_mask : (batch, dim) bool, True where a channel is set to zero, after the time mask.
        layers : return every layer's outputs.
        masked_only : the result's features are those of the masked frames alone, (S, dim), utterance by utterance,
            and the last layer leaves the others out.

        Raises
        ------
        ModelError : a length exceeds the padded size, or is below one sample.
        """
        rng = rng if self.training else None
        device = waveforms.device
        waveforms, lengths = self._checked_input(waveforms, lengths)
        dtype = compute_dtype(device.type, self.mask_embedding.dtype)
        with explicit_precision(device.type):
            features, penalty, frame_lengths = self._extract(waveforms, lengths, dtype)
            normed = self.feature_norm(widened(features))
            hidden = self.project(normed, dtype)
            if rng is not None and self.dropout_input > 0:
                hidden = dropout(hidden, self.dropout_input, DropoutBits(rng.child("input"), device))
            batch, frames = hidden.shape[:2]
            if rng is not None and time_mask is None and self.mask_prob > 0:
                time_mask = self.draw_time_mask(frame_lengths.tolist(), frames, rng)
            if rng is not None and channel_mask is None and self.mask_channel_prob > 0:
                channel_mask = self.draw_channel_mask(batch, rng)
            masked = None
            if time_mask is not None:
                capacity = None if device.type == "cpu" else self.mask_capacity(frames)
                masked = MaskedFrames.of(time_mask, device, capacity=capacity)
            hidden = self._masked(hidden, masked, channel_mask)
            padded = bool((frame_lengths < frames).any()) if device.type == "cpu" else lengths is not None
            out = self.transformer(
                hidden,
                frame_lengths if padded else None,
                rng=rng,
                dtype=dtype,
                layers=layers,
                positions=masked.positions if masked_only and masked is not None else None,
            )
        out, per_layer = out if layers else (out, None)
        return Encoded(out, frame_lengths, normed, penalty, hidden, masked, per_layer, padded)

    def project(self, normed: Tensor, dtype: torch.dtype) -> Tensor:
        """Normed features (batch, frames, channels) in the transformer's width and in ``dtype``: its input before
        dropout and masks."""
        hidden = normed.to(dtype)
        if self.projection is None:
            return hidden
        return F.linear(hidden, self.projection.weight.to(dtype), self.projection.bias.to(dtype))

    def _checked_input(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Waveforms of at least one frame, and lengths on the host; None if all are full, which is not looked for on
        an accelerator: another graph for batches without padding would cost more than it saves."""
        samples = waveforms.shape[1]
        if lengths is not None:
            lengths = lengths.to("cpu")
            if int(lengths.max()) > samples or int(lengths.min()) < 1:
                raise ModelError(
                    f"lengths run from {int(lengths.min())} to {int(lengths.max())} samples, but the batch is padded "
                    f"to {samples}; lengths are absolute counts of samples, from 1 to the padded size."
                )
            lengths = lengths.clamp(min=self.feature_extractor.receptive_field)
        if samples < self.feature_extractor.receptive_field:
            waveforms = F.pad(waveforms, (0, self.feature_extractor.receptive_field - samples))
        if lengths is not None and waveforms.device.type == "cpu" and bool((lengths == waveforms.shape[1]).all()):
            return waveforms, None
        return waveforms, lengths

    def _extract(self, waveforms: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The convolutions' output (batch, frames, channels), its mean square, and the frame lengths."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.feature_grad_mult > 0):
            on_device = None if lengths is None else to_device(lengths, waveforms.device)
            features = self.feature_extractor(waveforms, on_device, dtype=dtype)
        if features.requires_grad and self.feature_grad_mult != 1:
            features = _ScaleGradient.apply(features, self.feature_grad_mult)
        batch, frames, channels = features.shape
        if lengths is None or self.norm_over_padding:
            penalty = widened(features).square().mean()
        else:
            # The extractor leaves zeros in the padding.
            penalty = widened(features).square().sum() / (int(self.frame_lengths(lengths).sum()) * channels)
        if lengths is None:
            return features, penalty, torch.full((batch,), frames)
        return features, penalty, self.frame_lengths(lengths)

    def _masked(self, hidden: Tensor, masked: MaskedFrames | None, channel_mask: np.ndarray | Tensor | None) -> Tensor:
        """Masked frames become the mask vector, then masked channels zero; ``hidden`` itself is left alone."""
        if masked is not None and masked.on_device is not None:
            hidden = torch.where(masked.on_device[..., None], self.mask_embedding.to(hidden.dtype), hidden)
        elif masked is not None and masked.total:
            # (batch, frames, dim) -> (batch * frames, dim)
            rows = hidden.flatten(0, 1)
            vector = self.mask_embedding.to(hidden.dtype).expand(masked.total, -1)
            hidden = rows.index_put((masked.positions,), vector).view_as(hidden)
        if channel_mask is not None:
            channels = to_device(torch.as_tensor(channel_mask), hidden.device)
            hidden = hidden.masked_fill(channels[:, None, :], 0)
        return hidden


ENCODER_ARGUMENTS = frozenset(inspect.signature(Wav2Vec2Encoder).parameters)
"""Names of the encoder's settings."""


def encoder_settings(architecture: Mapping[str, Any], *, source: str | os.PathLike[str]) -> dict[str, Any]:
    """The encoder's arguments from the architecture of any kind of model folder.

    Raises
    ------
    CheckpointError : an argument that the encoder does not have.
    """
    inner = architecture.get("encoder", architecture)
    if not isinstance(inner, Mapping) or (unknown := sorted(set(inner) - ENCODER_ARGUMENTS)):
        what = f"the setting {unknown[0]!r}" if isinstance(inner, Mapping) else "no settings"
        raise CheckpointError(f"{source}: there is {what} for the encoder, which this version cannot build.")
    return dict(inner)
