"""Brain: the loop around a recipe's two methods, one optimizer update at a time."""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from toolkit.data.units import SECONDS, TOKENS, Unit
from toolkit.errors import ConfigError, TrainingError, is_out_of_memory
from toolkit.seeds import Randomness
from toolkit.training.checkpoint import Checkpointer
from toolkit.training.compilation import compile_as_told
from toolkit.training.context import MicroBatches, RunContext
from toolkit.training.crash import CurrentWork, remove_reports, save_and_report
from toolkit.training.device_probe import FUSED_OPTIMIZER
from toolkit.training.evaluation import Rows, run_set
from toolkit.training.guard import NonFiniteGuard
from toolkit.training.health import HealthMonitor
from toolkit.training.limits import (
    EvaluationStopped,
    Interrupted,
    Requeue,
    RunLength,
    StopSignal,
    half_way,
    shortened,
)
from toolkit.training.objective import Objective, Stage, StageResult, as_objective, batch_on_device
from toolkit.training.optim import LossScale, ParameterGroup, build_optimizer, set_frozen, set_learning_rates
from toolkit.training.options import RunOptions
from toolkit.training.parallel import Parallel, Replicas, make_parallel, share_weights
from toolkit.training.profiling import UpdateProfiler
from toolkit.training.progress import Progress
from toolkit.training.saving import Saver
from toolkit.training.schedules import Constant, Schedule
from toolkit.training.step import StepResult, UpdateGivenUp, UpdateStep
from toolkit.training.streams import close, timed
from toolkit.training.summary import describe_modules
from toolkit.training.update_sums import UpdateSums

__all__ = ["Brain", "MicroBatches", "Objective", "RunContext", "Stage", "StageResult"]


