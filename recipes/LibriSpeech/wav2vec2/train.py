"""Pretrain wav2vec 2.0 on LibriSpeech, or on any manifests.

    python train.py hparams/w2v2_tiny.yaml --data_folder /corpora/LibriSpeech
    torchrun --nproc_per_node=8 train.py hparams/w2v2_base.yaml --data_folder /corpora/LibriSpeech
    python train.py hparams/w2v2_tiny.yaml --help

The same command again continues the run. ``--preset performance`` times a fixed number of updates, ``--preset eval``
measures loss, accuracy and perplexities of what the output folder holds. See README.md.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that the script runs from a clone, installed or not

from recipes.LibriSpeech.librispeech_prepare import librispeech_manifests
from toolkit.data.batch import SpeechBatch
from toolkit.data.dataset import DynamicItem, DynamicItemDataset, speech_items
from toolkit.data.manifest import read_manifests
from toolkit.errors import ConfigError, run_main
from toolkit.models.folder import save_model_folder
from toolkit.models.pretrainer import load_whole_model
from toolkit.models.wav2vec2 import PretrainingOutput
from toolkit.training.brain import Brain, Objective, Stage
from toolkit.training.experiment import Experiment, start
from toolkit.training.health import pretraining_health


class Pretraining(Brain):
    """Predict the quantized features of masked frames."""

    def compute_forward(self, batch: SpeechBatch, stage: Stage) -> PretrainingOutput:
        """Masks, negatives and noise differ in every update, and stay the same in every validation."""
        if stage is Stage.TRAIN:  # crops fill the batch: there is no padding to speak of
            return self.modules.model(batch.waveforms, rng=self.rng, update=self.update)
        return self.modules.model(batch.waveforms, batch.lengths, rng=self.eval_rng(), update=self.update)

    def compute_objectives(self, predictions: PretrainingOutput, batch: SpeechBatch, stage: Stage) -> Objective:
        """The sum over the masked frames, so that an update's gradient is the mean over all of its masked frames."""
        return Objective(predictions.loss_sum, predictions.num_masked, predictions.metrics())


def make_dataset(
    experiment: Experiment,
    splits: Sequence[str],
    manifests: Mapping[str, Path],
    *,
    items: Sequence[DynamicItem],
    limited: bool = False,
) -> DynamicItemDataset | None:
    """The utterances of ``splits``, within the duration limits if ``limited``; None where there are no splits."""
    hparams = experiment.hparams
    if not splits:
        return None
    manifest = read_manifests(
        dict.fromkeys(manifests[split] for split in splits),
        replacements={"data_root": hparams["data_folder"]},
        root=hparams["audio_folder"],
    )
    if limited:
        limits = {"min_duration": hparams["min_duration"], "max_duration": hparams["max_duration"]}
        manifest, report = manifest.filter(**limits)
        experiment.say(f"training: {report}")
    return DynamicItemDataset(manifest, items, ["id", "waveform"])


def main(argv: Sequence[str]) -> None:
    """Prepare, train, evaluate, write model/ and summary.json."""
    with start(argv, script=__file__) as experiment:
        hparams = experiment.hparams
        train_splits, valid_splits, test_splits = (hparams[f"{part}_splits"] for part in ("train", "valid", "test"))
        trains = not experiment.options.test_only
        if not trains:  # the training corpus may be elsewhere
            train_splits, valid_splits = [], []
        model = hparams["model"]
        sample_rate, normalize = load_whole_model(
            model,
            experiment.model_source(),
            kind="wav2vec2_pretraining",
            sample_rate=hparams["sample_rate"],
            normalize=hparams["normalize"],
            say=experiment.say,
        )
        items = speech_items(sample_rate, normalize)
        manifests = experiment.prepare(
            librispeech_manifests,
            [*train_splits, *valid_splits, *test_splits],
            data_folder=hparams["data_folder"],
            manifest_folder=hparams["manifest_folder"],
            audio_folder=hparams["audio_folder"],
            subset_lists=hparams["subset_lists"],
            seed=hparams["seed"],
            say=experiment.say,
        )
        train = make_dataset(experiment, train_splits, manifests, items=items, limited=True)
        if train is None and trains:
            raise ConfigError("train_splits is empty; name at least one split or manifest to train on.")
        valid = make_dataset(experiment, valid_splits, manifests, items=items)
        tests = {split: make_dataset(experiment, [split], manifests, items=items) for split in test_splits}
        brain = experiment.brain(
            Pretraining,
            modules={"model": model},
            opt_class=hparams["opt_class"],
            schedule=hparams["schedule"],
            health=pretraining_health(
                num_groups=model.quantizer.num_groups,
                num_codes=model.quantizer.num_codes,
                num_candidates=1 + model.num_negatives,
            ),
            best_metric="loss",
            sample_rate=sample_rate,
        )
        batch_seconds = hparams["batch_seconds"]
        if train is not None:
            brain.fit(
                experiment.train_loader(
                    train,
                    batch_seconds=batch_seconds,
                    effective_batch=hparams["effective_batch"],
                    mode="crop",
                    max_seconds=hparams["crop_seconds"],
                    num_buckets=hparams["num_buckets"],
                    sample_rate=sample_rate,
                ),
                None if valid is None else experiment.eval_loader(valid, batch_seconds=batch_seconds),
            )
        experiment.finish(
            brain,
            tests={name: experiment.eval_loader(data, batch_seconds=batch_seconds) for name, data in tests.items()},
            save_model=lambda folder: save_model_folder(
                folder,
                model,
                kind="wav2vec2_pretraining",
                sample_rate=sample_rate,
                normalize=normalize,
            ),
            evaluate="last",  # a long pretraining is used as it ends: the lowest loss is no sign of the best features
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
