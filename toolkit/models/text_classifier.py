"""A text encoder with a classification head (Liu et al. 2019, section 3; RoBERTa's fine-tuning for GLUE)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import ModelError
from toolkit.models.text_encoder import TextEncoder
from toolkit.nn.fast.bits import DropoutBits, check_drop_probabilities, dropout
from toolkit.nn.precision import explicit_precision
from toolkit.nn.transformer import INITIAL_STD
from toolkit.seeds import Randomness

LABELS = "labels"
"""Where a model folder's ``extra`` keeps the labels, in the order of the outputs."""


class TextClassifier(nn.Module):
    """Scores of classes, from the features of a text's first token (``<s>``).

    Features -> dropout -> dense -> tanh -> dropout -> linear.

    Arguments
    ---------
    encoder : pretrained or fresh.
    num_classes : at least 2.
    dropout : drop probability before both layers of the head.

    Raises
    ------
    ModelError : fewer than 2 classes, or no probability.

    Example
    -------
    >>> encoder = TextEncoder(vocab_size=20, dim=16, num_layers=1, ffn_dim=32, num_heads=2, max_positions=8)
    >>> TextClassifier(encoder, num_classes=3)(torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])).shape
    torch.Size([2, 3])
    """

    def __init__(self, encoder: TextEncoder, num_classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        if num_classes < 2:
            raise ModelError(f"num_classes is {num_classes}; expected at least 2.")
        check_drop_probabilities(dropout=dropout)
        self.config = {"encoder": encoder.config, "num_classes": num_classes, "dropout": dropout}
        self.encoder, self.dropout = encoder, dropout
        self.dense = nn.Linear(encoder.dim, encoder.dim)
        self.head = nn.Linear(encoder.dim, num_classes)
        for layer in (self.dense, self.head):
            nn.init.normal_(layer.weight, std=INITIAL_STD)
            nn.init.zeros_(layer.bias)

    def blocks(self) -> list[nn.Module]:
        """The encoder's."""
        return self.encoder.blocks()

    def forward(self, tokens: Tensor, *, rng: Randomness | None = None) -> Tensor:
        """Score a batch.

        Arguments
        ---------
        tokens : (batch, length) int64, each row with a real token first and its padding behind.
        rng : this micro-batch's randomness. In training mode it drops.

        Returns
        -------
        logits (batch, classes) float32.

        Raises
        ------
        ModelError : see :meth:`TextEncoder.forward`; or (seen on a CPU) a row begins with padding.
        """
        if tokens.device.type == "cpu" and tokens.ndim == 2 and bool((tokens[:, 0] == self.encoder.padding_id).any()):
            raise ModelError("a row begins with padding; put a text's tokens first, <s> before them.")
        # Only these rows are wanted: on a CPU the last layer computes no others.
        firsts = torch.arange(tokens.shape[0], device=tokens.device) * tokens.shape[-1]
        features = self.encoder(tokens, rng=rng, positions=firsts).features
        with explicit_precision(tokens.device.type):
            # The head is small: float32 costs nothing, and a loss over few classes wants it.
            x = features.to(self.head.weight.dtype)
            bits = DropoutBits(rng.child("head"), x.device) if rng is not None and self.training else None
            x = torch.tanh(self.dense(dropout(x, self.dropout, bits)))
            return self.head(dropout(x, self.dropout, bits))


def classification_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Cross entropy summed over the batch, and the number of texts to divide by.

    Arguments
    ---------
    logits : (batch, classes) float32.
    labels : (batch,) int64, the number of each text's class.
    """
    return F.cross_entropy(logits, labels, reduction="sum"), len(logits)
