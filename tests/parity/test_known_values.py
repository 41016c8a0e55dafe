"""Values and cases that transformers' own tests state (tests/models/wav2vec2/test_modeling_wav2vec2.py), by our
functions. Where ours follow fairseq's rule instead, the case says so."""

import numpy as np
import pytest
import torch

from toolkit.nn.contrastive import sample_negatives
from toolkit.nn.masking import span_mask
from toolkit.nn.quantizer import perplexity
from toolkit.seeds import Randomness


def test_perplexity():
    # (frames, groups, codes), not normalized
    probs = torch.arange(100).reshape(2, 5, 10) / 100
    assert float(perplexity(probs.mean(0)).sum()) == pytest.approx(141.4291, abs=1e-3)
    mask = torch.tensor([False, True])
    assert float(perplexity(probs[mask].mean(0)).sum()) == pytest.approx(58.6757, abs=1e-3)


def test_single_positions_are_masked_exactly():
    mask = span_mask([60] * 4, 60, mask_prob=0.5, mask_length=1, rng=Randomness(0))
    assert mask.sum(1).tolist() == [30] * 4


def test_spans_may_overlap_and_stay_in_the_real_part():
    for seed in range(20):
        mask = span_mask([80] * 4, 80, mask_prob=0.5, mask_length=4, rng=Randomness(seed))
        assert mask.sum(1).max() <= 40
        mask = span_mask([40, 40, 80, 80], 80, mask_prob=0.5, mask_length=4, rng=Randomness(seed))
        assert mask.sum(1).max() <= 40 and not mask[:2, 40:].any()


def test_a_low_probability_masks_at_times():
    """Rows are counted here: transformers draws once for a batch whether to round up, fairseq and ours once a row."""
    rows = [
        span_mask([100] * 4, 100, mask_prob=0.05, mask_length=10, equal_counts=False, rng=Randomness(seed)).any(1)
        for seed in range(25)
    ]
    masked = int(np.concatenate(rows).sum())
    assert 10 < masked < 90


def test_a_row_shorter_than_a_span():
    """transformers masks nothing in it; fairseq and ours what fits, and never all."""
    for seed in range(20):
        mask = span_mask([100, 5], 100, mask_prob=0.05, mask_length=10, min_masks=2, rng=Randomness(seed))
        assert not mask[1, 5:].any() and not mask[1, :5].all()


def negatives_of(counts, num_negatives, features):
    """(S, N, dim): what transformers' function would gather."""
    drawn = sample_negatives(counts, num_negatives, Randomness(3))
    starts = np.repeat(np.cumsum([0, *counts[:-1]]), counts)
    return features[torch.from_numpy(drawn + starts[:, None])]


def test_negatives_are_never_the_frame_itself():
    # the value of each of 2 x 10 frames is its number
    features = (torch.arange(10)[:, None] * torch.ones(10, 4)).repeat(2, 1)
    negatives = negatives_of([10, 10], 3, features)
    assert negatives.shape == (20, 3, 4)
    assert ((negatives - features[:, None]) != 0).all()
    assert (negatives.std(-1) == 0).all()


def test_negatives_come_from_masked_frames():
    features = (torch.arange(10)[:, None] * torch.ones(10, 4)).repeat(2, 1)
    mask = torch.ones(20, dtype=torch.bool)
    mask[15:] = False  # the second half of the last row
    features[~mask] = -100
    negatives = negatives_of([10, 5], 3, features[mask])
    assert negatives.shape == (15, 3, 4) and (negatives >= 0).all()
    assert ((negatives - features[mask][:, None]) != 0).all()
