"""Negatives, logits, loss and accuracy of the contrastive task."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from toolkit.nn.contrastive import (
    contrastive_logits,
    contrastive_logits_plain,
    contrastive_loss,
    count_correct,
    sample_cross_negatives,
    sample_negatives,
)
from toolkit.seeds import Randomness


def rows_of(counts):
    return np.concatenate([np.arange(count) for count in counts])


@pytest.mark.parametrize("counts", [[7, 7], [5, 2, 9], [4, 0, 3]])
def test_negatives_are_other_masked_frames_of_the_utterance(counts):
    negatives = sample_negatives(counts, 60, Randomness(1))
    assert negatives.shape == (sum(counts), 60)
    limits = np.repeat(counts, counts)
    assert (negatives >= 0).all() and (negatives < limits[:, None]).all()
    assert (negatives != rows_of(counts)[:, None]).all()
    # with 60 draws every other frame turns up
    assert all(len(set(row)) == limit - 1 for row, limit in zip(negatives.tolist(), limits, strict=True))


def test_negatives_are_uniform_and_keyed_by_the_utterance():
    negatives = sample_negatives([5], 4000, Randomness(2))
    shares = np.stack([np.bincount(row, minlength=5) for row in negatives]) / 4000
    assert np.allclose(shares[~np.eye(5, dtype=bool)], 0.25, atol=0.03)
    assert (sample_negatives([5, 9], 7, Randomness(3))[:5] == sample_negatives([5, 2], 7, Randomness(3))[:5]).all()
    assert (sample_negatives([5], 7, Randomness(3)) != sample_negatives([5], 7, Randomness(4))).any()


def problem(counts, dtype=torch.float64, negatives=20, num_codes=3):
    generator = torch.Generator().manual_seed(0)
    total = sum(counts)
    codes = torch.randint(num_codes, (total, 2), generator=generator)
    book = torch.randn(num_codes, num_codes, 6, dtype=dtype, generator=generator)
    targets = book[codes[:, 0], codes[:, 1]].requires_grad_()
    predictions = torch.randn(total, 6, dtype=dtype, generator=generator).requires_grad_()
    return predictions, targets, codes, torch.from_numpy(sample_negatives(counts, negatives, Randomness(5)))


def test_cross_negatives_are_all_other_masked_frames_of_the_batch():
    rng = Randomness(3)
    drawn = sample_cross_negatives([3, 0, 2], 600, rng)
    for row, others in enumerate(drawn):
        counted = np.bincount(others, minlength=5)
        assert counted[row] == 0 and len(others) == 600
        assert (np.delete(counted, row) > 90).all()  # 150 each, if uniform
    assert sample_cross_negatives([0, 1], 2, rng).tolist() == [[0, 0]]
    assert sample_cross_negatives([], 2, rng).shape == (0, 2)
    assert not np.array_equal(drawn, sample_cross_negatives([3, 0, 2], 600, Randomness(4)))


@pytest.mark.parametrize("with_cross", [False, True])
@pytest.mark.parametrize("counts", [(6, 6, 6), (6, 1, 0, 9)])
def test_logits_equal_the_gathered_form(counts, with_cross):
    predictions, targets, codes, negatives = problem(counts)
    results = []
    cross = torch.from_numpy(sample_cross_negatives(counts, 4, Randomness(5))) if with_cross else None
    for form in (contrastive_logits, contrastive_logits_plain):
        logits = form(predictions, targets, codes, negatives, counts=counts, temperature=0.1, cross=cross)
        assert logits.shape == (sum(counts), 1 + negatives.shape[1] + (4 if with_cross else 0))
        results.append((logits, *torch.autograd.grad(contrastive_loss(logits), (predictions, targets))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    assert results[0][0].isinf().any()


def test_equal_codes_and_only_those_leave_the_softmax():
    counts = (5, 4)
    predictions, targets, codes, negatives = problem(counts)
    logits = contrastive_logits(predictions, targets, codes, negatives, counts=counts, temperature=0.1)
    start = np.repeat([0, 5], counts)
    for row in range(9):
        for column in range(20):
            other = int(start[row] + negatives[row, column])
            if (codes[other] == codes[row]).all():
                assert logits[row, 1 + column] == -torch.inf
            else:
                expected = cosine_similarity(predictions[row], targets[other], dim=0) / 0.1
                assert torch.isclose(logits[row, 1 + column], expected)


def test_one_code_in_common_is_not_the_same():
    codes = torch.tensor([[1, 2], [1, 0], [0, 2]])
    targets = torch.eye(3)
    negatives = torch.tensor([[1, 2], [0, 2], [0, 1]])
    logits = contrastive_logits(targets, targets, codes, negatives, counts=(3,), temperature=1.0)
    assert logits.tolist() == [[1.0, 0.0, 0.0]] * 3


def test_a_lonely_frame_costs_nothing():
    predictions, targets, codes, negatives = problem((1,))
    loss = contrastive_loss(contrastive_logits(predictions, targets, codes, negatives, counts=(1,), temperature=0.1))
    assert float(loss.detach()) == 0.0
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (predictions, targets)))


def test_guessing_costs_the_logarithm():
    logits = torch.zeros(4, 101)
    assert torch.isclose(contrastive_loss(logits), 4 * torch.log(torch.tensor(101.0)))


def test_correct_rows():
    inf = float("inf")
    logits = torch.tensor([[2.0, 1, 0], [1, 2, 0], [1, 1, 1], [3, 3, 1], [1, -inf, -inf]])
    # second: wrong; third: all equal, so it knows nothing; fourth: a tie goes to the positive, as argmax does
    assert int(count_correct(logits)) == 3
