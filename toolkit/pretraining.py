"""What pretraining recipes share: the Brain of masked prediction; for speech also the model and its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.data.batch import SpeechBatch
from toolkit.data.dataset import DynamicItemDataset, speech_items
from toolkit.data.loader import Loader
from toolkit.data.manifest import Manifest
from toolkit.data.text import TextBatch
from toolkit.errors import ConfigError
from toolkit.models.data2vec import Data2VecAudio, Data2VecText
from toolkit.models.data2vec_targets import Data2VecOutput
from toolkit.models.model_files import save_model_folder
from toolkit.models.pretrainer import load_whole_model
from toolkit.models.wav2vec2 import PretrainingOutput, Wav2Vec2Pretraining
from toolkit.training.brain import Brain, Objective, Stage
from toolkit.training.experiment import Experiment
from toolkit.training.health import HealthMonitor, data2vec_health, pretraining_health
from toolkit.training.step import StepResult

TEACHING = (Data2VecAudio, Data2VecText)
"""Models with a teacher that follows them."""


class MaskedPrediction(Brain):
    """Predict what was masked, of speech or text: quantized features (wav2vec 2.0), or a teacher's (data2vec).

    A recipe says how a batch goes forward.
    """

    def compute_objectives(
        self, predictions: PretrainingOutput | Data2VecOutput, batch: SpeechBatch | TextBatch, stage: Stage
    ) -> Objective:
        """The sum over what was masked, so that an update's gradient is the mean over all of its masked positions."""
        return Objective(predictions.loss_sum, predictions.num_masked, predictions.metrics())

    def on_update_end(self, result: StepResult) -> None:
        """A teacher moves towards its student."""
        if isinstance(self.modules.model, TEACHING):
            self.modules.model.finish_update(self.update)

    def on_update_given_up(self) -> None:
        """A teacher that moved with its micro-batches goes back."""
        if isinstance(self.modules.model, TEACHING):
            self.modules.model.give_up_update()


class MaskedPretraining(MaskedPrediction):
    """The same with a model of speech, which masks its own input."""

    def compute_forward(self, batch: SpeechBatch, stage: Stage) -> PretrainingOutput | Data2VecOutput:
        """What is random differs in every update, and stays the same in every validation."""
        if stage is Stage.TRAIN:  # crops fill the batch: there is no padding to speak of
            return self.modules.model(batch.waveforms, rng=self.rng, update=self.update)
        return self.modules.model(batch.waveforms, batch.lengths, rng=self.eval_rng(), update=self.update)


@dataclass(frozen=True)
class SpeechPretraining:
    """A model to pretrain and the audio that it hears.

    Arguments
    ---------
    model : masks its own input and gives its own loss.
    sample_rate : Hz.
    normalize : whether it hears waveforms of zero mean and unit variance.
    """

    model: Wav2Vec2Pretraining | Data2VecAudio
    sample_rate: int
    normalize: bool

    def dataset(self, manifest: Manifest) -> DynamicItemDataset:
        """The utterances of ``manifest`` as the model wants them: id, waveform."""
        return DynamicItemDataset(manifest, speech_items(self.sample_rate, self.normalize), ["id", "waveform"])

    def health(self) -> HealthMonitor:
        """What to watch in its training."""
        if isinstance(self.model, Data2VecAudio):
            return data2vec_health()
        quantizer = self.model.quantizer
        return pretraining_health(
            num_groups=quantizer.num_groups,
            num_codes=quantizer.num_codes,
            num_candidates=1 + self.model.num_negatives + self.model.cross_sample_negatives,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a ``model/`` folder."""
        save_model_folder(
            folder,
            self.model,
            kind=kind_of(self.model),
            sample_rate=self.sample_rate,
            normalize=self.normalize,
        )


def kind_of(model: object) -> str:
    """The kind of a model folder that holds ``model``; raises ConfigError for a model that is none of pretraining."""
    for known, kind in ((Wav2Vec2Pretraining, "wav2vec2_pretraining"), (Data2VecAudio, "data2vec_audio")):
        if isinstance(model, known):
            return kind
    raise ConfigError(
        f"model is a {type(model).__name__}, expected a Wav2Vec2Pretraining or Data2VecAudio (key model of the YAML)."
    )


def make_pretraining(experiment: Experiment) -> SpeechPretraining:
    """The model of the YAML, with the weights, sample rate and normalization of ``pretrained`` if that is given.

    With ``test_only`` it is that of the run in the output folder, if there is one.

    Arguments
    ---------
    experiment : its hparams hold model, pretrained, sample_rate, normalize.

    Raises
    ------
    CheckpointError : the weights do not fit the model.
    """
    model = experiment.hparams["model"]
    sample_rate, normalize = load_whole_model(
        model,
        experiment.model_source(),
        kind=kind_of(model),
        sample_rate=experiment.hparams["sample_rate"],
        normalize=experiment.hparams["normalize"],
        say=experiment.say,
    )
    return SpeechPretraining(model, sample_rate, normalize)


def pretrain(
    experiment: Experiment,
    task: SpeechPretraining,
    *,
    train: Manifest | None,
    valid: Manifest | None,
    tests: Mapping[str, Manifest],
    brain_class: type[MaskedPretraining] = MaskedPretraining,
) -> None:
    """Train, evaluate, write ``model/`` and summary.json.

    Arguments
    ---------
    experiment : its hparams hold opt_class, schedule, batch_seconds, effective_batch, crop_seconds, num_buckets.
    task : see :func:`make_pretraining`.
    train : None trains nothing.
    valid : utterances to validate on; None: no validation.
    tests : utterances to measure the loss on at the end, by name.
    brain_class : for a step or hooks of one's own.
    """
    hparams = experiment.hparams
    brain = experiment.brain(
        brain_class,
        modules={"model": task.model},
        opt_class=hparams["opt_class"],
        schedule=hparams["schedule"],
        health=task.health(),
        best_metric="loss",
        sample_rate=task.sample_rate,
    )

    def eval_loader(part: Manifest) -> Loader:
        return experiment.eval_loader(task.dataset(part), batch_seconds=hparams["batch_seconds"])

    if train is not None:
        brain.fit(
            experiment.train_loader(
                task.dataset(train),
                batch_seconds=hparams["batch_seconds"],
                effective_batch=hparams["effective_batch"],
                mode="crop",
                max_seconds=hparams["crop_seconds"],
                num_buckets=hparams["num_buckets"],
                sample_rate=task.sample_rate,
            ),
            None if valid is None else eval_loader(valid),
        )
    experiment.finish(
        brain,
        tests={name: eval_loader(part) for name, part in tests.items()},
        save_model=task.save,
        evaluate="last",  # a long pretraining is used as it ends: the lowest loss is no sign of the best features
    )
