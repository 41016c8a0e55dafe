"""Each way in which a run goes wrong is said once, in words; a healthy run hears nothing."""

import math

import pytest

from toolkit.errors import ConfigError, TrainingError
from toolkit.training.health import (
    CollapsedVariance,
    GradNormJump,
    GradNormRange,
    HealthMonitor,
    LowPerplexity,
    PerfectAccuracy,
    RepeatedValue,
    StuckAtChance,
    UndecidedQuantizer,
    data2vec_health,
    pretraining_health,
)


def rows(count, first=2000, **values):
    return [{"stage": "train", "update": first + 50 * index, **values} for index in range(count)]


def said(rule, given):
    return [sentence for sentence in map(rule.look, given) if sentence]


def test_a_code_book_of_one_entry():
    words = said(LowPerplexity(), rows(1, code_perplexity=2.0))
    assert words[0].startswith("code_perplexity is 2, and 2 is its lowest: one entry of a code book stands for")
    one = said(LowPerplexity(), rows(1, code_perplexity=90.0, code_perplexity_group0=89.0, code_perplexity_group1=1.0))
    assert one[0].startswith("code_perplexity_group1 is 1, and 1 is its lowest:")
    assert not said(LowPerplexity(), rows(3, code_perplexity=17.9))
    # An early dip is usual.
    assert not said(LowPerplexity(), rows(1, first=500, code_perplexity=2.0))


def test_a_loss_that_stands_at_chance():
    words = said(StuckAtChance(), rows(12, contrastive=math.log(101) - 0.001))
    assert len(words) == 3
    assert words[0].startswith("contrastive stands at 4.614, which is log(101), the loss of guessing, for 10 ro")
    moving = (rows(9, contrastive=4.615) + rows(1, contrastive=4.0)) * 2
    assert not said(StuckAtChance(), moving)


def test_a_value_that_repeats():
    words = said(RepeatedValue(), rows(5, loss=0.0))
    assert words == [
        "loss has been exactly 0 for 5 rows: the output no longer depends on the input; check the learning rate, the "
        "data, and whether everything is frozen."
    ]
    assert not said(RepeatedValue(), [{"update": update, "loss": 1 / update} for update in range(1, 20)])


def test_a_gradient_norm_out_of_range():
    assert "lower the learning rate" in said(GradNormRange(), rows(5, grad_norm=1e4))[0]
    assert "the gradient has died away" in said(GradNormRange(), rows(5, grad_norm=1e-19))[0]
    assert not said(GradNormRange(), rows(9, grad_norm=1.4))
    assert not said(GradNormRange(), rows(4, grad_norm=1e4) + rows(1, grad_norm=1.0) + rows(4, grad_norm=1e4))


def test_a_healthy_pretraining_hears_nothing_and_a_collapsed_one_everything():
    healthy = [
        {"update": 1000 + step, "loss": 3.0 - step / 1000, "contrastive": 2.5 - step / 1000,
         "code_perplexity": 150.0, "prob_perplexity": 180.0, "grad_norm": 1.1}
        for step in range(100)
    ]  # fmt: skip
    monitor = pretraining_health()
    assert not [sentence for row in healthy for sentence in monitor.check(row)]
    collapsed = rows(20, loss=0.1, contrastive=0.0, code_perplexity=2.0, prob_perplexity=2.0, grad_norm=1e-19)
    words = [sentence for row in collapsed for sentence in monitor.check(row)]
    assert len(words) == 4 and monitor.warnings == 4
    assert {word.split()[0] for word in words} == {"code_perplexity", "prob_perplexity", "loss", "grad_norm"}


def test_norms_of_hundreds_are_healthy_where_the_run_has_always_had_them():
    # A CTC loss is a sum over the utterance: the norm before clipping begins at thousands and stays at hundreds.
    monitor = HealthMonitor()
    losses = [20.0 - update / 10 for update in range(100)]
    healthy = [
        {"update": 20 * place, "loss": loss, "grad_norm": 3000.0 / (1 + place) + 700 + 45 * (place % 7)}
        for place, loss in enumerate(losses)
    ]
    assert not [sentence for row in healthy for sentence in monitor.check(row)]
    diverging = [{"update": 2000 + 20 * place, "loss": 9.0 + place, "grad_norm": 2e4} for place in range(5)]
    (word,) = [sentence for row in diverging for sentence in monitor.check(row)]
    assert word.startswith("grad_norm is 2e+04, more than 10 times its median so far (") and "for 5 rows" in word
    dead = [{"update": 4000 + place, "loss": 9.0 - place, "grad_norm": 1e-9} for place in range(5)]
    (word,) = [sentence for row in dead for sentence in monitor.check(row)]
    assert word.startswith("grad_norm is 1e-09, below 0.001 for 5 rows: the gradient has died away")


