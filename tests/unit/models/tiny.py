"""Models small enough for a test that runs in a fraction of a second."""

import torch

from toolkit.models.wav2vec2 import Wav2Vec2Encoder, Wav2Vec2Pretraining

SETTINGS = {
    "conv_layers": [(16, 10, 5), (16, 3, 2), (16, 2, 2)],
    "dim": 24,
    "num_layers": 2,
    "ffn_dim": 48,
    "num_heads": 2,
    "pos_kernel": 8,
    "pos_groups": 2,
}


def encoder(**changes):
    """A tiny encoder with random weights that are the same each time."""
    torch.manual_seed(7)
    return Wav2Vec2Encoder(**SETTINGS | changes)


def pretraining(encoder_changes=None, **changes):
    """A tiny pretraining model."""
    settings = {"final_dim": 12, "num_codes": 6, "num_negatives": 10} | changes
    return Wav2Vec2Pretraining(encoder(**encoder_changes or {}), **settings)


def batch(*lengths):
    """Noise of the given lengths, zero padded: (waveforms, lengths)."""
    generator = torch.Generator().manual_seed(3)
    waveforms = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        waveforms[row, :length] = torch.randn(length, generator=generator)
    return waveforms, torch.tensor(lengths)
