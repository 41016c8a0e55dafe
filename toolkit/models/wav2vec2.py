"""wav2vec 2.0's pretraining task (Baevski et al. 2020, sections 2 and 3) on the encoder.

At each masked frame the model must say which of 101 quantized candidates is the one that was hidden.
Everything after the encoder exists at the masked frames only, in float32. What is injected (masks, negatives,
Gumbel noise) takes the same way as what is drawn. Defaults are BASE's; order and arithmetic are fairseq's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.errors import ModelError
from toolkit.models.encoder import Encoded, Wav2Vec2Encoder, widened
from toolkit.nn.contrastive import (
    contrastive_logits,
    contrastive_logits_plain,
    contrastive_loss,
    count_correct,
    sample_cross_negatives,
    sample_negatives,
)
from toolkit.nn.fast.bits import DropoutBits, check_drop_probabilities, dropout
from toolkit.nn.precision import explicit_precision
from toolkit.nn.quantizer import GumbelQuantizer, checked_temperature
from toolkit.nn.quantizer import gumbel_noise as draw_gumbel_noise
from toolkit.nn.sizes import check_sizes
from toolkit.seeds import Randomness

__all__ = ["Encoded", "PretrainingOutput", "Wav2Vec2Encoder", "Wav2Vec2Pretraining"]


@dataclass(frozen=True)
class PretrainingOutput:
    """What the pretraining task says about a batch; S masked frames, N negatives, G groups of codes.

    On devices other than the CPU there are more rows than masked frames, always equally many for one shape of batch;
    the rows that fill up have weight 0 and enter nothing, see :class:`toolkit.nn.masking.MaskedFrames`.

    loss_sum : scalar, the only one with a gradient: contrastive + diversity + penalty, to be divided by the sum
        of num_masked over all micro-batches and ranks.
    num_masked : S.
    contrastive : scalar, cross entropy summed over the masked frames, in nats; log(1 + N) each by guessing.
    diversity, penalty : scalars, weighted and times S, as they enter loss_sum.
    correct : scalar, frames whose true target came out first.
    code_perplexity, prob_perplexity : (G,), codes in use in this batch, 1 to V; by choices and by probabilities.
    temperature : of the quantizer in this forward.
    logits : (S, 1 + N) float32, the true target in column 0; N counts those of the whole batch too.
    codes : (S, G) int64.
    encoded : the encoder's output; ``encoded.masked`` says which rows of logits and codes count.
    """

    loss_sum: Tensor
    num_masked: int
    contrastive: Tensor
    diversity: Tensor
    penalty: Tensor
    correct: Tensor
    code_perplexity: Tensor
    prob_perplexity: Tensor
    temperature: float
    logits: Tensor
    codes: Tensor
    encoded: Encoded

    def metrics(self) -> dict[str, tuple[Tensor | float, int]]:
        """What to log, as (sum, count): the first four per masked frame, the others per micro-batch.

        The perplexities are sums over the groups, beside them one value per group; accuracy is 1 / (1 + N) by
        guessing; masked_share is per frame.
        """
        masked, batches = self.num_masked, 1 if self.num_masked else 0
        out = {
            "contrastive": (self.contrastive, masked),
            "diversity": (self.diversity, masked),
            "feature_penalty": (self.penalty, masked),
            "accuracy": (self.correct, masked),
            "code_perplexity": (self.code_perplexity.sum(), batches),
            "prob_perplexity": (self.prob_perplexity.sum(), batches),
            "temperature": (self.temperature * batches, batches),
            "masked_share": (float(masked), int(self.encoded.frame_lengths.sum())),
        }
        for group in range(len(self.code_perplexity)):
            out[f"code_perplexity_group{group}"] = (self.code_perplexity[group], batches)
        return out


class Wav2Vec2Pretraining(nn.Module):
    """The masked contrastive task over quantized targets.

    Arguments
    ---------
    encoder : the encoder to pretrain.
    final_dim : width in which predictions and targets are compared.
    num_groups, num_codes : groups of codes, and codes in each.
    code_dim : width of all groups' codes together; None: final_dim.
    temperature : (start, end, decay per update) of the quantizer's softmax.
    num_negatives : distractors, drawn from the other masked frames of the utterance.
    cross_sample_negatives : further distractors, drawn from all masked frames of the batch (the paper: none).
    logit_temperature : divisor of the cosine similarities.
    dropout_features : drop probability on the quantizer's input.
    diversity_weight, penalty_weight : of the two terms beside the contrastive one; 0 leaves a term out.

    Raises
    ------
    ModelError : settings that make no sense.

    Example
    -------
    >>> encoder = Wav2Vec2Encoder(conv_layers=[(8, 10, 5), (8, 8, 4)], dim=16, num_layers=1, ffn_dim=32,
    ...     num_heads=2, pos_kernel=4, pos_groups=2)
    >>> model = Wav2Vec2Pretraining(encoder, final_dim=8, num_codes=4, num_negatives=5)
    >>> out = model(torch.randn(2, 1600), rng=Randomness(1), update=0)
    >>> out.logits.shape == (out.num_masked, 6), bool(out.loss_sum.isfinite())
    (True, True)
    """

    def __init__(
        self,
        encoder: Wav2Vec2Encoder,
        *,
        final_dim: int = 256,
        num_groups: int = 2,
        num_codes: int = 320,
        code_dim: int | None = None,
        temperature: tuple[float, float, float] = (2.0, 0.5, 0.999995),
        num_negatives: int = 100,
        cross_sample_negatives: int = 0,
        logit_temperature: float = 0.1,
        dropout_features: float = 0.1,
        diversity_weight: float = 0.1,
        penalty_weight: float = 10.0,
    ) -> None:
        super().__init__()
        check_sizes(least=0, num_negatives=num_negatives, cross_sample_negatives=cross_sample_negatives)
        if num_negatives + cross_sample_negatives < 1 or not 0 < logit_temperature < math.inf:
            raise ModelError(
                f"num_negatives is {num_negatives} and logit_temperature {logit_temperature}; the first must be at "
                "least 1 and the second above 0, as 100 and 0.1."
            )
        check_drop_probabilities(dropout_features=dropout_features)
        check_sizes(final_dim=final_dim, code_dim=final_dim if code_dim is None else code_dim)
        temperature = checked_temperature(temperature)
        for name, weight in (("diversity_weight", diversity_weight), ("penalty_weight", penalty_weight)):
            if not 0 <= weight < math.inf:
                raise ModelError(f"{name} is {weight}, expected 0 (the term is left out) or a positive number.")
        self.config = {
            "encoder": encoder.config,
            "final_dim": final_dim,
            "num_groups": num_groups,
            "num_codes": num_codes,
            "code_dim": code_dim,
            "temperature": list(temperature),
            "num_negatives": num_negatives,
            "cross_sample_negatives": cross_sample_negatives,
            "logit_temperature": logit_temperature,
            "dropout_features": dropout_features,
            "diversity_weight": diversity_weight,
            "penalty_weight": penalty_weight,
        }
        self.fast = True  # False: plain formulas only, see toolkit.nn.fast.common.set_fast
        self.encoder = encoder
        code_dim = final_dim if code_dim is None else code_dim
        self.quantizer = GumbelQuantizer(
            input_dim=encoder.feature_norm.normalized_shape[0],
            output_dim=code_dim,
            num_groups=num_groups,
            num_codes=num_codes,
            temperature=temperature,
        )
        self.target_projection = nn.Linear(code_dim, final_dim)
        self.final_projection = nn.Linear(encoder.dim, final_dim)
        self.num_negatives, self.cross_sample_negatives = num_negatives, cross_sample_negatives
        self.logit_temperature = logit_temperature
        self.dropout_features = dropout_features
        self.diversity_weight, self.penalty_weight = diversity_weight, penalty_weight

    def blocks(self) -> list[nn.Module]:
        """The encoder's."""
        return self.encoder.blocks()

    def forward(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        *,
        rng: Randomness | None = None,
        update: int = 0,
        time_mask: np.ndarray | Tensor | None = None,
        negatives: np.ndarray | Tensor | None = None,
        cross_negatives: np.ndarray | Tensor | None = None,
        gumbel_noise: Tensor | None = None,
    ) -> PretrainingOutput:
        """Mask a batch and score the predictions.

        Arguments
        ---------
        waveforms, lengths : see :meth:`Wav2Vec2Encoder.forward`.
        rng : this micro-batch's randomness; draws masks and negatives unless they are given, and in training mode
            drops out and draws Gumbel noise. In evaluation mode the codes are the most probable ones.
        update : finished updates, for the temperature.
        time_mask : (batch, frames) bool.
        negatives : (S, N) int64, positions among the masked frames of the frame's own utterance.
        cross_negatives : (S, C) int64, positions among the S masked frames of the batch.
        gumbel_noise : (S, G, V) float32.

        Raises
        ------
        ModelError : neither ``rng`` nor the masks and negatives are given.
        """
        wants_cross = cross_negatives is None and self.cross_sample_negatives > 0
        if rng is None and (time_mask is None or negatives is None or wants_cross):
            raise ModelError(
                "pretraining needs masks and negatives in evaluation too: give rng, or time_mask and negatives."
            )
        if time_mask is None:
            time_mask = self.encoder.draw_mask_for(waveforms, lengths, rng)
        encoded = self.encoder(waveforms, lengths, rng=rng, time_mask=time_mask, masked_only=True)
        masked = encoded.masked
        if not (masked.total if masked.weights is None else len(masked.weights)):
            return self._nothing_masked(encoded, update)
        if negatives is None:
            negatives = sample_negatives(masked.counts, self.num_negatives, rng)
        negatives = masked.spread(negatives)
        if wants_cross:
            cross_negatives = sample_cross_negatives(masked.counts, self.cross_sample_negatives, rng)
        cross = None if cross_negatives is None else masked.spread_rows(cross_negatives)
        noise = None if gumbel_noise is None else masked.spread(gumbel_noise)
        with explicit_precision(waveforms.device.type):
            return self._objective(encoded, negatives, cross, noise, rng if self.training else None, update)

    def _objective(
        self,
        encoded: Encoded,
        negatives: Tensor,
        cross: Tensor | None,
        noise: Tensor | None,
        rng: Randomness | None,
        update: int,
    ) -> PretrainingOutput:
        """Everything after the encoder, at the S masked frames; one line for one step of the paper."""
        positions, weights, device = encoded.masked.positions, encoded.masked.weights, negatives.device
        # On an accelerator a tensor: as a number it would be a constant of the kernels, another one in each batch.
        total = encoded.masked.total if weights is None else weights.sum()
        # (batch, frames, channels) -> (S, channels)
        frames = encoded.extractor_features.flatten(0, 1).index_select(0, positions)
        if rng is not None:
            frames = dropout(frames, self.dropout_features, DropoutBits(rng.child("features"), device))
            if noise is None:
                shape = (len(positions), self.quantizer.num_groups, self.quantizer.num_codes)
                noise = draw_gumbel_noise(shape, rng.torch(device, "gumbel"))
                if encoded.masked.order is not None:  # a frame's noise is the same however rows are filled up
                    noise = noise.index_select(0, encoded.masked.order)
        quantized = self.quantizer(frames, update=update, noise=noise, weights=weights)
        targets = self.target_projection(quantized.vectors)
        predictions = self.final_projection(widened(encoded.features))
        logits = (contrastive_logits if self.fast else contrastive_logits_plain)(
            predictions, targets, quantized.codes, negatives, counts=encoded.masked.row_counts,
            temperature=self.logit_temperature, cross=cross,
        )  # fmt: skip
        contrastive = contrastive_loss(logits, weights)
        codes = self.quantizer.num_groups * self.quantizer.num_codes
        # "codes - tensor" would be computed on the host, and stay there, by plugins that have no such operation.
        unused = -(quantized.prob_perplexity.sum() - codes)
        diversity = self.diversity_weight * total * unused / codes
        penalty = self.penalty_weight * total * encoded.feature_penalty
        loss = contrastive
        if self.diversity_weight:
            loss = loss + diversity
        if self.penalty_weight:
            loss = loss + penalty
        logits = logits.detach()
        return PretrainingOutput(
            loss_sum=loss,
            num_masked=encoded.masked.total,
            contrastive=contrastive.detach(),
            diversity=diversity.detach(),
            penalty=penalty.detach(),
            correct=count_correct(logits, weights),
            code_perplexity=quantized.code_perplexity,
            prob_perplexity=quantized.prob_perplexity.detach(),
            temperature=self.quantizer.temperature_at(update),
            logits=logits,
            codes=quantized.codes,
            encoded=encoded,
        )

    def _nothing_masked(self, encoded: Encoded, update: int) -> PretrainingOutput:
        """All utterances were too short to be masked: a loss of zero that a backward pass may start from."""
        zero = encoded.feature_penalty.detach() * 0
        groups = self.quantizer.num_groups
        return PretrainingOutput(
            loss_sum=widened(encoded.features).sum() * 0,
            num_masked=0,
            contrastive=zero,
            diversity=zero,
            penalty=zero,
            correct=zero,
            code_perplexity=zero.expand(groups),
            prob_perplexity=zero.expand(groups),
            temperature=self.quantizer.temperature_at(update),
            logits=zero.new_zeros(0, 1 + self.num_negatives + self.cross_sample_negatives),
            codes=torch.zeros(0, groups, dtype=torch.long, device=zero.device),
            encoded=encoded,
        )
