"""The arithmetic of a step, the order of things, and evaluation, in one process."""

import functools
import json
import math
import os
import signal
from functools import partial

import pytest
import torch
from torch import nn

from toolkit.data.loader import MicroBatch
from toolkit.errors import AudioError, ConfigError, DivergenceError, ModelError, TrainingError, WorkerError
from toolkit.training.brain import Brain, Objective, RunContext, Stage
from toolkit.training.checkpoint import Checkpointer
from toolkit.training.crash import not_finite
from toolkit.training.distributed import World
from toolkit.training.limits import Interrupted, Requeue
from toolkit.training.loggers import Loggers
from toolkit.training.optim import LossScale, ParameterGroup, build_optimizer
from toolkit.training.step import UpdateStep


class Pairs(list):
    """A batch of (inputs, targets), with names."""

    def __init__(self, inputs, targets, names=None):
        super().__init__(inputs)
        self.inputs, self.targets = inputs, targets
        self.ids = names or [f"u{index}" for index in range(len(inputs))]


class ListLoader:
    """Updates given as lists of batches."""

    def __init__(self, *updates):
        self.updates = updates

    @property
    def updates_per_epoch(self):
        return len(self.updates)

    def epoch(self, epoch, first_update=0):
        for update, batches in list(enumerate(self.updates))[first_update:]:
            for micro, batch in enumerate(batches):
                yield MicroBatch(batch, epoch, update, micro, last=micro == len(batches) - 1)


class Memory:
    """Remembers rows and sentences."""

    def __init__(self):
        self.rows, self.sentences = [], []

    def log(self, row):
        self.rows.append(row)

    def say(self, sentence):
        self.sentences.append(sentence)

    def rewind(self, update):
        pass

    def close(self):
        pass


class Regression(Brain):
    """Squared error of a linear model."""

    poison = ()

    def compute_forward(self, batch, stage):
        return self.modules.model(batch.inputs)

    def compute_objectives(self, predictions, batch, stage):
        loss = (predictions - batch.targets).square().sum()
        if stage is Stage.TRAIN and self.update in self.poison:
            loss = loss * math.inf
        return Objective(loss, len(batch), {"error": ((predictions - batch.targets).abs().sum(), len(batch))})


def data(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator), torch.randn(count, 1, generator=generator)


def pairs(first, last, seed=0):
    inputs, targets = data(seed=seed)
    return Pairs(inputs[first:last], targets[first:last], [f"u{index}" for index in range(first, last)])