class Brain:
    """Trains and evaluates modules; a recipe says how a batch goes forward and what its objective is.

    Override ``compute_forward`` and ``compute_objectives``, and any hook (``on_...``).

    Arguments
    ---------
    modules : name to module; then ``self.modules.name``, on the device.
    opt_class : an optimizer class or partial; None for a Brain that only evaluates.
    hparams : the loaded YAML; then ``self.hparams.key``.
    run_opts : how to run: `RunOptions`, or a dict of some of them.
    checkpointer : None = nothing is saved and nothing resumed.
    schedule : (update, total_updates) -> factor of the optimizer's learning rate.
    parameter_groups : settings by parameter name, see `ParameterGroup`.
    health : looks at every row of the log and warns; None = the usual rules.
    context : device, ranks, loggers, folder; None = this process on the CPU, silent.
    sample_rate : Hz, to count seconds of audio.
    unit : what batches are measured in: seconds of audio or, for batches with ``tokens`` and ``lengths``, tokens.

    Raises
    ------
    ConfigError : options that do not fit together.

    Example
    -------
    >>> class Regression(Brain):
    ...     def compute_forward(self, batch, stage):
    ...         return self.modules.model(batch[0])
    ...
    ...     def compute_objectives(self, predictions, batch, stage):
    ...         return Objective((predictions - batch[1]).square().sum(), count=len(batch[1]))
    >>> data = (torch.ones(4, 2), torch.ones(4, 1))
    >>> micro = SimpleNamespace(batch=data, epoch=0, update=0, micro=0, last=True, bad=())
    >>> loader = SimpleNamespace(updates_per_epoch=1, epoch=lambda epoch, first_update=0: iter([micro]))
    >>> brain = Regression({"model": nn.Linear(2, 1)}, torch.optim.AdamW, run_opts={"max_updates": 3})
    >>> brain.fit(loader)
    >>> brain.update
    3
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        opt_class: Callable[..., torch.optim.Optimizer] | None = None,
        hparams: Mapping[str, Any] | None = None,
        run_opts: RunOptions | Mapping[str, Any] | None = None,
        checkpointer: Checkpointer | None = None,
        *,
        schedule: Schedule | None = None,
        parameter_groups: Sequence[ParameterGroup] = (),
        health: HealthMonitor | None = None,
        context: RunContext | None = None,
        sample_rate: int = 16000,
        unit: Unit = SECONDS,
    ) -> None:
        options = run_opts if isinstance(run_opts, RunOptions) else RunOptions.from_values(run_opts or {})
        self.options = shortened(options) if options.debug else options
        self.context = context or RunContext()
        self.world, self.loggers, self.device_row = self.context.world, self.context.loggers, self.context.device
        self.device: torch.device = self.device_row.torch_device
        self.precision = self.device_row.resolve_precision(self.options.precision)
        self.modules = nn.ModuleDict(modules).to(self.device)
        self.hparams = SimpleNamespace(**(hparams or {}))
        self.opt_class, self.sample_rate, self.unit = opt_class, sample_rate, unit
        self.schedule: Schedule = schedule or Constant()
        self.parameter_groups = tuple(parameter_groups)
        self.health = health or HealthMonitor()
        self.optimizer: torch.optim.Optimizer | None = None
        self.loss_scale: LossScale | None = None
        self.progress = Progress(RunLength(self.options.max_updates, self.options.max_minutes), self.world, unit)
        self.saver = Saver(checkpointer, self.options, self.modules, self.progress, self.say)
        self.rng: Randomness | None = None
        self.batch_index = 0
        folder, patience = self.context.output_folder, self.options.nonfinite_patience
        self._guard = NonFiniteGuard(self.world, patience=patience, folder=folder, say=self.say)
        self._profiler = UpdateProfiler(
            folder if self.options.profile and self.world.is_main else None,
            synchronize=self.device_row.synchronize,
            on_device=self.device_row.type != "cpu",
            say=self.say,
        )
        self._learning_rate = 0.0
        self._recorded: Rows = []
        self._say_once = functools.cache(self.say)  # the first time: later ones find it in the cache
        self._work = CurrentWork(self.world, self.progress)
        self._parallel: Parallel = Replicas(self.world)
        self._stop, self._interrupted = StopSignal(), False
        self._sums = UpdateSums(self.device)

    @property
    def update(self) -> int:
        """Optimizer updates that are complete: in TRAIN, the index (from 0) of the one being made."""
        return self.progress.update

    @property
    def epoch(self) -> int:
        """Epochs that are complete: in TRAIN, the index (from 0) of the one going on."""
        return self.progress.epoch

    # ---- what a recipe overrides -------------------------------------------------------------------------------------

    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        """From a batch (on the device) to predictions. ``self.rng`` is None in VALID and TEST."""
        raise NotImplementedError(f"{type(self).__name__} has to say how a batch goes forward: compute_forward.")

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Objective | Tensor:
        """From predictions to an `Objective`. A plain mean loss () is taken too and weighted by the batch's size."""
        raise NotImplementedError(f"{type(self).__name__} has to say what is minimized: compute_objectives.")

    def on_fit_start(self) -> None:
        """After the optimizer is built and the last checkpoint loaded, before the first update."""

    def on_stage_start(self, stage: Stage, epoch: int) -> None:
        """Before an epoch of training, a validation, a test. ``epoch`` counts from 0."""

    def on_stage_end(self, stage: Stage, metrics: dict[str, float], epoch: int) -> Mapping[str, float] | None:
        """After it, with the averages; what it returns is logged (and can be the best metric) beside them."""

    def on_update_end(self, result: StepResult) -> None:
        """After each optimizer update; the values of ``result`` are tensors on the device."""

    def on_update_given_up(self) -> None:
        """Before a checkpoint in the middle of an update, which the next session makes from its beginning: undo what
        ``compute_forward`` changed since the last update, if it changes anything."""

    def init_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over ``self.modules``."""
        if self.opt_class is None:
            raise ConfigError("opt_class is missing; a Brain that trains needs one, such as torch.optim.AdamW.")
        fused = not self.device_row.on_host(FUSED_OPTIMIZER)
        return build_optimizer(self.modules, self.opt_class, self.parameter_groups, fused=fused)

    def batch_amount(self, batch: Any) -> tuple[float, float]:
        """What is in a batch on the host without padding and with it: seconds of audio, tokens, or else items."""
        if self.unit is TOKENS:
            return float(batch.lengths.sum()), float(batch.tokens.numel())
        if hasattr(batch, "waveforms") and hasattr(batch, "lengths"):
            return int(batch.lengths.sum()) / self.sample_rate, batch.waveforms.numel() / self.sample_rate
        return float(len(batch)), float(len(batch))

    # ---- what a recipe uses ------------------------------------------------------------------------------------------

    def say(self, sentence: str) -> None:
        """A sentence for the log (of the main process)."""
        self.loggers.say(sentence)

    def eval_rng(self) -> Randomness:
        """The randomness of the current batch of VALID or TEST: the same in every pass, for masks and negatives."""
        return Randomness(self.options.seed).child("evaluation", self.batch_index)

    def record(self, row: Mapping[str, Any]) -> None:
        """Keep a row (plain values) of VALID or TEST for `StageResult.rows`."""
        self._recorded.append((self.batch_index, dict(row)))

    # ---- training ----------------------------------------------------------------------------------------------------

    def fit(self, train_loader: MicroBatches, valid_loader: MicroBatches | None = None) -> None:
        """Train to the end of the run, from the last checkpoint if there is one.

        Arguments
        ---------
        train_loader : yields the micro-batches of an epoch from any update on (`toolkit.data.loader.Loader`).
        valid_loader : run every ``valid_interval_updates``, or at each epoch's end.

        Raises
        ------
        TrainingError : too many updates in a row are not finite (DivergenceError), memory ran out, another rank ended.
        any other error : of the data or of the recipe's methods. The state after the last whole update is saved before,
            unless it is not finite, and ``crash_report.json`` names the batch (until a later start completes it).
        Requeue : SIGTERM or SIGUSR1 came; a checkpoint was saved and the process ends with code 75.
        Interrupted : Ctrl-C came; a checkpoint was saved and the process ends with code 130.
        """
        if self.options.test_only:
            self.say("test_only: no training.")
            return
        if self.saver.checkpointer is not None:
            self.saver.checkpointer.validation = getattr(valid_loader, "fingerprint", "")
        try:
            self._prepare_fit(train_loader)
            self._fit(train_loader, valid_loader)
        except BaseException:
            self._parallel.abandon()
            raise
        self._parallel = self._parallel.finish()
        if self.world.is_main and (removed := remove_reports(self.context.output_folder)):
            self.say(f"training is complete; removed of an earlier start: {', '.join(removed)}.")

    def _fit(self, train_loader: MicroBatches, valid_loader: MicroBatches | None) -> None:
        progress, length = self.progress, self.progress.length
        if length.is_reached(self.update):
            if valid_loader is not None and length.finished_limits is None and not progress.is_validated:
                # The last session ended in its last validation.
                length.mark_finished()
                self.saver.save(self._validate(valid_loader, self.epoch))
            self.say(f"training is complete at update {self.update}; raise max_updates or max_minutes to go on.")
            return
        length.start(self.update)
        # A second signal must not break off the writing of the last checkpoint: the saver closes first.
        with StopSignal(self.world) as stop, contextlib.closing(self._profiler), contextlib.closing(self.saver):
            self._stop = stop
            try:
                if self.update == 0 and valid_loader is not None:
                    # One batch now, so that a mistake in the validation shows in the first minute, not after an epoch.
                    self._run_batches(valid_loader, Stage.VALID, max_steps=1)
                elif valid_loader is not None and progress.is_valid_due(self.options) and not progress.is_validated:
                    # The last session was told to stop just before this validation.
                    self.saver.save(self._validate(valid_loader, self.epoch))
                while not length.is_reached(self.update):
                    self._train_epoch(train_loader, valid_loader, stop)
            except EvaluationStopped:
                self._save_and_stop()
            except Exception as error:
                close(train_loader)
                told = self._broken_off(error)
                if told is error:
                    raise
                raise told from error
        close(train_loader)
        self.loggers.pause()
        self._stop = StopSignal()
        told = self.world.gather_objects((stop.received, stop.interrupted))
        if any(received for received, _ in told):
            # It came after the last look; what follows (the tests) is not to be begun.
            self.say(f"told to stop: training is complete at update {self.update}; run the same command for the rest.")
            raise Interrupted if any(interrupted for _, interrupted in told) else Requeue

    def fit_batch(self, micro: Any) -> None:
        """Forward and backward of one micro-batch; its gradient adds to that of the update."""
        amount = self.batch_amount(micro.batch)
        objective = self._objective_of(micro.batch, micro.micro)
        self._step.backward(objective.loss_sum)
        self._sums.add(objective, micro=micro.micro, ids=getattr(micro.batch, "ids", ()), amount=amount)
        self.device_row.mark_step()

    def _objective_of(self, batch: Any, micro: int) -> Objective:
        """The objective of micro-batch number ``micro`` of the update."""
        self.rng = Randomness(self.options.seed).child("update", self.update, micro)
        # Users' own modules draw from torch's generator; at a given place of the run it always stands the same.
        torch.manual_seed(self.rng.integer("torch"))
        return self._objective(batch_on_device(batch, self.device), Stage.TRAIN)

    def _objective(self, batch: Any, stage: Stage) -> Objective:
        """Forward and objective of a batch on the device."""
        with self.device_row.autocast(self.precision):
            predictions = self.compute_forward(batch, stage)
            returned = self.compute_objectives(predictions, batch, stage)
            return as_objective(returned, batch, owner=type(self).__name__, tell=self._say_once)

    def _train_epoch(self, train_loader: MicroBatches, valid_loader: MicroBatches | None, stop: StopSignal) -> None:
        epoch = self.epoch
        self.on_stage_start(Stage.TRAIN, epoch)
        self.modules.train()
        self.progress.meter.start()
        rest = train_loader.epoch(epoch, self.progress.epoch_update)
        with contextlib.closing(timed(rest, self.progress.meter)) as micro_batches:
            for micro in self._made_micro_batches(micro_batches):
                if micro.last:
                    stops, saves = self._finish_update(stop)
                    self._after_update(epoch, valid_loader, stops=stops, saves=saves)
                    if self.progress.length.is_reached(self.update):
                        break
                elif stop.received and self.world.size == 1:
                    # The unfinished gradient is given up: the next session makes this update from its beginning.
                    self._sums = UpdateSums(self.device)
                    self.on_update_given_up()
                    self._save_and_stop()
        self.progress.meter.pause()

    def _made_micro_batches(self, micro_batches: Iterator[Any]) -> Iterator[Any]:
        """Each micro-batch after its forward and backward; an error in them is told to the other ranks."""
        self._work.is_making = True
        try:
            for micro in micro_batches:
                self._work.begin_batch(Stage.TRAIN, micro)
                self._tell_bad_audio(micro)
                lent = self._parallel.lent(micro)
                with self._parallel.together():
                    if micro.batch is not None:
                        self.fit_batch(micro)
                    elif lent is not None:
                        # The others wait for this rank in every block: it goes along, and adds nothing.
                        self._step.backward(self._objective_of(*lent).loss_sum * 0)
                yield micro
                self._work.end_batch()
                self._work.is_making = True
        except Exception as error:
            if self.options.parallel == "ddp":  # shards are exchanged block by block, where nothing can be told
                self._work.tell(error, self._stop, self._step)
            raise

    def _broken_off(self, error: Exception) -> Exception:
        """Save what was trained, write and tell where it broke off; returns the error to be raised."""
        failures = self._work.failures or [self._work.failure(error, self._stop)]
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
        if self._work.is_whole:
            self._sums = UpdateSums(self.device)
            if self.optimizer is not None:
                self.optimizer.zero_grad(set_to_none=True)
            if self._work.is_making:
                self.on_update_given_up()
            if any(failure.is_stop for failure in failures):
                self._save_and_stop()
        if self.update == 0 and all(failure.is_mistake for failure in failures):
            return error  # a mistake of the user's, met before anything was trained: its sentence says all
        folder, about = self.context.output_folder, self._about() | self._guard.findings()
        self.say(save_and_report(self.saver, self.optimizer, self._work, failures=failures, folder=folder, about=about))
        return TrainingError(failures[0].sentence) if is_out_of_memory(error) else error

    def _finish_update(self, stop: StopSignal) -> tuple[bool, bool]:
        """The optimizer's update; returns (a rank was told to stop, a checkpoint is due)."""
        assert self.optimizer is not None
        progress, work = self.progress, self._work
        work.end_batch()
        self._learning_rate = set_learning_rates(self.optimizer, self.schedule(self.update, progress.length.total))
        main = float(self.world.is_main)
        # Clocks differ between ranks: what depends on time is decided by the main process, for all.
        wishes = [float(stop.received), float(stop.interrupted), main * self.saver.is_due(self.update + 1)]
        total = progress.length.total_after(self.update + 1, self.options.log_interval)
        wishes += [main * total, float(self.saver.has_failed())]
        work.is_changing = True
        try:
            finished = self._step.finish(self.update, self._sums.loss_sum, self._sums.count, wishes)
        except UpdateGivenUp as given_up:
            raise work.given_up(given_up.failures) from None
        self.device_row.mark_step()
        stops, interrupts, saves, agreed_total, fails = finished.values
        self._interrupted = interrupts > 0
        self._sums.hand_over(progress)
        # Every rank has the same norm, so the average over ranks is that norm.
        progress.add("grad_norm", finished.result.grad_norm)
        self._guard.note(finished.result, self._sums.seen)
        self._sums = UpdateSums(self.device)
        progress.advance()
        self.world.at(f"update {self.update + 1}")
        progress.length.total = max(int(agreed_total), self.update)
        set_frozen(self.optimizer, self.update)
        self._parallel.follow_frozen()
        self.on_update_end(finished.result)
        work.is_changing = work.is_making = False
        self._profiler.step()
        self.loggers.progress(self.update, progress.length.total)
        if fails > 0:
            # The main process could not write the last checkpoint: all end here, with its error.
            self.saver.wait()
        return stops > 0, saves > 0

    def _after_update(self, epoch: int, valid_loader: MicroBatches | None, *, stops: bool, saves: bool) -> None:
        """Whatever is due between two updates: a row, a validation, a checkpoint, the end."""
        progress = self.progress
        ends, epoch_ends = progress.length.is_reached(self.update), progress.epoch_update == 0
        if ends or self.update % self.options.log_interval == 0:
            self._log_row()
        elif self._sums.loss_sum.is_cpu:
            # Tensors of the host can be read at any time.
            self._guard.check(about=self._about())
        progress.meter.pause()
        if ends or epoch_ends:
            self.on_stage_end(Stage.TRAIN, progress.end_epoch(), epoch)
        metrics = None
        if valid_loader is not None and (ends or (progress.is_valid_due(self.options) and not stops)):
            metrics = self._validate(valid_loader, epoch)
        if ends:
            progress.length.mark_finished()
        if stops and not ends:
            self._save_and_stop()
        if ends or saves or metrics is not None:
            self.saver.save(metrics, wait=ends)
        if self.options.debug and not ends and self.update == half_way(self.options):
            self.saver.rehearse()
        self.modules.train()
        progress.meter.start()

    def _log_row(self) -> None:
        """One row of the log; here, and only here, training waits for the device."""
        self._guard.check(about=self._about())
        extra: dict[str, Any] = {"lr": self._learning_rate}
        if self.loss_scale is not None:
            extra["loss_scale"] = float(self.loss_scale.value)  # allowed wait: a log step
        if self._guard.total:
            extra["skipped_updates"] = self._guard.total
        row = self.progress.take_row(extra)
        self.loggers.log(row)
        for warning in self.health.check(row):
            self.say(f"warning: {warning}")

    def _about(self) -> dict[str, Any]:
        """Facts for a crash report."""
        facts = {"epoch": self.progress.epochs, "learning_rate": self._learning_rate, "precision": self.precision}
        return facts | {"device": str(self.device), "world_size": self.world.size, "options": self.options.as_dict()}

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        test_loader: MicroBatches,
        *,
        max_key: str | None = None,
        min_key: str | None = None,
        stage: Stage = Stage.TEST,
    ) -> StageResult:
        """Run a set that is shared out over the ranks, and return exact averages.

        Arguments
        ---------
        test_loader : its batches (`EvaluationSampler` behind a `Loader`).
        max_key, min_key : first load the checkpoint with the highest or lowest value of this metric.
        stage : what ``compute_objectives`` is told.

        Raises
        ------
        Requeue : SIGTERM or SIGUSR1 came; the process ends with code 75.
        """
        if max_key or min_key:
            self.saver.load_weights("best", metric=max_key or min_key, mode="max" if max_key else "min")
        self.on_stage_start(stage, self.epoch)
        try:
            with StopSignal(self.world, interrupts=False) as self._stop:
                result = self._run_batches(test_loader, stage, max_steps=self.options.max_eval_steps)
        except EvaluationStopped:
            self.say(f"told to stop in the {stage.value} set; run the same command again to evaluate it anew.")
            raise Requeue from None
        finally:
            self._stop = StopSignal()
        result.metrics.update(self.on_stage_end(stage, dict(result.metrics), self.epoch) or {})
        return result

    def evaluate_batch(self, batch: Any, stage: Stage) -> Objective:
        """Forward and objective of one batch (on the device), without gradients."""
        with torch.no_grad():
            return self._objective(batch, stage)

    def _run_batches(self, loader: MicroBatches, stage: Stage, *, max_steps: int | None) -> StageResult:
        self.modules.eval()
        self.rng, self._recorded = None, []
        result = run_set(
            loader, stage, lambda micro: self._evaluated(micro, stage), recorded=self._recorded,
            work=self._work, parallel=self._parallel, stop=self._stop, max_steps=max_steps,
        )  # fmt: skip
        self._recorded = []
        if left_out := result.sums.nonfinite:
            self.say(f"warning: {left_out} sums of the {stage.value} set were not finite and are left out.")
        return result

    def _evaluated(self, micro: Any, stage: Stage) -> Objective | None:
        """The objective of a batch of VALID or TEST; None where nothing of it could be read."""
        self._tell_bad_audio(micro)
        if micro.batch is None:
            return None
        # The number of the batch in the whole set, whatever rank it came to.
        self.batch_index = micro.update * self.world.size + micro.micro
        torch.manual_seed(self.eval_rng().integer("torch"))
        return self.evaluate_batch(batch_on_device(micro.batch, self.device), stage)

    def _validate(self, loader: MicroBatches, epoch: int) -> dict[str, float]:
        began = time.monotonic()
        self.on_stage_start(Stage.VALID, epoch)
        metrics = dict(self._run_batches(loader, Stage.VALID, max_steps=self.options.max_eval_steps).metrics)
        metrics.update(self.on_stage_end(Stage.VALID, dict(metrics), epoch) or {})
        self.progress.length.reserve = time.monotonic() - began
        self.loggers.log(self.progress.valid_row(metrics))
        return metrics

    # ---- small parts -------------------------------------------------------------------------------------------------

    def _prepare_fit(self, train_loader: MicroBatches) -> None:
        self.progress.length.require_limit()
        self.progress.plan(train_loader)
        self._parallel = make_parallel(self.options.parallel, self.modules, self.world, self.device_row)
        self.optimizer = self.init_optimizers()
        if self.device_row.needs_scaler(self.precision):
            self.loss_scale = LossScale(self.device)
            self.saver.add("loss_scale", self.loss_scale)
        self._step = UpdateStep(
            self.optimizer, self.world, max_grad_norm=self.options.max_grad_norm,
            loss_scale=self.loss_scale, parallel=self._parallel,
        )  # fmt: skip
        self.saver.add("guard", self._guard)
        self.saver.add_optimizer(self.optimizer)
        if not self.saver.resume() and isinstance(self._parallel, Replicas):
            share_weights(self.world, self.modules)
        self.loggers.rewind(self.update)
        set_frozen(self.optimizer, self.update)
        self._parallel.follow_frozen()
        compile_as_told(self.modules, self.options)
        self.say(describe_modules(self.modules))
        self.world.at(f"update {self.update + 1}")
        self.on_fit_start()

    def _save_and_stop(self) -> NoReturn:
        # All ranks end alike, whichever of them was told; one alone knows it before the update is complete.
        interrupted = self._interrupted or any(failure.is_interrupt for failure in self._work.failures)
        interrupted = interrupted or (self.world.size == 1 and self._stop.interrupted)
        self.saver.save_and_stop(interrupted=interrupted, pause=self.loggers.pause)

    def _tell_bad_audio(self, micro: Any) -> None:
        for name, sentence in micro.bad:
            self._say_once(f"left out {name}: {sentence.removeprefix(f'utterance {name}: ')}")
