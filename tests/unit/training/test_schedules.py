"""Schedules against the formulas of the originals, written out here once more."""

import math

import pytest

from toolkit.errors import ConfigError
from toolkit.training.schedules import Constant, Cosine, Noam, Polynomial, TriStage

TOTAL = 20000


def test_tri_stage_is_the_originals():
    schedule = TriStage(warmup=0.1, hold=0.4, decay=0.5, init_factor=0.01, final_factor=0.05)
    peak, warm, hold, decay = 3e-5, 2000, 8000, 10000
    for update in (0, 1, 1999, 2000, 5000, 9999, 10000, 10001, 15000, 20000, 25000):
        if update < warm:
            expected = 0.01 * peak + (peak - 0.01 * peak) / warm * update
        elif update < warm + hold:
            expected = peak
        elif update <= warm + hold + decay:
            expected = peak * math.exp(-(-math.log(0.05) / decay) * (update - warm - hold))
        else:
            expected = peak * 0.05
        assert peak * schedule(update, TOTAL) == pytest.approx(expected, rel=1e-12)


def test_polynomial_is_the_originals():
    schedule = Polynomial(warmup=32000, power=1.0)
    total = 400000
    assert schedule(0, total) == 0.0
    assert schedule(16000, total) == 0.5 and schedule(32000, total) == 1.0
    assert schedule(216000, total) == pytest.approx(0.5) and schedule(total, total) == 0.0
    squared = Polynomial(warmup=0, power=2.0, end_factor=0.1)
    assert squared(0, 10) == 1.0 and squared(5, 10) == pytest.approx(0.9 * 0.25 + 0.1)


def test_cosine_and_noam_and_constant():
    cosine = Cosine(warmup=100, end_factor=0.2)
    assert cosine(0, 1100) == 0.2 and cosine(100, 1100) == 1.0
    assert cosine(600, 1100) == pytest.approx(0.6) and cosine(1100, 1100) == pytest.approx(0.2)
    noam = Noam(warmup=400)
    # model_size ** -0.5 * min(n ** -0.5, n * warmup ** -1.5), divided by its peak
    for update in (1, 399, 400, 1600):
        peak = 400**-0.5
        assert noam(update, 1) == pytest.approx(min(update**-0.5, update * 400**-1.5) / peak)
    assert [Constant(warmup=0.5)(update, 4) for update in range(4)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("schedule", [TriStage(), Polynomial(), Cosine(), Noam(warmup=0.1), Constant(warmup=0.1)])
def test_any_schedule_stands_any_total(schedule):
    for total in (1, 2, 3, 7, 100, 10**9):
        values = [schedule(update, total) for update in {0, 1, total // 2, total - 1, total, total + 5}]
        assert all(0.0 <= value <= 1.0 for value in values)


def test_a_share_that_falls_on_a_whole_number_is_that_number():
    assert Polynomial(warmup=0.29)(29, 100) == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TriStage(warmup=-1), "warmup is -1, expected a share"),
        (lambda: Polynomial(warmup=1.5), "warmup is 1.5, expected a share"),
        (lambda: TriStage(warmup=0.5, hold=0.4, decay=0.3), "the shares of TriStage add up to 1.2"),
        (lambda: TriStage(final_factor=0), "final_factor is 0, expected a factor of the peak rate from above 0 to 1"),
        (lambda: Cosine(end_factor=2), "end_factor is 2, expected a factor of the peak rate from 0 to 1"),
        (lambda: Polynomial(power=0), "power is 0, expected a number greater than 0"),
        (lambda: Noam(warmup=0), "warmup of Noam is 0"),
    ],
)
def test_wrong_settings_are_said(make, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        make()