def make(kind=Regression, *, memory=None, folder=None, checkpointer=None, opt=None, groups=(), **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    context = RunContext(loggers=Loggers([memory] if memory else []), output_folder=folder)
    return kind(
        {"model": model},
        opt or functools.partial(torch.optim.AdamW, lr=0.01),
        run_opts={"precision": "fp32", "max_updates": 3, "ckpt_interval_minutes": None, **options},
        checkpointer=checkpointer,
        parameter_groups=groups,
        context=context,
    )


def weights_of(brain):
    return torch.cat([parameter.detach().reshape(-1) for parameter in brain.modules.parameters()])


def plain_steps(updates, *, lr=0.01, max_norm=None):
    """The same by the textbook: mean over all targets of an update, clipping by torch, AdamW without fusing."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, foreach=False)
    norms = []
    for batches in updates:
        inputs = torch.cat([batch.inputs for batch in batches])
        targets = torch.cat([batch.targets for batch in batches])
        optimizer.zero_grad()
        ((model(inputs) - targets).square().sum() / len(inputs)).backward()
        limit = math.inf if max_norm is None else max_norm
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]), norms


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("fused", [True, False])
def test_uneven_micro_batches_give_the_mean_over_all_targets(max_norm, fused):
    updates = [[pairs(0, 5), pairs(5, 6)], [pairs(6, 10), None, pairs(10, 12)], [pairs(3, 4)]]
    opt = functools.partial(torch.optim.AdamW, lr=0.01, **({} if fused else {"foreach": False}))
    memory = Memory()
    brain = make(memory=memory, opt=opt, max_grad_norm=max_norm, log_interval=1)
    brain.fit(ListLoader(*updates))
    expected, norms = plain_steps([[b for b in batches if b is not None] for batches in updates], max_norm=max_norm)
    assert torch.allclose(weights_of(brain), expected, atol=1e-6)
    assert [row["grad_norm"] for row in memory.rows] == pytest.approx(norms, rel=1e-5)


def test_the_last_incomplete_group_of_an_epoch_counts():
    memory = Memory()
    brain = make(memory=memory, max_updates=4, log_interval=1)
    brain.fit(ListLoader([pairs(0, 4), pairs(4, 8)], [pairs(8, 9)]))
    assert brain.update == 4 and brain.epoch == 2
    assert [row["audio_seconds"] for row in memory.rows] == [8, 9, 17, 18]


def test_a_plain_mean_loss_is_weighted_by_the_batch_and_said_once():
    class Mean(Regression):
        def compute_objectives(self, predictions, batch, stage):
            return (predictions - batch.targets).square().mean()

    memory = Memory()
    updates = [[pairs(0, 5), pairs(5, 6)], [pairs(6, 10)], [pairs(3, 4)]]
    brain = make(Mean, memory=memory)
    brain.fit(ListLoader(*updates))
    assert torch.allclose(weights_of(brain), plain_steps(updates)[0], atol=1e-6)
    assert sum("returned a mean loss" in sentence for sentence in memory.sentences) == 1


def test_an_objective_of_a_wrong_kind_is_refused():
    class Wrong(Regression):
        def compute_objectives(self, predictions, batch, stage):
            return predictions

    with pytest.raises(ModelError, match="of Wrong returned Tensor, expected an Objective or a scalar tensor"):
        make(Wrong).fit(ListLoader([pairs(0, 4)]))


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_that_is_not_finite_changes_nothing(fused, tmp_path):
    class Poisoned(Regression):
        poison = (1,)

        def on_update_end(self, result):
            state = [value.clone() for entry in self.optimizer.state.values() for value in entry.values()]
            kept.append((weights_of(self), torch.cat([value.reshape(-1) for value in state])))

    kept, memory = [], Memory()
    opt = functools.partial(torch.optim.AdamW, lr=0.01, **({} if fused else {"foreach": False}))
    brain = make(Poisoned, memory=memory, folder=tmp_path, opt=opt)
    brain.fit(ListLoader([pairs(0, 4)], [pairs(4, 6), pairs(6, 8)], [pairs(8, 12)]))
    assert torch.equal(kept[0][0], kept[1][0]) and torch.equal(kept[0][1], kept[1][1])
    assert not torch.equal(kept[1][0], kept[2][0])
    told = [sentence for sentence in memory.sentences if "not finite" in sentence]
    assert told == [
        "update 1: the loss is not finite with the utterances u4, u5, u6, u7; nothing was changed (1 in a row, the run "
        "ends after 10)."
    ]
    # What could not be averaged is left out of the averages, and the skipped update is counted.
    assert math.isfinite(memory.rows[-1]["loss"]) and memory.rows[-1]["skipped_updates"] == 1
    assert not (tmp_path / "crash_report.json").exists()


def test_only_the_faulty_micro_batch_is_named():
    class Half(Regression):
        def compute_objectives(self, predictions, batch, stage):
            objective = super().compute_objectives(predictions, batch, stage)
            return Objective(objective.loss_sum * (math.nan if "u6" in batch.ids else 1.0), len(batch))

    memory = Memory()
    make(Half, memory=memory, max_updates=1).fit(ListLoader([pairs(4, 6), pairs(6, 8)]))
    assert "with the utterances u6, u7;" in next(s for s in memory.sentences if "not finite" in s)


def test_the_patience_starts_again_after_a_good_update(tmp_path):
    class Poisoned(Regression):
        poison = (0, 1, 3, 4)

    batches = [[pairs(0, 4)]] * 5
    make(Poisoned, folder=tmp_path, nonfinite_patience=3, max_updates=5).fit(ListLoader(*batches))
    with pytest.raises(TrainingError, match=r"the 2nd such update in a row \(nonfinite_patience is 2\)"):
        make(Poisoned, folder=tmp_path, nonfinite_patience=2, max_updates=5).fit(ListLoader(*batches))


def test_a_parameter_without_gradient_stays_as_it_is():
    class Side(Regression):
        def compute_forward(self, batch, stage):
            return self.modules.model(batch.inputs) if self.update == 0 else self.modules.model[:1](batch.inputs)[:, :1]

    brain = make(Side, max_updates=1)
    brain.fit(ListLoader([pairs(0, 4)]))
    before = brain.modules.model[2].weight.clone()
    again = make(Side, max_updates=2)
    again.fit(ListLoader([pairs(0, 4)], [pairs(4, 8)]))
    assert torch.equal(again.modules.model[2].weight, before)


def test_clipping_takes_the_norm_over_all_groups():
    groups = [ParameterGroup(match="*", vectors_only=True, weight_decay=0.0)]
    opt = functools.partial(torch.optim.SGD, lr=1.0)
    brain = make(opt=opt, groups=groups, max_grad_norm=0.01, max_updates=1)
    before = weights_of(brain)
    brain.fit(ListLoader([pairs(0, 12)]))
    assert float((weights_of(brain) - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_groups_freeze_and_thaw_at_their_update():
    class Watched(Regression):
        def on_update_end(self, result):
            seen.append(self.modules.model[0].weight.detach().clone())

    seen = []
    brain = make(Watched, groups=[ParameterGroup(match="model.0", freeze_updates=2, lr_factor=0.5)], max_updates=4)
    start = brain.modules.model[0].weight.detach().clone()
    brain.fit(ListLoader(*[[pairs(0, 4)]] * 4))
    assert torch.equal(seen[0], start) and torch.equal(seen[1], start)
    assert not torch.equal(seen[2], start) and not torch.equal(seen[3], seen[2])


def test_fp16_overflow_halves_the_scale_and_is_no_fault():
    scale = LossScale(torch.device("cpu"), initial=2.0**60, maximum=2.0**60, window=2)
    model = nn.Linear(3, 1)
    optimizer = build_optimizer(model, functools.partial(torch.optim.AdamW, lr=0.01))
    step = UpdateStep(optimizer, World(), max_grad_norm=1.0, loss_scale=scale)
    outcomes = []
    for update in range(20):
        before = model.weight.detach().clone()
        loss = model(torch.ones(2, 3)).square().sum() * 100
        step.backward(loss)
        finished = step.finish(update, loss.detach(), torch.tensor(2.0))
        outcomes.append((bool(finished.result.skipped), bool(finished.result.faulty)))
        assert torch.equal(before, model.weight) == outcomes[-1][0]
    skipped = [skip for skip, _ in outcomes]
    assert skipped[0] and not any(faulty for _, faulty in outcomes)
    # It comes down, finds its height, and then tries the next height after every second good update.
    assert skipped[-6:].count(True) == 2 and float(scale.value) < 2.0**58


def test_a_scaled_gradient_is_the_same_as_a_plain_one():
    results = []
    for scale in (None, LossScale(torch.device("cpu"), initial=1024.0)):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        step = UpdateStep(
            build_optimizer(model, functools.partial(torch.optim.AdamW, lr=0.01)), World(), loss_scale=scale
        )
        for update in range(3):
            loss = (model(torch.ones(2, 3)) - 3).square().sum()
            step.backward(loss)
            norm = step.finish(update, loss.detach(), torch.tensor(2.0)).result.grad_norm
        results.append((model.weight.detach(), norm))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-7) and torch.allclose(results[0][1], results[1][1])


def test_bf16_runs_under_autocast_and_keeps_float32_weights():
    class Checked(Regression):
        def compute_forward(self, batch, stage):
            predictions = super().compute_forward(batch, stage)
            dtypes.add((stage, predictions.dtype))
            return predictions.float()

    dtypes = set()
    brain = make(Checked, precision="bf16")
    brain.fit(ListLoader([pairs(0, 4)]), ListLoader([pairs(4, 8)]))
    assert dtypes == {(Stage.TRAIN, torch.bfloat16), (Stage.VALID, torch.bfloat16)}
    assert all(parameter.dtype == torch.float32 for parameter in brain.modules.parameters())


def test_evaluation_averages_over_items_and_keeps_rows_in_order():
    class Recorder(Regression):
        def compute_objectives(self, predictions, batch, stage):
            assert self.rng is None and not torch.is_grad_enabled() and not self.modules.training
            draws.append(float(self.eval_rng().numpy("mask").random()))
            for name in batch.ids:
                self.record({"id": name})
            return super().compute_objectives(predictions, batch, stage)

    draws = []
    brain = make(Recorder)
    loader = ListLoader([pairs(0, 7)], [pairs(7, 8)], [None])
    result = brain.evaluate(loader)
    inputs, targets = data()
    with torch.no_grad():
        expected = (brain.modules.model(inputs[:8]) - targets[:8]).square().mean()
    assert result.metrics["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert [row["id"] for row in result.rows] == [f"u{index}" for index in range(8)]
    assert brain.evaluate(loader).metrics == result.metrics
    assert draws[:2] == draws[2:] and draws[0] != draws[1]


def test_hooks_come_in_order_and_validation_is_tried_first():
    class Told(Regression):
        def on_fit_start(self):
            calls.append("fit")

        def on_stage_start(self, stage, epoch):
            calls.append(f"{stage.value} {epoch} starts")

        def on_stage_end(self, stage, metrics, epoch):
            calls.append(f"{stage.value} {epoch} ends")
            return {"halved": metrics["loss"] / 2}

        def evaluate_batch(self, batch, stage):
            calls.append("batch")
            return super().evaluate_batch(batch, stage)

    calls, memory = [], Memory()
    brain = make(Told, memory=memory, max_updates=3)
    brain.fit(ListLoader([pairs(0, 4)], [pairs(4, 8)]), ListLoader([pairs(8, 10)], [pairs(10, 12)]))
    valid = ["valid {0} starts", "batch", "batch", "valid {0} ends"]
    assert calls == [
        "fit",
        "batch",  # the sanity validation: one batch, no hooks
        *["train 0 starts", "train 0 ends", *(line.format(0) for line in valid)],
        *["train 1 starts", "train 1 ends", *(line.format(1) for line in valid)],
    ]
    row = next(row for row in memory.rows if row["stage"] == "valid")
    assert row["halved"] == pytest.approx(row["loss"] / 2) and row["update"] == 2


def test_a_validation_does_not_change_the_training():
    torch.manual_seed(99)
    alone = make(max_updates=4)
    alone.fit(ListLoader([pairs(0, 4)], [pairs(4, 8)]))
    watched = make(max_updates=4, valid_interval_updates=1)
    watched.fit(ListLoader([pairs(0, 4)], [pairs(4, 8)]), ListLoader([pairs(8, 12)]))
    assert torch.equal(weights_of(alone), weights_of(watched))


def test_warnings_about_health_are_said():
    class Stuck(Regression):
        def compute_objectives(self, predictions, batch, stage):
            objective = super().compute_objectives(predictions, batch, stage)
            return Objective(objective.loss_sum * 0 + 2.0, 1)

    memory = Memory()
    make(Stuck, memory=memory, max_updates=6, log_interval=1).fit(ListLoader([pairs(0, 4)]))
    assert any(sentence.startswith("warning: loss has been exactly 2 for 5 rows") for sentence in memory.sentences)


def test_a_new_learning_rate_counts_after_a_resume(tmp_path):
    def run(rate, updates):
        opt = functools.partial(torch.optim.AdamW, lr=rate)
        brain = make(checkpointer=Checkpointer(tmp_path), opt=opt, max_updates=updates)
        brain.fit(ListLoader([pairs(0, 4)]))
        return brain

    run(0.01, 2)
    brain = run(0.5, 3)
    assert brain.update == 3 and brain.optimizer.param_groups[0]["lr"] == 0.5


def test_the_best_and_the_average_weights_can_be_evaluated(tmp_path):
    class Watched(Regression):
        def on_update_end(self, result):
            seen.append(weights_of(self))

    seen = []
    checkpointer = Checkpointer(tmp_path, keep_last=2, keep_best=1, best_metric="loss")
    brain = make(Watched, checkpointer=checkpointer, max_updates=4, valid_interval_updates=1, opt=_rising_sgd)
    brain.fit(ListLoader([pairs(0, 4)]), ListLoader([pairs(0, 4)]))
    best = brain.progress.best["update"]
    assert brain.saver.weights_update is None
    assert brain.saver.load_weights("best") and torch.equal(weights_of(brain), seen[best - 1])
    assert (brain.saver.weights_update, brain.update) == (best, 4)
    assert brain.saver.load_weights("average")
    assert torch.allclose(weights_of(brain), (seen[2] + seen[3]) / 2, atol=1e-7)
    assert brain.saver.load_weights("last") and torch.equal(weights_of(brain), seen[3])
    with pytest.raises(ConfigError, match="the weights to evaluate are 'newest', expected one of best, last, average"):
        brain.saver.load_weights("newest")


def test_of_equally_good_validations_the_summary_names_the_one_that_is_loaded(tmp_path):
    still = functools.partial(torch.optim.SGD, lr=0.0)
    checkpointer = Checkpointer(tmp_path, keep_last=3, keep_best=1, best_metric="loss")
    brain = make(checkpointer=checkpointer, max_updates=3, valid_interval_updates=1, opt=still)
    brain.fit(ListLoader([pairs(0, 4)]), ListLoader([pairs(0, 4)]))
    assert brain.saver.load_weights("best")
    assert brain.progress.best["update"] == 3 == int(checkpointer.find_best().name.removeprefix("step_"))


def _rising_sgd(parameters, fused=False):
    """So large a rate that the second validation is worse than the first."""
    return torch.optim.SGD(parameters, lr=0.8)


def test_a_run_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="neither max_updates nor max_minutes is set; give one, so that"):
        make(max_updates=None).fit(ListLoader([pairs(0, 4)]))


# ---- what ends a run must not cost what was trained ------------------------------------------------------------------


class ClosableLoader(ListLoader):
    """Counts how often its workers were ended; gives up before one of its updates, where one is named."""

    def __init__(self, *updates, error=None, at=None):
        super().__init__(*updates)
        self.error, self.at, self.closed = error, at, 0

    def epoch(self, epoch, first_update=0):
        for micro in super().epoch(epoch, first_update):
            if self.error is not None and micro.update == self.at:
                raise self.error
            yield micro

    def close(self):
        self.closed += 1


def saved_updates(folder):
    return [int(path.name.removeprefix("step_")) for path in sorted(folder.glob("step_*"))]


@pytest.fixture(autouse=True)
def terminal():
    """Ctrl-C as at a terminal: a shell that runs the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(*, update, stage=Stage.TRAIN, times=1, number=signal.SIGINT):
    """A Regression that sends itself signals in the forward pass of an update, or of a validation after it."""

    class Interrupting(Regression):
        def compute_forward(self, batch, now):
            if self.update == update and now is stage:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return super().compute_forward(batch, now)

    return Interrupting


def test_the_first_interrupt_saves_after_the_update_and_the_second_ends_at_once(tmp_path, capfd):
    loader = ListLoader(*[[pairs(0, 4)]] * 5)
    before = signal.getsignal(signal.SIGINT)
    memory = Memory()
    brain = make(interrupting(update=2), memory=memory, checkpointer=Checkpointer(tmp_path), max_updates=5)
    with pytest.raises(Interrupted) as caught:
        brain.fit(loader)
    assert caught.value.code == 130 and saved_updates(tmp_path) == [3] and brain.update == 3
    told = f"interrupted: saved at update 3 in {tmp_path}; run the same command again to go on."
    assert memory.sentences[-1] == told
    assert "interrupted: saving at the end of this update; Ctrl-C again ends at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    brain = make(interrupting(update=4, times=2), checkpointer=Checkpointer(tmp_path), max_updates=5)
    with pytest.raises(KeyboardInterrupt):
        brain.fit(loader)
    assert saved_updates(tmp_path) == [3] and signal.getsignal(signal.SIGINT) is before


def test_a_brain_without_checkpointer_promises_nothing():
    memory = Memory()
    with pytest.raises(Interrupted):
        make(interrupting(update=1), memory=memory, max_updates=5).fit(ListLoader([pairs(0, 4)]))
    assert memory.sentences[-1] == "interrupted at update 2; nothing is saved, as this Brain has no checkpointer."


def test_an_interrupt_at_the_very_end_begins_no_tests(tmp_path):
    class Late(Regression):
        def on_stage_end(self, stage, metrics, epoch):
            if stage is Stage.VALID and not told:
                told.append(self.update)
                os.kill(os.getpid(), signal.SIGINT)

    told: list[int] = []
    brain = make(Late, checkpointer=Checkpointer(tmp_path))
    with pytest.raises(Interrupted):
        brain.fit(ListLoader(*[[pairs(0, 4)]] * 3), ListLoader([pairs(8, 10)]))
    assert saved_updates(tmp_path) == [3]
    # Whoever goes on all the same is not stopped by what was said to the training.
    assert brain.evaluate(ListLoader([pairs(8, 10)]), stage=Stage.VALID).metrics["loss"] > 0


def test_an_interrupt_that_the_shell_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        brain = make(interrupting(update=1), checkpointer=Checkpointer(tmp_path))
        brain.fit(ListLoader([pairs(0, 4)]))
        assert brain.update == 3
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("update", [2, 4])
def test_a_stop_breaks_a_validation_off_and_the_next_session_makes_up_for_it(tmp_path, number, update):
    train = ListLoader(*[[pairs(0, 4)]] * 4)

    def run(kind):
        memory = Memory()
        valid = ClosableLoader([pairs(8, 10)], [pairs(10, 12)])
        brain = make(
            kind, memory=memory, checkpointer=Checkpointer(tmp_path), max_updates=4, valid_interval_updates=2
        )
        brain.fit(train, valid)
        return brain, [row for row in memory.rows if row["stage"] == "valid"]

    with pytest.raises(SystemExit) as caught:
        run(interrupting(update=update, stage=Stage.VALID, number=number))
    assert caught.value.code == (130 if number == signal.SIGINT else 75)
    assert saved_updates(tmp_path)[-1] == update
    brain, rows = run(Regression)
    assert brain.update == 4 and [row["update"] for row in rows] == list(range(update, 5, 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_breaks_a_test_off_after_its_batch(number):
    memory, before = Memory(), signal.getsignal(signal.SIGTERM)
    brain = make(interrupting(update=0, stage=Stage.TEST, number=number), memory=memory)
    test = ClosableLoader([pairs(8, 10)], [pairs(10, 12)])
    with pytest.raises(Requeue) as caught:
        brain.evaluate(test)
    assert caught.value.code == 75 and test.closed == 1
    assert memory.sentences == ["told to stop in the test set; run the same command again to evaluate it anew."]
    assert signal.getsignal(signal.SIGTERM) is before
    # Ctrl-C ends a test at once: there is nothing to save.
    with pytest.raises(KeyboardInterrupt):
        make(interrupting(update=0, stage=Stage.TEST)).evaluate(test)


@pytest.mark.parametrize(
    "error", [AudioError("too much bad audio"), TrainingError("a loader worker was killed"), MemoryError("no more")]
)
def test_an_error_of_the_training_data_saves_the_updates_before_it(tmp_path, error):
    loader = ClosableLoader(*[[pairs(0, 4), pairs(4, 6)]] * 5, error=error, at=2)
    brain = make(checkpointer=Checkpointer(tmp_path), max_updates=5)
    # memory is told with advice
    with pytest.raises(TrainingError if isinstance(error, MemoryError) else type(error), match=str(error)):
        brain.fit(loader)
    assert saved_updates(tmp_path) == [2]
    loader.error = None
    resumed = make(checkpointer=Checkpointer(tmp_path), max_updates=5)
    resumed.fit(loader)
    whole = make(max_updates=5)
    whole.fit(loader)
    assert torch.equal(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize("how", ["stop", "stop in the last", "error"])
def test_a_checkpoint_in_the_middle_of_an_update_is_told_before(tmp_path, how):
    """So that what a forward pass changed can be undone first; a finished update is not given up."""
    told = []

    class Told(Regression):
        def compute_forward(self, batch, now):
            if how.startswith("stop") and (self.update, self.rng.keys[-1]) == (2, int(how != "stop")):
                os.kill(os.getpid(), signal.SIGTERM)
            if (self.update, self.rng.keys[-1]) == (2, 1) and how == "error":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().compute_forward(batch, now)

        def on_update_given_up(self):
            told.append((self.update, saved_updates(tmp_path)))

    loader = ListLoader(*[[pairs(0, 4), pairs(4, 6)]] * 5)
    with pytest.raises((SystemExit, TrainingError)):
        make(Told, checkpointer=Checkpointer(tmp_path), max_updates=5).fit(loader)
    finished = how == "stop in the last"
    assert told == ([] if finished else [(2, [])]) and saved_updates(tmp_path) == [3 if finished else 2]


def test_an_error_before_the_first_update_saves_nothing(tmp_path):
    loader = ClosableLoader([pairs(0, 4)], error=AudioError("too much"), at=0)
    with pytest.raises(AudioError):
        make(checkpointer=Checkpointer(tmp_path)).fit(loader)
    assert saved_updates(tmp_path) == []


def test_a_worker_that_dies_before_the_first_update_is_reported_with_its_place(tmp_path):
    """A mistake of the user's (bad audio) is told by its sentence alone."""
    for error, reported in ((WorkerError("a loader worker was killed"), True), (AudioError("too much"), False)):
        folder = tmp_path / type(error).__name__
        folder.mkdir()
        loader = ClosableLoader([pairs(0, 4)], error=error, at=0)
        with pytest.raises(type(error)):
            make(checkpointer=Checkpointer(folder / "save"), folder=folder).fit(loader)
        assert (folder / "crash_report.json").exists() == reported


class Broken(Regression):
    """With the defect of a recipe in ``place`` at update 2."""

    def __init__(self, *args, place, **options):
        super().__init__(*args, **options)
        self.place = place

    def compute_forward(self, batch, stage):
        self.fails("forward" if stage is Stage.TRAIN else "validation")
        return super().compute_forward(batch, stage)

    def on_stage_start(self, stage, epoch):
        if stage is Stage.VALID:
            self.fails("hook")

    def on_update_end(self, result):
        self.fails("update")

    def fails(self, place):
        if self.place == place and self.update == 2:
            raise KeyError("a defect")


@pytest.mark.parametrize("place", ["forward", "validation", "hook"])
def test_a_defect_anywhere_saves_the_updates_before_it_and_tells_the_batch(tmp_path, place):
    memory, loader = Memory(), ListLoader(*[[pairs(0, 4)]] * 5)

    def run(place):
        kind = partial(Broken, place=place)
        save = Checkpointer(tmp_path / "save")
        # the validation at update 2 would save before
        every = {"max_updates": 4, "valid_interval_updates": 100 if place == "forward" else 2}
        made = make(kind, memory=memory, folder=tmp_path, checkpointer=save, **every)
        made.fit(loader, ListLoader([pairs(8, 10)]))
        return made

    with pytest.raises(KeyError, match="a defect"):
        run(place)
    assert saved_updates(tmp_path / "save") == [2]
    report = json.loads((tmp_path / "crash_report.json").read_text())
    assert report["error"] == "KeyError: 'a defect'" and report["update"] == 2
    assert report["outcome"] == "saved at update 2; run the same command again to go on from there"
    assert any("self.fails" in line for line in report["failures"][0]["trace"])
    ids = {"forward": ["u0", "u1", "u2", "u3"], "validation": ["u8", "u9"], "hook": []}[place]
    assert report["utterances"] == ids and bool(report["batch"]) == bool(ids)
    count = len(ids)
    named = f" with a batch of {count} utterances (inputs {count} x 3, targets {count} x 1; {', '.join(ids)})"
    with_batch = named if ids else ""
    assert memory.sentences[-1].startswith(f"update 2 broke off{with_batch}")
    assert memory.sentences[-1].endswith(
        f": KeyError; saved at update 2; run the same command again to go on from there; all of it is in "
        f"{tmp_path / 'crash_report.json'}."
    )
    (tmp_path / "crash_report.rank1.json").write_text("{}")  # as of a rank that alone could not go on
    whole = make(max_updates=4)
    whole.fit(loader)
    assert torch.equal(weights_of(run(None)), weights_of(whole))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["save"]  # nothing is left to be told
    said = "training is complete; removed of an earlier start: crash_report.json, crash_report.rank1.json."
    assert memory.sentences[-1] == said
    run(None)
    assert memory.sentences.count(said) == 1


@pytest.mark.parametrize("place", ["update", "forward"])
def test_a_state_that_is_not_whole_or_not_finite_is_not_saved(tmp_path, place):
    class Spoiling(Broken):
        def compute_forward(self, batch, stage):
            if self.update == 2:
                self.modules.model[0].weight.data[0, 1] = math.inf
            return super().compute_forward(batch, stage)

    memory = Memory()
    brain = make(partial(Spoiling, place=place), memory=memory, checkpointer=Checkpointer(tmp_path), max_updates=4)
    with pytest.raises(KeyError):
        brain.fit(ListLoader(*[[pairs(0, 4)]] * 5))
    assert saved_updates(tmp_path) == []
    reason = {
        "update": "no checkpoint could be made, as the weights were being changed; there is no earlier checkpoint.",
        "forward": "no checkpoint is made, as model.0.weight is not finite; there is no earlier checkpoint.",
    }[place]
    assert memory.sentences[-1].endswith(reason)


def test_a_training_that_went_wrong_is_not_saved(tmp_path):
    class Poisoned(Regression):
        poison = range(2, 9)

    memory = Memory()
    brain = make(Poisoned, memory=memory, checkpointer=Checkpointer(tmp_path), max_updates=9, nonfinite_patience=2)
    with pytest.raises(DivergenceError, match="the 2nd such update in a row"):
        brain.fit(ListLoader(*[[pairs(0, 4)]] * 9))
    assert saved_updates(tmp_path) == []
    assert "no checkpoint is made of a training that went wrong; there is no earlier" in memory.sentences[-1]


@pytest.mark.parametrize("what", ["weight", "optimizer", "buffer"])
def test_what_is_not_finite_is_named(what):
    brain = make(max_updates=2)
    brain.fit(ListLoader([pairs(0, 4)]))
    model, optimizer = brain.modules.model[0], brain.optimizer
    assert not_finite(brain.modules, optimizer) is None
    if what == "weight":
        model.weight.data[0, 1] = math.inf
    elif what == "optimizer":
        optimizer.state[model.weight]["exp_avg"][0, 1] = math.nan
    else:
        model.register_buffer("mask", torch.tensor(-math.inf))
        assert not_finite(brain.modules, optimizer) is None, "an infinity may be meant"
        model.register_buffer("running", torch.tensor(math.nan))
    expected = {
        "weight": "model.0.weight",
        "optimizer": "the optimizer's exp_avg of model.0.weight",
        "buffer": "model.0.running",
    }
    assert not_finite(brain.modules, optimizer) == expected[what]


@pytest.mark.parametrize("stage", [Stage.TRAIN, Stage.VALID])
def test_memory_that_runs_out_does_not_cost_what_was_trained(tmp_path, stage):
    class Large(Regression):
        def compute_forward(self, batch, now):
            if now is stage and self.update == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().compute_forward(batch, now)

    # In training nothing else is due then that would save.
    interval = 2 if stage is Stage.VALID else 100
    brain = make(Large, checkpointer=Checkpointer(tmp_path), valid_interval_updates=interval)
    words = r"^memory ran out at a batch of \d utterances \(inputs \d x 3, .*CUDA out of"
    with pytest.raises(TrainingError, match=words):
        brain.fit(ListLoader([pairs(0, 4)]), ListLoader([pairs(8, 10)]))
    assert saved_updates(tmp_path) == [2]


def test_workers_of_the_first_look_at_the_validation_are_ended():
    class Watched(Regression):
        def on_stage_start(self, stage, epoch):
            closed.append(valid.closed)

    closed, valid = [], ClosableLoader([pairs(8, 10)], [pairs(10, 12)])
    make(Watched, max_updates=1).fit(ListLoader([pairs(0, 4)]), valid)
    assert closed[0] == 1, "idle workers would stay until the first validation"


@pytest.mark.parametrize("resumed", [False, True])
def test_what_a_checkpoint_holds_already_is_not_saved_again(tmp_path, resumed):
    memory, loader, reached = Memory(), ListLoader(*[[pairs(0, 4)]] * 5), tmp_path / "save"
    if resumed:
        make(checkpointer=Checkpointer(reached), max_updates=2).fit(loader)
    kind = partial(Broken, place="forward")
    interval = None if resumed else 2
    brain = make(kind, memory=memory, checkpointer=Checkpointer(reached), max_updates=4, ckpt_interval_updates=interval)
    with pytest.raises(KeyError, match="a defect"):
        brain.fit(loader)
    assert saved_updates(reached) == [2]
    assert memory.sentences[-1].endswith("; the checkpoint of update 2 counts, nothing was trained after it.")
