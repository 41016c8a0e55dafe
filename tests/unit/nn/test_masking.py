"""Span masks: against recorded masks of the original, and their own promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit.errors import ModelError
from toolkit.nn.masking import MaskedFrames, check_mask_settings, most_masked, span_mask, span_positions
from toolkit.seeds import Randomness

FIXTURES = Path(__file__).parents[2] / "fixtures" / "fairseq_models" / "masks"
STATIC = [
    case
    for case in json.loads((FIXTURES / "masks.json").read_text())["cases"]
    if case["generation"] == "main"
    and "error" not in case
    and case.get("mask_type", "static") == "static"
    and "mask_dropout" not in case
]
SETTINGS = {"mask_prob": 0.65, "mask_length": 10, "min_masks": 2}


@pytest.mark.parametrize("case", STATIC, ids=lambda case: case["name"])
def test_spans_are_those_of_the_original(case):
    """With the original's generators: the same spans, and after its trimming the same count of frames out of them."""
    recorded = np.load(FIXTURES / "masks.npz")[case["name"]]
    batch, size = case["shape"]
    lengths = size - np.array(case["pad_frames"] or [0] * batch)
    settings = {key: case[key] for key in ("mask_prob", "mask_length")} | {"min_masks": case.get("min_masks", 0)}
    rows = [
        span_positions(int(length), **settings, generator=np.random.default_rng(seed))
        for length, seed in zip(lengths, case["row_seeds"], strict=True)
    ]
    fewest = min(len(row) for row in rows)
    for row, mask in zip(rows, recorded, strict=True):
        theirs = np.flatnonzero(mask)
        if len(row) == fewest or not case.get("require_same_masks", True):
            assert row.tolist() == theirs.tolist()
        else:
            assert set(theirs.tolist()) <= set(row.tolist()) and len(theirs) == fewest


def test_the_recorded_cases_are_there():
    assert len(STATIC) >= 8


def test_rows_depend_on_their_own_stream_only():
    rng = Randomness(3).child("update", 5, 0)
    alone = span_mask([80], 80, **SETTINGS, equal_counts=False, rng=rng)
    batch = span_mask([80, 60, 99], 120, **SETTINGS, equal_counts=False, rng=rng)
    assert (batch[0, :80] == alone[0]).all() and not batch[0, 80:].any()
    other = span_mask([80], 80, **SETTINGS, equal_counts=False, rng=Randomness(3).child("update", 6, 0))
    assert (other != alone).any()


def test_padding_is_never_masked_and_counts_are_equal():
    lengths = [200, 40, 3, 150]
    mask = span_mask(lengths, 200, **SETTINGS, rng=Randomness(0))
    assert all(not mask[row, length:].any() for row, length in enumerate(lengths))
    assert mask.sum(1).tolist() == [2, 2, 2, 2]
    ragged = span_mask(lengths, 200, **SETTINGS, equal_counts=False, rng=Randomness(0))
    assert (mask <= ragged).all() and ragged.sum(1)[0] > 60


def test_equal_counts_ignore_rows_without_masks():
    mask = span_mask([100, 2, 1, 0], 100, **SETTINGS, rng=Randomness(1))
    assert mask[0].sum() > 20 and not mask[1:].any()


@pytest.mark.parametrize("length", range(14))
def test_short_rows_keep_something_unmasked(length):
    for seed in range(30):
        positions = span_positions(length, **SETTINGS, generator=np.random.default_rng(seed))
        assert len(positions) < max(length, 1)
        assert (len(positions) > 0) == (length > 2)
        assert len(np.unique(positions)) == len(positions)


def test_no_spans_is_no_mask():
    counts = span_mask([64] * 200, 64, mask_prob=0.5, mask_length=64, rng=Randomness(2), equal_counts=False).sum(1)
    assert (counts == 0).any() and (counts > 0).any()


def test_share_of_masked_frames():
    """0.65 with spans of 10 masks about 49 % of the frames."""
    mask = span_mask([500] * 100, 500, **SETTINGS, equal_counts=False, rng=Randomness(4))
    assert 0.47 < mask.mean() < 0.51


def test_masked_frames_positions():
    mask = np.zeros((2, 4), dtype=bool)
    mask[0, 1] = mask[1, 0] = mask[1, 3] = True
    for given in (mask, torch.from_numpy(mask)):
        masked = MaskedFrames.of(given, "cpu")
        assert masked.positions.tolist() == [1, 4, 7] and masked.counts == (1, 2) and masked.total == 3


def test_settings_are_refused_in_words():
    with pytest.raises(ModelError) as error:
        check_mask_settings(65, 10, "mask")
    assert str(error.value) == (
        "mask_prob is 65, expected 0 to 1: the share that masked spans would cover if none overlapped."
    )
    with pytest.raises(ModelError) as error:
        check_mask_settings(0.5, 0, "mask_channel")
    assert str(error.value) == "mask_channel_length is 0, expected at least 1 position per span."


@pytest.mark.parametrize("size", [2, 3, 11, 50, 499])
@pytest.mark.parametrize("prob, length, least", [(0.65, 10, 2), (0.0, 10, 2), (1.0, 4, 0), (0.5, 1, 0)])
def test_no_row_is_masked_more_than_the_bound(size, prob, length, least):
    bound = most_masked(size, mask_prob=prob, mask_length=length, min_masks=least)
    lengths = [max(1, size - r % 5) for r in range(100)]
    mask = span_mask(lengths, size, mask_prob=prob, mask_length=length, min_masks=least, equal_counts=False,
                     rng=Randomness(4))  # fmt: skip
    assert mask.sum(1).max() <= bound <= max(size - 1, 0)


def test_filled_up_rows_depend_on_the_capacity_alone():
    """Each utterance's masked frames first, then its first frame with weight 0; values follow their frames."""
    for mask in ([[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]):
        mask = np.array(mask, dtype=bool)
        masked = MaskedFrames.of(mask, "cpu", capacity=3)
        assert masked.row_counts == (3, 3, 3) and masked.counts == tuple(mask.sum(1))
        real = masked.weights > 0
        assert masked.positions[real].tolist() == np.flatnonzero(mask).tolist()
        assert masked.positions[~real].remainder(4).tolist() == [0] * int((~real).sum())
        assert (masked.positions.view(3, 3) // 4 == torch.arange(3)[:, None]).all()
        values = torch.arange(1, masked.total + 1)
        assert masked.spread(values)[real].tolist() == values.tolist() and not masked.spread(values)[~real].any()
        assert masked.order[real].tolist() == list(range(masked.total))
        assert torch.equal(masked.on_device, torch.from_numpy(mask))


def test_more_masked_frames_than_the_capacity_make_room():
    assert MaskedFrames.of(np.ones((2, 5), dtype=bool), "cpu", capacity=1).row_counts == (5, 5)
