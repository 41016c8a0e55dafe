"""The plan of an epoch: what must hold of it for any corpus and any options."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.sampler import BucketSampler, EvaluationSampler
from toolkit.errors import ConfigError, ManifestError


def speech_durations(count: int, seed: int = 0) -> np.ndarray:
    """Like LibriSpeech: most near 14 s, a tail of short ones."""
    rng = np.random.Generator(np.random.PCG64(seed))
    short = rng.uniform(1.3, 13, count // 4)
    long = np.clip(rng.normal(14.3, 1.2, count - count // 4), 1.3, 24.5)
    return rng.permutation(np.concatenate([short, long])).round(3)


options = st.fixed_dictionaries(
    {
        "batch_seconds": st.sampled_from([3.0, 17.0, 40.0, 87.5]),
        "effective_batch": st.sampled_from([None, 60.0, 300.0, 1000.0]),
        "mode": st.sampled_from(["pad", "crop"]),
        "num_buckets": st.sampled_from([None, 1, 2, 5, 30]),
        "order": st.sampled_from(["random", "ascending", "descending"]),
        "seed": st.integers(0, 5),
        "world_size": st.sampled_from([1, 2, 3, 8]),
        "max_batch_size": st.sampled_from([None, 1, 4]),
        "sample_rate": st.sampled_from([8000, 16000]),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 400),
    corpus=st.integers(0, 3),
    equal=st.booleans(),
    max_seconds=st.sampled_from([None, 9.0]),
    chosen=options,
    epoch=st.integers(0, 3),
)
def test_invariants(count, corpus, equal, max_seconds, chosen, epoch):
    durations = np.full(count, 2.5) if equal else speech_durations(count, corpus)
    if chosen["mode"] == "crop":
        chosen = chosen | {"max_seconds": max_seconds}
    sampler = BucketSampler(durations, **chosen)
    plan = sampler.plan(epoch)
    sizes = np.diff(plan.batch_offsets)
    samples = durations * chosen["sample_rate"]

    # Each utterance once, no batch empty, and the counts that were announced.
    assert np.array_equal(np.sort(plan.rows), np.arange(count))
    assert sizes.min() >= 1
    assert plan.num_batches == sampler.batches_per_epoch == plan.update_offsets[-1]
    assert plan.num_updates == sampler.updates_per_epoch
    groups = sampler.micros_per_update
    assert groups % chosen["world_size"] == 0 and groups % sampler.lockstep == 0
    assert np.all(np.diff(plan.update_offsets)[:-1] == groups)
    assert 1 <= np.diff(plan.update_offsets)[-1] <= groups

    # Budgets: the shape of a batch, unless one utterance alone is longer.
    shapes = sizes * plan.batch_samples / chosen["sample_rate"]
    assert np.all((shapes <= chosen["batch_seconds"] + 1e-6) | (sizes == 1))
    assert chosen["max_batch_size"] is None or sizes.max() <= chosen["max_batch_size"]
    assert chosen["num_buckets"] is None or len(sampler.edges) <= chosen["num_buckets"]

    # Padding goes up and never cuts; cropping goes down and never pads.
    for batch in range(plan.num_batches):
        members = samples[plan.batch_rows(batch)]
        if chosen["mode"] == "pad":
            assert members.max() <= plan.batch_samples[batch]
        else:
            assert members.min() >= plan.batch_samples[batch]
            assert max_seconds is None or plan.batch_samples[batch] <= max_seconds * chosen["sample_rate"]

    # Lock-step: whole groups of one full bucket; only the last group of the epoch may be smaller.
    full = (plan.num_batches - sampler.final_batches) // sampler.lockstep
    for group in range(full):
        piece = slice(group * sampler.lockstep, (group + 1) * sampler.lockstep)
        assert len(set(plan.batch_bucket[piece].tolist())) == 1
        assert set(sizes[piece].tolist()) == {sampler.batch_sizes[plan.batch_bucket[piece][0]]}
    final = slice(full * sampler.lockstep, None)
    assert len(set(plan.batch_bucket[final].tolist())) <= 1
    assert np.array_equal(plan.batch_samples, sampler.samples[plan.batch_bucket])
    assert sampler.epoch_seconds == pytest.approx((sampler.edges[plan.batch_bucket] * sizes).sum())
    assert sampler.report()


def same_plan(first, second) -> bool:
    names = ("rows", "batch_offsets", "batch_bucket", "batch_samples", "update_offsets")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("order", ["random", "ascending"])
def test_plan_does_not_depend_on_the_world(mode, order):
    """1, 2, 4 and 8 ranks do the same updates; and each rank's share is what it says."""
    durations = speech_durations(500)
    arguments = {"batch_seconds": 30, "effective_batch": 240, "mode": mode, "order": order}
    single = BucketSampler(durations, **arguments)
    assert (single.micros_per_update, single.lockstep, single.accumulation) == (8, 8, 8)
    for world in (2, 4, 8):
        sampler = BucketSampler(durations, world_size=world, **arguments)
        assert sampler.accumulation == 8 // world
        for epoch in range(3):
            plan = sampler.plan(epoch)
            assert same_plan(plan, single.plan(epoch))
            for update in range(plan.num_updates):
                shares = [plan.micros(update, rank, world) for rank in range(world)]
                assert len({len(share) for share in shares}) == 1
                for turn in zip(*shares, strict=True):
                    # All ranks at one turn: consecutive micro-batches, of one bucket.
                    assert [micro for micro, _ in turn] == list(range(turn[0][0], turn[0][0] + world))
                    assert len({plan.batch_bucket[batch] for _, batch in turn if batch is not None}) <= 1
                batches = sorted(batch for share in shares for _, batch in share if batch is not None)
                first, end = plan.update_offsets[update : update + 2]
                assert batches == list(range(first, end))


