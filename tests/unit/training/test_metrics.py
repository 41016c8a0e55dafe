"""Sums, rates and the length of a run."""

import math

import pytest
import torch

from toolkit.errors import ConfigError
from toolkit.training.limits import UNKNOWN, RunLength
from toolkit.training.metrics import Meter, MetricSums, rates


def test_averages_are_of_all_items_whatever_the_batches():
    sums = MetricSums()
    sums.add("loss", torch.tensor(10.0), torch.tensor(4))
    sums.add("loss", 2.0, 1)
    sums.add("wer", 100 * 3, 20)
    assert sums.averages() == {"loss": 2.4, "wer": 15.0}
    sums.add("empty", 0.0, 0)
    assert math.isnan(sums.averages()["empty"])


def test_large_sums_stay_exact():
    sums = MetricSums()
    for _ in range(1000):
        sums.add("frames", torch.tensor(16777215.0), 1)
    assert sums.collect()["frames"] == (16777215000.0, 1000.0)


def test_what_is_not_finite_is_left_out_and_counted():
    sums = MetricSums()
    sums.add("loss", torch.tensor(math.nan), 5)
    sums.add("loss", 6.0, 3)
    assert sums.averages() == {"loss": 2.0} and sums.nonfinite == 1


def test_a_state_goes_on_where_it_was():
    sums = MetricSums()
    sums.add("loss", 1 / 3, 1)
    again = MetricSums()
    again.load_state_dict(sums.state_dict())
    again.add("loss", 2 / 3, 1)
    assert again.averages() == {"loss": 0.5}


def test_the_meter_counts_only_while_training_goes_on():
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    meter.start()
    now[0] = 4.0
    meter.add_batch(8.0, 10.0)
    meter.pause()
    now[0] = 100.0
    meter.start()
    now[0] = 101.0
    meter.waited += 0.5
    taken = meter.take()
    assert taken == {"real": 8.0, "seen": 10.0, "waited": 0.5, "worked": 5.0}
    now[0] = 103.0
    assert meter.take()["worked"] == 2.0


def test_rates_of_several_ranks():
    first = {"real": 8.0, "seen": 10.0, "waited": 1.0, "worked": 4.0}
    second = {"real": 4.0, "seen": 6.0, "waited": 0.0, "worked": 4.0}
    assert rates([first, second]) == {"throughput": 3.0, "padding_share": 0.25, "loader_wait_share": 0.125}


def simulated(max_minutes, seconds_per_update, *, max_updates=None, valid_every=None, valid_seconds=0.0, first=0.0):
    """A run by a made-up clock: returns (updates, seconds, totals as they were estimated)."""
    now = [1000.0]
    length = RunLength(max_updates, max_minutes, clock=lambda: now[0])
    length.start(0)
    update, totals = 0, []
    now[0] += first
    while not length.is_reached(update):
        now[0] += seconds_per_update
        update += 1
        if length.is_over_time():
            length.total = update
        elif update & (update - 1) == 0 or update % 10 == 0:
            length.total = max(update, length.estimate(update))
        totals.append(length.total)
        if valid_every and (update % valid_every == 0 or length.is_reached(update)):
            now[0] += valid_seconds
            length.reserve = valid_seconds
    return update, now[0] - 1000.0, totals


def test_a_limited_time_is_used_up_and_not_exceeded():
    updates, seconds, totals = simulated(10.0, 0.7)
    assert 0.98 * 600 <= seconds <= 600 and totals[-1] == updates
    # The total is known early, so that the schedule does not jump.
    assert abs(totals[10] - updates) < 0.02 * updates


def test_validations_and_a_slow_start_fit_into_the_time():
    updates, seconds, totals = simulated(10.0, 0.7, valid_every=50, valid_seconds=20.0, first=30.0)
    # One update may be under way when the time is up.
    assert 0.93 * 600 <= seconds <= 600 + 0.7 + 1e-6
    assert totals[-1] == updates
    assert abs(totals[len(totals) // 2] - updates) < 0.2 * updates


def test_whichever_limit_comes_first():
    assert simulated(10.0, 0.7, max_updates=100)[0] == 100
    assert simulated(1.0, 1.0, max_updates=100)[0] < 61
    with pytest.raises(ConfigError):
        RunLength(None, None).require_limit()


def test_minutes_count_over_sessions():
    now = [0.0]
    first = RunLength(None, 1.0, clock=lambda: now[0])
    assert first.total == UNKNOWN
    first.start(0)
    now[0] = 40.0
    first.total = first.estimate(20)
    assert first.total == 30
    now[0] = 500.0
    second = RunLength(None, 1.0, clock=lambda: now[0])
    state = {**first.state_dict(), "elapsed_seconds": 40.0}
    second.load_state_dict(state)
    second.start(20)
    assert second.elapsed() == 40.0 and second.total == 30
    now[0] = 510.0
    assert second.estimate(25) == 30
    second.mark_finished()
    third = RunLength(None, 1.0, clock=lambda: now[0])
    third.load_state_dict(second.state_dict())
    assert third.is_reached(25)
    longer = RunLength(None, 2.0, clock=lambda: now[0])
    longer.load_state_dict(second.state_dict())
    assert not longer.is_reached(25)
