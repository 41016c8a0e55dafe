"""What every recipe repeats around its Brain: starting, preparing, loaders, evaluation, summary.

A whole recipe script is then this::

    class ASR(Brain):
        def compute_forward(self, batch, stage):
            # self.rng: Randomness of this micro-batch in TRAIN, None in VALID and TEST
            return self.modules.model(batch.waveforms, batch.lengths, rng=self.rng, update=self.update)

        def compute_objectives(self, predictions, batch, stage):
            loss, count = ctc_loss(predictions.log_probs, ...)                      # a sum, and of how many
            if stage is Stage.TRAIN:
                return Objective(loss, count)
            errors = ...                                                            # decode, compare with batch.texts
            self.record({"id": ..., "reference": ..., "hypothesis": ...})           # a row of test_hypotheses.jsonl
            return Objective(loss, count, {"wer": (100.0 * errors.words, errors.reference_words)})


    def main(argv):
        with start(argv, script=__file__) as experiment:
            hparams = experiment.hparams
            manifests = experiment.prepare(prepare_corpus, data_folder=hparams["data_folder"])
            train, valid, tests = make_datasets(hparams, manifests)
            brain = experiment.brain(
                ASR,
                modules={"model": hparams["model"]},
                opt_class=hparams["opt_class"],
                schedule=hparams["schedule"],
                parameter_groups=hparams["parameter_groups"],
                best_metric="wer",
            )
            seconds = hparams["batch_seconds"]
            brain.fit(
                experiment.train_loader(train, batch_seconds=seconds, effective_batch=hparams["effective_batch"]),
                experiment.eval_loader(valid, batch_seconds=seconds),
            )
            experiment.finish(
                brain,
                tests={name: experiment.eval_loader(data, batch_seconds=seconds) for name, data in tests.items()},
                save_model=lambda folder: save_model_folder(folder, hparams["model"], kind="ctc", ...),
                evaluate="best",           # or "last", "average"
            )


    if __name__ == "__main__":
        sys.exit(run_main(main))

``brain.fit`` resumes by itself. ``--test_only`` makes it return at once. ``--debug`` shortens everything, in the same
output folder, which a real run afterwards starts anew. SIGTERM saves a checkpoint and ends the process with exit code
75: the same command goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolkit.data.batch import collate_speech
from toolkit.data.loader import Loader
from toolkit.data.manifest_rows import describe_changes, rows_path, write_rows
from toolkit.data.sampler import BucketSampler, EvaluationSampler
from toolkit.data.units import SECONDS, Unit
from toolkit.errors import CheckpointError, ConfigError
from toolkit.seeds import derive_seed
from toolkit.training.brain import Brain
from toolkit.training.checkpoint import Checkpointer
from toolkit.training.compilation import check_compilation
from toolkit.training.context import RunContext
from toolkit.training.device_probe import try_device
from toolkit.training.devices import prepare_process, resolve_device
from toolkit.training.distributed import World, environment_rank, init_world, run_on_main
from toolkit.training.folders import write_atomic
from toolkit.training.health import HealthMonitor
from toolkit.training.hparams import help_text, plan_hparams
from toolkit.training.limits import LeaveSignal
from toolkit.training.loggers import Console, JsonLinesLogger, Logger, Loggers, TensorBoardLogger, TextLogger
from toolkit.training.metrics import MetricSums
from toolkit.training.objective import StageResult
from toolkit.training.optim import ParameterGroup
from toolkit.training.options import RunOptions, parse_arguments
from toolkit.training.run_folder import (
    MODEL_NAME,
    has_checkpoints,
    holds_model,
    keep_record,
    nothing_to_evaluate,
    open_run_folder,
)
from toolkit.training.saving import check_weights
from toolkit.training.schedules import Schedule
from toolkit.training.summary import format_summary, summarize, write_summary


class Experiment:
    """One run of a recipe: its settings and place, and what recipes do with them. Made by `start`.

    Arguments
    ---------
    hparams : the YAML, built.
    options : how to run.
    context : device, ranks, loggers, output folder.
    settings : plain values that decide results, compared when a run is resumed.
    held : what is given back when the run ends (loggers, process group, the output folder's lock).
    keep_record : writes into the output folder what was run; called once a checkpoint that was there is resumed. None:
        that is done, or the record is another run's.
    """

    def __init__(
        self,
        hparams: dict[str, Any],
        options: RunOptions,
        context: RunContext,
        *,
        settings: Mapping[str, Any],
        held: contextlib.ExitStack | None = None,
        keep_record: Callable[[], None] | None = None,
    ) -> None:
        self.hparams, self.options, self.context, self.settings = hparams, options, context, settings
        self.device, self.world, self.loggers = context.device, context.world, context.loggers
        self.output_folder: Path = context.output_folder or Path()
        self._held = held or contextlib.ExitStack()
        self._manifests: dict[str, str] = {}
        self._changes: dict[str, Callable[[], str]] = {}
        self._checkpointer: Checkpointer | None = None
        self._keep_record = keep_record
        self._has_weights = bool(hparams.get("pretrained"))

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the process group, end the loggers, unlock the output folder."""
        self._held.close()

    def say(self, sentence: object) -> None:
        """A sentence for the log (of the main process)."""
        self.loggers.say(str(sentence))

    def prepare(self, function: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
        """Call ``function`` on the main process while the others wait; its result (plain values) comes to all."""
        return run_on_main(self.world, function, *args, **arguments)

    def model_source(self) -> Path | None:
        """The model folder to load before training or evaluation, None where there is none.

        It is ``pretrained``; with ``test_only``, where the output folder holds a run, that run's own ``model/``, to
        which its checkpoints fit.
        """
        if self.options.test_only and holds_model(self.output_folder):
            self._has_weights = True
            return self.output_folder / MODEL_NAME
        pretrained = self.hparams.get("pretrained")
        return Path(pretrained) if pretrained else None

    def brain(
        self,
        kind: type[Brain],
        *,
        modules: Mapping[str, nn.Module],
        opt_class: Callable[..., torch.optim.Optimizer] | None = None,
        schedule: Schedule | None = None,
        parameter_groups: Sequence[ParameterGroup] = (),
        health: HealthMonitor | None = None,
        best_metric: str = "loss",
        best_mode: str = "min",
        sample_rate: int | None = None,
        unit: Unit = SECONDS,
    ) -> Any:
        """A Brain of class ``kind`` in this run, with a Checkpointer on ``<output_folder>/save``.

        Arguments
        ---------
        best_metric, best_mode : which value of the validation decides what is best, and whether low or high is.
        sample_rate : Hz of the waveforms, to count seconds; None = the YAML's.
        others : as for `Brain`.
        """
        self._checkpointer = Checkpointer(
            self.output_folder / "save",
            keep_last=self.options.keep_last,
            keep_best=self.options.keep_best,
            best_metric=best_metric,
            best_mode=best_mode,
            world=self.world,
            manifests=self._manifests,
            settings=self.settings,
            log=self.say,
        )
        self._checkpointer.describe_changes.update(self._changes)
        brain = kind(
            modules,
            opt_class,
            self.hparams,
            self.options,
            self._checkpointer,
            schedule=schedule,
            parameter_groups=parameter_groups,
            health=health,
            context=self.context,
            sample_rate=sample_rate or int(self.hparams.get("sample_rate", 16000)),
            unit=unit,
        )
        if self._keep_record is not None:
            brain.saver.on_resume.append(partial(run_on_main, self.world, self._keep_record))
        return brain

    def train_loader(
        self,
        dataset: Any,
        *,
        batch_seconds: float,
        effective_batch: float | None = None,
        mode: str = "pad",
        num_buckets: int | None = None,
        order: str = "random",
        max_seconds: float | None = None,
        max_batch_size: int | None = None,
        sample_rate: int | None = None,
        collate: Callable[..., Any] = collate_speech,
    ) -> Loader:
        """The training set in buckets; accumulation follows from ``effective_batch`` and is printed.

        Arguments
        ---------
        dataset : a `DynamicItemDataset` (its manifest has the durations; a change of it is noticed on resuming).
        sample_rate : Hz; None = the YAML's.
        others : as for `BucketSampler`.
        """
        sampler = BucketSampler(
            dataset.manifest.durations,
            batch_seconds=batch_seconds,
            effective_batch=effective_batch,
            mode=mode,  # type: ignore[arg-type]
            num_buckets=num_buckets,
            order=order,  # type: ignore[arg-type]
            seed=self.options.seed,
            sample_rate=sample_rate or int(self.hparams.get("sample_rate", 16000)),
            max_seconds=max_seconds,
            world_size=self.world.size,
            max_batch_size=max_batch_size,
        )
        loader = self.planned_train_loader(dataset, sampler, dataset.manifest.fingerprint(), collate=collate)
        self._keep_rows("train", dataset.manifest)
        return loader

    def _keep_rows(self, name: str, manifest: Any) -> None:
        """Keep what a new run's rows are, and have a run that goes on say how they differ, if they do."""
        path = rows_path(self.output_folder, name)
        if self.world.is_main and not self.options.test_only and not has_checkpoints(self.output_folder):
            write_atomic(path, lambda temporary: write_rows(temporary, manifest))
        self._changes[name] = partial(describe_changes, path, manifest)
        if self._checkpointer is not None:
            self._checkpointer.describe_changes.update(self._changes)

    def eval_loader(
        self, dataset: Any, *, batch_seconds: float, collate: Callable[..., Any] = collate_speech
    ) -> Loader:
        """A validation or test set, shared out over the ranks, nothing dropped."""
        sampler = EvaluationSampler(
            dataset.manifest.durations, batch_seconds=batch_seconds, world_size=self.world.size
        )
        return self.planned_loader(dataset, sampler, collate=collate, fingerprint=dataset.manifest.fingerprint())

    def planned_train_loader(
        self, dataset: Any, sampler: Any, fingerprint: str, *, collate: Callable[..., Any]
    ) -> Loader:
        """The training set with a sampler made for it; ``fingerprint`` changes where the set does."""
        self._manifests["train"] = fingerprint
        if self._checkpointer is not None:
            self._checkpointer.manifests.update(self._manifests)
        if not self.options.test_only:
            self.say(sampler.report())
        return self.planned_loader(dataset, sampler, collate=collate, fingerprint=fingerprint)

    def planned_loader(
        self, dataset: Any, sampler: Any, *, collate: Callable[..., Any], fingerprint: str = ""
    ) -> Loader:
        """Any set with a sampler made for it, this rank's share, by the options of this run."""
        return Loader(
            dataset,
            sampler,
            collate=collate,
            num_workers=self.options.num_workers,
            rank=self.world.rank,
            world_size=self.world.size,
            seed=self.options.seed,
            max_bad_share=self.options.max_bad_share,
            pin_memory=self.device.pin_memory,
            fingerprint=fingerprint,
        )

    def finish(
        self,
        brain: Brain,
        *,
        tests: Mapping[str, Loader] | None = None,
        save_model: Callable[[Path], Any] | None = None,
        evaluate: str = "best",
        rows_file: str = "test_hypotheses.jsonl",
        derive: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None,
    ) -> dict[str, Any]:
        """Choose the weights, write ``model/``, evaluate, write and print the summary.

        Arguments
        ---------
        tests : name to loader of each test set. Scores are pooled over all of them (``test_<metric>``), and by set.
        save_model : writes the model into the folder it is given (main process only).
        evaluate : "best" (by the best metric of the validation), "last", or "average" (of the last ``keep_last``).
        rows_file : name of the file for the rows that the Brain recorded (one of RESULTS).
        derive : from the averages over all test sets to scores that follow from them and are no averages themselves.

        Returns
        -------
        The summary, as in ``summary.json``.

        Raises
        ------
        CheckpointError : ``test_only`` without a checkpoint or a pretrained model.
        """
        loaded = brain.saver.load_weights(evaluate)
        if self.options.test_only and not loaded:
            self._check_weights_elsewhere()
        model_folder = self.output_folder / MODEL_NAME
        # An evaluation completes a run that lacks its model/; a model of another place is not copied here.
        if save_model is not None and not (self.options.test_only and (model_folder.exists() or not loaded)):
            run_on_main(self.world, _without_result, save_model, model_folder)
        values = summarize(brain)
        if self.options.test_only:
            values = {**values, **_read_json(self.output_folder / "summary.json")}
        elif self.world.is_main:
            # What was trained is told even where a bad file ends the test.
            write_summary(self.output_folder, values)
        values |= self._run_tests(brain, tests or {}, rows_file, derive)
        if self.world.is_main:
            write_summary(self.output_folder, values)
        self.say(format_summary(values))
        if self.options.debug and not self.options.test_only:
            self.say("debug run complete: train, validation, checkpoint, resume and test have run; now without it.")
        self.say(f"all of it is in {self.output_folder}")
        return values

    def _check_weights_elsewhere(self) -> None:
        """Refuse to evaluate where no checkpoint was loaded and no model folder gave the weights."""
        damaged = has_checkpoints(self.output_folder)
        if damaged and self.hparams.get("pretrained"):
            raise CheckpointError(
                f"none of the checkpoints in {self.output_folder / 'save'} is sound; restore one from a copy, or give "
                "another --output_folder to evaluate the pretrained model alone."
            )
        if damaged or not self._has_weights:
            raise nothing_to_evaluate(self.output_folder)

    def _run_tests(
        self,
        brain: Brain,
        tests: Mapping[str, Loader],
        rows_file: str,
        derive: Callable[[Mapping[str, float]], Mapping[str, float]] | None,
    ) -> dict[str, Any]:
        pooled, by_set, rows = MetricSums(), {}, []
        for name, loader in tests.items():
            result: StageResult = brain.evaluate(loader)
            update = brain.saver.weights_update or brain.update
            self.loggers.log({"stage": "test", "update": update, "set": name, **result.metrics})
            pooled.merge(result.sums)
            by_set[name] = result.metrics
            rows += [{**row, "set": name} if len(tests) > 1 else row for row in result.rows]
        if rows and self.world.is_main:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomic(self.output_folder / rows_file, lines)
        averages = pooled.averages()
        if derive is not None and tests:
            averages |= derive(averages)
        scores = {f"test_{name}": value for name, value in averages.items()}
        return {**scores, "tests": by_set} if tests else {}


def start(argv: Sequence[str], *, script: str | Path | None = None) -> Experiment:
    """From a command line to an `Experiment`: everything checked first, then built.

    Arguments
    ---------
    argv : ``hparams.yaml --key value ...``, without the program's name.
    script : the recipe's own file; a copy is kept in the output folder.

    Raises
    ------
    ConfigError, DeviceError : what is wrong with the YAML, the command line, the device.
    SystemExit : ``--help`` was asked for and printed.
    """
    arguments = parse_arguments(argv)
    if arguments.help:
        print(help_text(arguments.hparams_file))
        raise SystemExit(0)
    if arguments.hparams_file is None:
        raise ConfigError("no YAML file was given; write `python train.py hparams/NAME.yaml --key value ...`.")
    plan = plan_hparams(arguments.hparams_file, arguments.overrides, options=arguments.options)
    options = RunOptions.from_values(plan.values, arguments.options)
    if isinstance(plan.values.get("evaluate"), str):
        check_weights(plan.values["evaluate"])
    if not plan.values.get("output_folder"):
        raise ConfigError(f"{plan.path} has no output_folder; add the key, or give --output_folder.")
    folder = Path(plan.values["output_folder"]).expanduser()
    with contextlib.ExitStack() as held:  # not even a folder's lock may outlive a start that fails
        rank, local_rank, size = environment_rank(options.local_rank)
        held.enter_context(LeaveSignal(World(rank, local_rank, size)))
        several = size > 1 and os.environ.get("LOCAL_WORLD_SIZE") != "1"
        device = resolve_device(options.device, local_rank=local_rank, several=several)
        device.resolve_precision(options.precision)
        check_compilation(options)
        said = prepare_process(device, options)
        device, tried = try_device(device)
        world = init_world(
            device,
            backend=options.distributed_backend,
            timeout_minutes=options.distributed_timeout_minutes,
            local_rank=options.local_rank,
        )
        held.callback(world.close)
        is_recorded = run_on_main(world, open_run_folder, folder, options, plan, script, held)
        loggers = _loggers(folder, options) if world.is_main else Loggers()
        held.callback(loggers.close)
        precision = device.resolve_precision(options.precision)
        loggers.say(f"{shlex.join([Path(sys.argv[0]).name, *argv])}: writing to {folder}")
        loggers.say(f"{device.name}, precision {precision}, {world.size} process{'es' if world.size > 1 else ''}")
        for sentence in [*said, *tried]:
            loggers.say(sentence)
        torch.manual_seed(derive_seed(options.seed, "model"))
        return Experiment(
            plan.build(),
            options,
            RunContext(device, world, loggers, folder),
            settings=plan.settings(),
            held=held.pop_all(),
            keep_record=None if is_recorded else partial(keep_record, folder, plan, script),
        )


def _loggers(folder: Path, options: RunOptions) -> Loggers:
    """What the main process writes to."""
    writers: list[Logger] = [JsonLinesLogger(folder / "metrics.jsonl"), TextLogger(folder / "log.txt")]
    if options.tensorboard:
        writers.append(TensorBoardLogger(folder / "tensorboard"))
    return Loggers(writers, Console(progressbar=not options.noprogressbar))


def _without_result(function: Callable[[Path], Any], folder: Path) -> None:
    """What ``function`` returns may not be plain; nobody needs it."""
    function(folder)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