def test_epochs_and_seeds_differ_and_repeat():
    durations = speech_durations(300)
    sampler = BucketSampler(durations, batch_seconds=40, effective_batch=80)
    assert same_plan(sampler.plan(3), BucketSampler(durations, batch_seconds=40, effective_batch=80).plan(3))
    plans = [sampler.plan(epoch) for epoch in range(4)]
    plans.append(BucketSampler(durations, batch_seconds=40, effective_batch=80, seed=1).plan(0))
    for index, plan in enumerate(plans):
        for other in plans[:index]:
            assert not np.array_equal(plan.rows, other.rows)
            assert not np.array_equal(plan.batch_bucket, other.batch_bucket)
    # Who has to move to another bucket changes, too.
    moved = [set(plan.rows[plan.batch_offsets[-2] :].tolist()) for plan in plans[:4]]
    assert len(set.union(*moved)) > len(moved[0])


def test_orders():
    durations = speech_durations(400)
    arguments = {"batch_seconds": 40, "effective_batch": 80}
    for order, sign in (("ascending", 1), ("descending", -1)):
        sampler = BucketSampler(durations, order=order, **arguments)
        plan = sampler.plan(0)
        whole = plan.batch_samples[: plan.num_batches - sampler.final_batches]
        assert len(set(whole.tolist())) > 3
        assert np.all(np.diff(whole) * sign >= 0)
    whole = BucketSampler(durations, **arguments).plan(0).batch_samples
    assert np.any(np.diff(whole) > 0) and np.any(np.diff(whole) < 0)


