"""The model's own draws against the paper's: the share of masked frames, and negatives that are uniform."""

import numpy as np
import pytest
import torch

from toolkit.nn.contrastive import contrastive_logits, contrastive_logits_plain, sample_negatives
from toolkit.nn.fairseq_masks import FairseqMasking
from toolkit.nn.masking import span_mask
from toolkit.seeds import Randomness

PAPER = {"mask_prob": 0.65, "mask_length": 10, "min_masks": 2}
"""0.065 of all frames begin a span of 10."""


def masks_of(frames, batches, rows, **options):
    """Masks of many batches, one under the other."""
    settings = PAPER | options
    return np.concatenate(
        [span_mask([frames] * rows, frames, **settings, rng=Randomness(3).child(index)) for index in range(batches)]
    )


@pytest.mark.parametrize(("frames", "share"), [(49, 0.503), (249, 0.493), (781, 0.491), (999, 0.490)])
def test_share_of_masked_frames(frames, share):
    """About 49 % (section 4.2); transformers' masks of these settings were measured at these shares."""
    mask = masks_of(frames, 400, 5, equal_counts=False)
    assert mask.shape == (2000, frames)
    deviation = mask.mean(1).std() / len(mask) ** 0.5
    assert abs(mask.mean() - share) < 0.001 + 4 * deviation
    expected = 1 - (1 - 0.065) ** 10
    assert abs(mask.mean() - expected) < 0.02


def test_share_equals_the_originals():
    """The same settings by the original's draws: the same share, to the error of 2,000 rows each."""
    ours = masks_of(781, 400, 5, equal_counts=False).mean(1)
    settings = FairseqMasking(**PAPER, equal_counts=False)
    generators = [np.random.default_rng(seed) for seed in range(2000)]
    theirs = settings.main_mask([781] * 2000, 781, generators).mean(1)
    assert abs(ours.mean() - theirs.mean()) < 4 * np.hypot(ours.std(), theirs.std()) / 2000**0.5
    assert abs(ours.std() / theirs.std() - 1) < 0.1


def test_every_frame_is_as_likely_but_for_the_edges():
    mask = masks_of(200, 400, 5, equal_counts=False)
    by_frame = mask.mean(0)
    # the first frame is only in spans that begin there, the last only in those that just fit
    assert by_frame[0] < 0.12 and by_frame[-1] < 0.12
    inner = by_frame[10:-10]
    assert abs(inner - inner.mean()).max() < 5 * (0.25 / len(mask)) ** 0.5


def test_equal_counts_and_no_padding_in_batches_of_unequal_lengths():
    generator = np.random.default_rng(0)
    for index in range(100):
        lengths = generator.integers(100, 782, size=6)
        mask = span_mask(lengths, 781, **PAPER, rng=Randomness(1).child(index))
        assert len(set(mask.sum(1).tolist())) == 1 and mask.sum() > 0
        assert not any(row[length:].any() for row, length in zip(mask, lengths, strict=True))


def test_negatives_are_uniform():
    """Chi-square of how often each other masked frame is drawn, for each of 40 positions; the seed is fixed."""
    count, draws = 40, 5000
    negatives = sample_negatives([count], draws, Randomness(7))
    assert negatives.shape == (count, draws)
    freedom = count - 2
    statistics = []
    for position, drawn in enumerate(negatives):
        found = np.bincount(drawn, minlength=count)
        assert found[position] == 0
        others = np.delete(found, position)
        statistics.append(((others - draws / (count - 1)) ** 2 / (draws / (count - 1))).sum())
    # of mean `freedom` and variance 2 * freedom
    assert abs(np.mean(statistics) - freedom) < 4 * (2 * freedom / count) ** 0.5
    assert max(statistics) < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("counts", [(30, 30, 30), (12, 40, 25)])
@pytest.mark.parametrize("form", [contrastive_logits, contrastive_logits_plain])
def test_logits_never_hold_another_utterance_or_the_positive(counts, form):
    """Each masked frame's target says whose it is and which: what the logits are made of shows in their values."""
    total = sum(counts)
    utterance = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    targets = torch.cat([torch.nn.functional.one_hot(utterance).float(), torch.eye(total)], dim=1)
    negatives = torch.from_numpy(sample_negatives(counts, 50, Randomness(2)))
    codes = torch.arange(total)[:, None]
    logits = form(targets, targets, codes, negatives, counts=counts, temperature=1.0)
    # itself 1; another frame of the same utterance 1/2; of another utterance 0
    torch.testing.assert_close(logits[:, 0], torch.ones(total))
    torch.testing.assert_close(logits[:, 1:], torch.full((total, 50), 0.5))
