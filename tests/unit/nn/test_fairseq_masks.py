"""fairseq's span masks of both generations, against recorded ones: equal in every position."""

import json
from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import ModelError
from toolkit.nn.fairseq_masks import FairseqMasking

FIXTURES = Path(__file__).parents[2] / "fixtures" / "fairseq_models" / "masks"
CASES = json.loads((FIXTURES / "masks.json").read_text())["cases"]
RECORDED = np.load(FIXTURES / "masks.npz")
SAME = ("mask_prob", "mask_length", "min_masks", "min_space")
RENAMED = {"mask_type": "lengths", "mask_other": "other", "require_same_masks": "equal_counts"}
RENAMED |= {"mask_dropout": "dropout"}


def settings_of(case):
    settings = {name: case[name] for name in SAME if name in case}
    settings |= {ours: case[theirs] for theirs, ours in RENAMED.items() if theirs in case}
    return FairseqMasking(overlap=not case.get("no_overlap", False), **settings)


def lengths_of(case):
    rows, size = case["shape"]
    return [size - pad for pad in case["pad_frames"] or [0] * rows]


def of(generation, *, fails):
    cases = [case for case in CASES if case["generation"] == generation and ("error" in case) == fails]
    assert cases or fails
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["name"])


@of("release_0.12.2", fails=False)
def test_release(case):
    state = np.random.RandomState(case["seed"])
    rows, size = case["shape"]
    lengths = lengths_of(case) if case["pad_frames"] else None
    mask = settings_of(case).release_mask(lengths, size, state, rows=rows)
    assert (mask == RECORDED[case["name"]]).all()
    assert mask.sum(1).tolist() == case["masked_per_row"]
    # not one draw more or less than the original's
    assert state.random_sample() == case["next_uniform_after_call"]


@of("main", fails=False)
def test_main(case):
    generators = [np.random.default_rng(seed) for seed in case["row_seeds"]]
    mask = settings_of(case).main_mask(lengths_of(case), case["shape"][1], generators)
    assert (mask == RECORDED[case["name"]]).all()
    assert mask.sum(1).tolist() == case["masked_per_row"]


@of("main", fails=True)
def test_what_fails_there_is_refused_in_words(case):
    with pytest.raises(ModelError) as error:
        settings_of(case).main_mask(lengths_of(case), case["shape"][1], [np.random.default_rng(0)] * case["shape"][0])
    assert str(error.value) == (
        "fairseq's main branch fails for masks without overlap and for uniform lengths; take release_mask."
    )


def test_every_recorded_case_is_held_by_one_of_these():
    assert {case["generation"] for case in CASES} == {"release_0.12.2", "main"}
    assert set(RECORDED.files) == {case["name"] for case in CASES if "error" not in case}
    assert len(RECORDED.files) == 27


def test_a_row_that_would_be_masked_wholly_is_refused():
    with pytest.raises(ModelError, match="row 0 would be masked wholly, all 4 positions; mask less"):
        FairseqMasking(mask_prob=1.0, mask_length=4, min_masks=3).main_mask([4], 4, [np.random.default_rng(1)])


def test_no_spans_is_no_mask_where_the_originals_fail():
    few = FairseqMasking(mask_prob=0.01, mask_length=10)
    assert not few.release_mask(None, 20, np.random.RandomState(1), rows=2).any()
    assert not few.main_mask([20, 20], 20, [np.random.default_rng(1), np.random.default_rng(2)]).any()


def test_unknown_lengths_are_refused():
    with pytest.raises(ModelError, match="lengths is 'even', expected one of 'static'"):
        FairseqMasking(mask_prob=0.5, mask_length=2, lengths="even").release_mask([9], 9, np.random.RandomState(1))