def test_accumulation_is_derived():
    durations = speech_durations(200)
    cases = {(None, 1): 1, (40, 1): 1, (100, 1): 3, (160, 1): 4, (160, 3): 6, (10, 4): 4, (5760, 16): 144}
    for (effective, world), micros in cases.items():
        sampler = BucketSampler(durations, batch_seconds=40, effective_batch=effective, world_size=world)
        assert sampler.micros_per_update == micros
        assert sampler.accumulation * world == micros
    locksteps = {
        (1, 1): 1,
        (8, 1): 8,
        (64, 1): 8,
        (9, 1): 3,
        (7, 1): 7,
        (11, 1): 1,
        (64, 16): 16,
        (10, 2): 2,
        (12, 4): 4,
    }
    for (micros, world), lockstep in locksteps.items():
        sampler = BucketSampler(durations, batch_seconds=10, effective_batch=10 * micros, world_size=world)
        assert sampler.lockstep == lockstep, (micros, world)


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize(("effective", "budget"), [(16, 16), (16, 40), (100, 40), (60, 7), (100, 100)])
def test_an_update_is_of_its_size_on_any_number_of_ranks(mode, world, effective, budget):
    """Budgets shrink where the ranks together would take more; short recordings of 0.3 to 1 s."""
    durations = np.random.Generator(np.random.PCG64(0)).uniform(0.3, 1.0, 2000)
    arguments = {"batch_seconds": budget, "effective_batch": effective, "mode": mode}
    sampler = BucketSampler(durations, world_size=world, **arguments)
    assert sampler.batch_seconds == min(budget, effective / world)
    assert sampler.micros_per_update % world == 0
    assert sampler.update_seconds == pytest.approx(effective, rel=0.25)
    assert "warning" not in sampler.report()


def test_micro_batches_that_hold_half_their_budget_are_counted_as_they_are():
    """One utterance of 9 s in each budget of 16 s: 18 of them make 160 s, not 10."""
    sampler = BucketSampler([9.0] * 100, batch_seconds=16, effective_batch=160)
    assert sampler.update_seconds == pytest.approx(160, rel=0.15)
    wide = BucketSampler([9.0] * 320, batch_seconds=16, effective_batch=256)
    assert (wide.lockstep, wide.micros_per_update) == (8, 32)
    for world in (2, 4, 8):
        other = BucketSampler([9.0] * 320, batch_seconds=16, effective_batch=256, world_size=world)
        assert same_plan(other.plan(2), wide.plan(2))


def test_report_says_when_an_update_is_not_of_its_size():
    def last_line(durations, **arguments):
        return BucketSampler(durations, **arguments).report().splitlines()[-1]

    assert last_line([9.0] * 64, batch_seconds=16, effective_batch=16, world_size=8) == (
        "warning: an update holds 72.1 s of audio, where effective_batch is 16 s, as each micro-batch holds one "
        "utterance at least; raise effective_batch, or use fewer ranks."
    )
    assert last_line([11.0] * 64, batch_seconds=16, effective_batch=16) == (
        "warning: an update holds 11.0 s of audio, where effective_batch is 16 s, as whole utterances of like length "
        "go into micro-batches of 16 s at most; choose effective_batch and batch_seconds by the number above, or "
        "another num_buckets."
    )
    assert last_line([1.0] * 10, batch_seconds=4, effective_batch=100) == (
        "warning: an update holds 10.1 s of audio, where effective_batch is 100 s, all that there is in an epoch; "
        "lower effective_batch."
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_buckets": 2.5}, "num_buckets is 2.5, expected a whole number greater than 0."),
        ({"max_batch_size": 1.5}, "max_batch_size is 1.5, expected a whole number greater than 0."),
        ({"sample_rate": 22050.5}, "sample_rate is 22050.5, expected a whole number greater than 0."),
        ({"num_buckets": True}, "num_buckets is True, expected a number greater than 0."),
        ({"effective_batch": np.inf}, "effective_batch is inf, expected a number of 1e+09 at most; correct it."),
        ({"batch_seconds": np.inf}, "batch_seconds is inf, expected a number of 1e+09 at most; correct it."),
        ({"num_buckets": np.inf}, "num_buckets is inf, expected a number of 1e+09 at most; correct it."),
        (
            {"batch_seconds": 1e-9, "effective_batch": 16},
            "effective_batch 16 s in micro-batches of batch_seconds 1e-09 s makes 1.6e+10 of them for one update, "
            "expected 1,000,000 at most; both are seconds of audio: lower effective_batch or raise batch_seconds.",
        ),
        (
            {"mode": "crop", "max_seconds": 0},
            "max_seconds (crop_seconds in the YAML of a pretraining) is 0, expected a number greater than 0.",
        ),
    ],
)
def test_numbers_that_cannot_be_meant(arguments, sentence):
    with pytest.raises(ConfigError) as caught:
        BucketSampler([1.0, 2.0, 3.0], **{"batch_seconds": 4, **arguments})
    assert str(caught.value) == sentence


