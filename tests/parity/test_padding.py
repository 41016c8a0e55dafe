"""What padding does to an utterance in a model of BASE's layout, whose group norm runs over time.

Run with -s to see the figures of docs/parity.md.
"""

import functools
from pathlib import Path

import pytest
import torch

from toolkit.data.audio import read_audio
from toolkit.models.encoder import Wav2Vec2Encoder

SPEECH = sorted((Path(__file__).parents[1] / "fixtures" / "librispeech_tiny").rglob("*.flac"))
LONGEST = 10 * 16000
SECONDS = (10, 8, 5, 2)


@functools.cache
def utterances():
    """Real speech of 10, 8, 5 and 2 seconds."""
    whole = [waveform for path in SPEECH if len(waveform := read_audio(path, sample_rate=16000)) >= LONGEST]
    return [torch.from_numpy(waveform[: n * 16000]) for waveform, n in zip(whole, SECONDS, strict=False)]


def encoder(layout, norm_over_padding):
    """BASE's convolutions and two of its layers, or LARGE's, a quarter as wide, of random weights."""
    torch.manual_seed(2)
    large = {"extractor_norm": "layer", "conv_bias": True, "pre_norm": True}
    made = Wav2Vec2Encoder(
        conv_layers=[(128, 10, 5), *[(128, 3, 2)] * 4, *[(128, 2, 2)] * 2],
        dim=192,
        num_layers=2,
        ffn_dim=768,
        num_heads=3,
        norm_over_padding=norm_over_padding,
        **(large if layout == "LARGE" else {}),
    )
    return made.eval()


def differences(layout, norm_over_padding):
    """For each utterance, how far its features in the padded batch are from those it gets alone: |a - b| / |b|."""
    model = encoder(layout, norm_over_padding)
    assert len(utterances()) == len(SECONDS)
    lengths = torch.tensor([len(waveform) for waveform in utterances()])
    batch = torch.nn.utils.rnn.pad_sequence(utterances(), batch_first=True)
    out = []
    with torch.no_grad():
        padded = model(batch, lengths)
        for row, waveform in enumerate(utterances()):
            alone = model(waveform[None]).features[0]
            real = padded.features[row, : len(alone)]
            out.append(float((real - alone).norm() / alone.norm()))
    return out


@pytest.mark.parametrize("layout", ["BASE", "LARGE"])
def test_each_utterance_gets_what_it_gets_alone(layout):
    found = differences(layout, norm_over_padding=False)
    print(layout, "norm_over_padding: false", [f"{value:.1e}" for value in found])
    assert max(found) <= 1e-5


def test_the_originals_group_norm_depends_on_the_padding():
    found = differences("BASE", norm_over_padding=True)
    print("BASE norm_over_padding: true", [f"{value:.1e}" for value in found])
    assert found[0] <= 1e-5  # it fills the batch
    # the more padding, the more silence in the statistics
    assert found[0] < found[1] < found[2] < found[3]
    assert found[3] > 0.05


def test_layer_norm_does_not_see_the_padding_either_way():
    found = differences("LARGE", norm_over_padding=True)
    print("LARGE norm_over_padding: true", [f"{value:.1e}" for value in found])
    assert max(found) <= 1e-5