def test_a_norm_that_stays_higher_becomes_the_usual_one():
    rule = GradNormJump(patience=2, after_rows=3)
    norms = [1.0] * 3 + [50.0] * 10
    assert [bool(said(rule, rows(1, grad_norm=norm))) for norm in norms] == [False] * 4 + [True] * 2 + [False] * 7


def test_a_quantizer_that_decides_nothing():
    words = said(UndecidedQuantizer(num_codes=64), rows(11, prob_perplexity=127.99))
    assert len(words) == 2 and "128 is its highest, for 10 rows: the quantizer decides nothing" in words[0]
    assert not said(UndecidedQuantizer(num_codes=64), rows(20, prob_perplexity=120.0))
    assert not said(UndecidedQuantizer(num_codes=64), rows(15, first=0, prob_perplexity=128.0))
    row = rows(1, prob_perplexity=96.0)[0]
    monitor = pretraining_health(num_groups=3, num_codes=32)
    assert [len(monitor.check(row)) for _ in range(10)] == [0] * 9 + [1]


def test_targets_that_are_all_equal():
    words = said(PerfectAccuracy(), rows(3, first=40, accuracy=1.0))
    assert len(words) == 1 and words[0].startswith("accuracy is 1 for 3 rows: all targets are equal (collapse)")
    assert not said(PerfectAccuracy(), rows(9, accuracy=0.98))
    monitor = pretraining_health()
    assert sum(len(monitor.check(row)) for row in rows(3, accuracy=1.0)) == 1


def test_a_short_run_is_warned_after_its_first_fifth():
    collapsed = {"code_perplexity": 2.0, "prob_perplexity": 2.0, "total_updates": 500}
    monitor = pretraining_health()
    assert monitor.check({"update": 99, **collapsed}) == []
    assert len(monitor.check({"update": 100, **collapsed})) == 2


def test_a_warning_comes_again_after_a_while_only():
    monitor = HealthMonitor([RepeatedValue(patience=2)], repeat_rows=10)
    counts = [len(monitor.check(row)) for row in rows(25, loss=1.0)]
    assert [index for index, count in enumerate(counts) if count] == [1, 11, 21]


def test_rows_without_the_values_are_passed_over():
    assert pretraining_health().check({"update": 5000, "wer": 3.0}) == []


def test_wrong_ranges_are_refused():
    with pytest.raises(ConfigError, match="low 2 and high 1, expected 0 <= low < high"):
        GradNormRange(low=2, high=1)
    with pytest.raises(ConfigError, match="factor 1 and after_rows 20, expected a factor above 1"):
        GradNormJump(factor=1)
    with pytest.raises(ConfigError, match="patience of RepeatedValue is 1, expected 2 or more"):
        RepeatedValue(patience=1)


def test_collapsed_targets_are_said_and_then_end_the_run():
    rule = CollapsedVariance()
    low = {"target_var": 0.09, "pred_var": 0.2}
    words = said(rule, rows(1, **low))
    assert words[0].startswith("target_var is 0.09, below 0.1: the targets are nearly the same everywhere (collapse);")
    assert said(rule, rows(1, target_var=0.5, pred_var=0.009))[0].startswith("pred_var is 0.009, below 0.01: the pred")
    assert not said(rule, rows(2, target_var=0.11, pred_var=0.011)) and not said(rule, rows(1, first=900, **low))
    assert rule.look({"update": 5000, **low}) is not None
    with pytest.raises(TrainingError, match=r"after update 5001 target_var is 0\.09, below 0\.1"):
        data2vec_health().check({"update": 5001, "loss": 1.0, **low})
    # In a short run the warm-up is its first fifth.
    assert rule.look({"update": 90, "total_updates": 400, **low}) is not None
