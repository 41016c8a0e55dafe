"""An encoder with a linear head, trained by connectionist temporal classification (Graves et al. 2006)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import ModelError
from toolkit.models.encoder import Encoded, Wav2Vec2Encoder
from toolkit.nn.fast.bits import DropoutBits, check_drop_probabilities, dropout
from toolkit.nn.precision import explicit_precision
from toolkit.seeds import Randomness


@dataclass(frozen=True)
class CTCOutput:
    """log_probs (batch, frames, vocabulary) float32; frame_lengths (batch,) int64 on the host; the encoder's output.

    Frames at and after an utterance's frame length are padding and mean nothing.
    """

    log_probs: Tensor
    frame_lengths: Tensor
    encoded: Encoded


class CTCModel(nn.Module):
    """Log probabilities of tokens, one distribution per frame.

    Masks of frames and channels (as SpecAugment's, but on features) are the encoder's own settings; they are drawn
    in training only.

    Arguments
    ---------
    encoder : pretrained or fresh.
    vocab_size : tokens, the blank among them.
    final_dropout : drop probability on the encoder's features.
    freeze_updates : for so many updates the encoder runs without gradient and only the head learns.

    Example
    -------
    >>> encoder = Wav2Vec2Encoder(conv_layers=[(8, 10, 5), (8, 8, 4)], dim=16, num_layers=1, ffn_dim=32,
    ...     num_heads=2, pos_kernel=4, pos_groups=2)
    >>> CTCModel(encoder, vocab_size=5)(torch.randn(2, 1600)).log_probs.shape
    torch.Size([2, 78, 5])
    """

    def __init__(
        self, encoder: Wav2Vec2Encoder, vocab_size: int, *, final_dropout: float = 0.0, freeze_updates: int = 0
    ) -> None:
        super().__init__()
        if vocab_size < 2 or freeze_updates < 0:
            raise ModelError(
                f"vocab_size is {vocab_size} and freeze_updates {freeze_updates}; expected at least 2 tokens (one is "
                "the blank) and 0 or more updates."
            )
        check_drop_probabilities(final_dropout=final_dropout)
        self.config = {
            "encoder": encoder.config,
            "vocab_size": vocab_size,
            "final_dropout": final_dropout,
            "freeze_updates": freeze_updates,
        }
        self.encoder = encoder
        self.head = nn.Linear(encoder.dim, vocab_size)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.final_dropout, self.freeze_updates = final_dropout, freeze_updates

    def blocks(self) -> list[nn.Module]:
        """The encoder's."""
        return self.encoder.blocks()

    def forward(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        *,
        rng: Randomness | None = None,
        update: int | None = None,
        time_mask: np.ndarray | Tensor | None = None,
        channel_mask: np.ndarray | Tensor | None = None,
    ) -> CTCOutput:
        """Score a batch.

        Arguments
        ---------
        waveforms, lengths, rng, time_mask, channel_mask : see :meth:`Wav2Vec2Encoder.forward`.
        update : finished updates; below freeze_updates the encoder gets no gradient. None: not frozen.
        """
        frozen = update is not None and update < self.freeze_updates
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            encoded = self.encoder(waveforms, lengths, rng=rng, time_mask=time_mask, channel_mask=channel_mask)
        with explicit_precision(waveforms.device.type):
            # The head is small: float32 costs nothing, and its log-softmax wants it.
            features = encoded.features.to(self.head.weight.dtype)
            if rng is not None and self.training:
                features = dropout(features, self.final_dropout, DropoutBits(rng.child("head"), features.device))
            log_probs = F.log_softmax(self.head(features), dim=-1)
        return CTCOutput(log_probs, encoded.frame_lengths, encoded)


OWN_CTC_LOSS = ("cpu", "cuda")
"""The devices of which torch has a CTC loss of its own; others would pass it on to the host behind one's back."""


def ctc_loss(
    log_probs: Tensor,
    frame_lengths: Tensor,
    tokens: Tensor,
    token_lengths: Tensor,
    *,
    blank_id: int = 0,
    on_host: bool | None = None,
) -> tuple[Tensor, int]:
    """CTC loss summed over the batch, and the number of utterances to divide by.

    An utterance that cannot be spelled in its frames costs nothing (and teaches nothing);
    :func:`toolkit.decoding.ctc.describe_impossible` names such utterances.

    Arguments
    ---------
    log_probs : (batch, frames, vocabulary) float32.
    frame_lengths : (batch,) int64.
    tokens : (batch, longest) int64, padded with anything.
    token_lengths : (batch,) int64; 0 asks for silence.
    blank_id : index of the blank.
    on_host : compute it on the host, whose gradient autograd carries back to the device; None: where torch has no
        kernel of the device's own.
    """
    device = log_probs.device
    if device.type not in OWN_CTC_LOSS if on_host is None else on_host:
        # The one place of a step that waits for the device: the host needs what it has computed.
        log_probs, tokens = log_probs.float().cpu(), tokens.cpu()
    loss = F.ctc_loss(
        log_probs.transpose(0, 1),  # (frames, batch, vocabulary)
        tokens,
        frame_lengths,
        token_lengths,
        blank=blank_id,
        reduction="sum",
        zero_infinity=True,
    )
    return loss.to(device), len(log_probs)