def test_numbers_at_the_limits_take_no_time():
    """Not a loop over the micro-batches."""
    started = time.monotonic()
    assert BucketSampler([1.0] * 10, batch_seconds=1000, effective_batch=1e9).plan(0).num_batches == 1
    assert BucketSampler([1.0] * 10, batch_seconds=1e-9).plan(0).num_batches == 10
    assert BucketSampler([1.0] * 10, batch_seconds=1e9, mode="crop").plan(0).num_batches == 1
    assert time.monotonic() - started < 2


def test_crop_edge_is_the_shortest_utterance():
    sampler = BucketSampler([2.0, 3.0, 10.0], batch_seconds=20, mode="crop", num_buckets=1)
    assert sampler.edges.tolist() == [pytest.approx(2.0, abs=0.02)]
    assert sampler.samples[0] <= 32000
    tiny = BucketSampler([1 / 16000, 5.0], batch_seconds=20, mode="crop")
    assert tiny.plan(0).batch_samples.min() == 1


def test_little_is_wasted():
    durations = speech_durations(20000)
    pad = BucketSampler(durations, batch_seconds=87.5, effective_batch=700)
    assert 1 - durations.sum() / pad.epoch_seconds < 0.05
    crop = BucketSampler(durations, batch_seconds=87.5, effective_batch=700, mode="crop")
    assert 1 - crop.epoch_seconds / durations.sum() < 0.06
    one = BucketSampler(durations, batch_seconds=87.5, effective_batch=700, num_buckets=1)
    assert 1 - durations.sum() / one.epoch_seconds > 0.3


def test_number_of_buckets_suits_the_corpus():
    """Few utterances in long groups: leftovers that move up cost more than fine buckets save."""
    durations = speech_durations(400)
    arguments = {"batch_seconds": 40, "effective_batch": 320}
    chosen = BucketSampler(durations, **arguments)
    fixed = [BucketSampler(durations, num_buckets=count, **arguments) for count in range(1, 17)]
    assert 1 < len(chosen.edges) < 16
    assert chosen.epoch_seconds < 0.8 * fixed[0].epoch_seconds
    assert chosen.epoch_seconds < 1.04 * min(sampler.epoch_seconds for sampler in fixed)
    many = BucketSampler(speech_durations(20000), **arguments)
    assert len(many.edges) > len(chosen.edges)


def test_report_says_what_is_padded():
    text = BucketSampler([2.0] * 8, batch_seconds=4.1, effective_batch=8.2).report()
    assert text.splitlines() == [
        "8 utterances, 0.00 h, in 1 buckets; 2 updates an epoch",
        "bucket  seconds  samples  batch  utterances",
        "     0     2.01    32160      2           8",
        "padding: 0.5 % of what the model sees",
        "an update: 2 micro-batches, about 8 s of audio; 1 rank, 2 accumulated on each",
    ]
    text = BucketSampler([2.0] * 8, batch_seconds=4.1, mode="crop", world_size=2).report()
    assert text.splitlines()[-2:] == [
        "cropped away: 0.5 % of the audio",
        "an update: 2 micro-batches, about 8 s of audio; 2 ranks, 1 accumulated on each",
    ]


def test_librispeech_is_planned_in_little_memory():
    """281,241 utterances: the plan, and all that making it takes, in a part of the 200 MB."""
    durations = speech_durations(281_241)
    tracemalloc.start()
    sampler = BucketSampler(durations, batch_seconds=87.5, effective_batch=5600, mode="crop", max_seconds=15.6)
    plan = sampler.plan(0)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(np.sort(plan.rows), np.arange(281_241))
    assert plan.nbytes < 4e6
    assert held < 20e6
    assert peak < 60e6


def test_errors():
    with pytest.raises(ManifestError) as caught:
        BucketSampler([], batch_seconds=1)
    assert str(caught.value) == (
        "there are no utterances to plan; check the manifest and the minimum and maximum duration."
    )
    with pytest.raises(ManifestError) as caught:
        EvaluationSampler([1.0, np.nan, -1.0], batch_seconds=1)
    assert str(caught.value) == (
        "row 1 has a duration of nan s (2 such rows), expected seconds greater than 0; prepare the manifest again."
    )
    with pytest.raises(ManifestError) as caught:
        BucketSampler([1.0, 25.0], batch_seconds=10, max_seconds=20)
    assert str(caught.value) == (
        "1 of 2 utterances are longer than max_seconds 20 (the longest lasts 25.00 s); filter the manifest with "
        "max_duration, or use mode 'crop'."
    )
    with pytest.raises(ConfigError) as caught:
        BucketSampler([1.0], batch_seconds=0)
    assert str(caught.value) == "batch_seconds is 0, expected a number greater than 0."
    with pytest.raises(ConfigError) as caught:
        BucketSampler([1.0], batch_seconds=1, order="sorted")
    assert str(caught.value) == "order is 'sorted', expected one of random, ascending, descending."
    with pytest.raises(ConfigError) as caught:
        BucketSampler([1.0], batch_seconds=10, effective_batch=60, lockstep=4)
    assert str(caught.value) == (
        "lockstep is 4, but it must divide the 6 micro-batches of an update and be a multiple of the 1 ranks; "
        "use one of 1, 2, 3, 6 or leave it out."
    )
    assert BucketSampler([1.0], batch_seconds=10, effective_batch=60, lockstep=2).lockstep == 2


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_takes_all_in_order_of_length(world):
    durations = speech_durations(301)
    sampler = EvaluationSampler(durations, batch_seconds=50, world_size=world)
    plan = sampler.plan(7)
    assert same_plan(plan, sampler.plan(0))
    assert np.array_equal(np.sort(plan.rows), np.arange(301))
    assert np.all(np.diff(durations[plan.rows]) <= 0)
    assert not plan.crop and plan.batch_samples.max() == 0
    for batch in range(plan.num_batches):
        rows = plan.batch_rows(batch)
        assert len(rows) * durations[rows].max() <= 50 + 1e-6 or len(rows) == 1
    assert plan.num_updates == sampler.updates_per_epoch
    taken = [
        [
            batch
            for update in range(plan.num_updates)
            for _, batch in plan.micros(update, rank, world)
            if batch is not None
        ]
        for rank in range(world)
    ]
    for rank, batches in enumerate(taken):
        assert batches == list(range(rank, plan.num_batches, world))


def test_evaluation_batches_use_the_budget():
    plan = EvaluationSampler(np.full(100, 5.0), batch_seconds=50).plan(0)
    assert np.diff(plan.batch_offsets).tolist() == [10] * 10


def test_the_plan_is_known_by_its_digest():
    durations = np.random.default_rng(3).uniform(0.5, 3.0, 300)

    def digest(**options):
        values = {"batch_seconds": 8.0, "effective_batch": 32.0, "seed": 1, **options}
        return BucketSampler(durations, **values).plan_digest

    assert digest() == digest(world_size=2) == digest(world_size=4)
    # eight ranks get 4 s each
    others = [digest(world_size=8), digest(batch_seconds=4.0), digest(effective_batch=64.0), digest(seed=2)]
    assert digest() not in others
