"""Fine-tune a pretrained encoder with CTC on LibriSpeech or on any manifests, or train one from scratch.

    python train.py hparams/ctc_tiny.yaml --data_folder /corpora/LibriSpeech
    python train.py hparams/base_100h.yaml --data_folder /corpora/LibriSpeech --pretrained results/w2v2_base/model
    python train.py hparams/ctc_tiny.yaml --help

The same command again continues the run. ``--preset performance`` times a fixed number of updates, ``--preset eval``
gives the WER of the output folder's best checkpoint, or of the ``model/`` folder in ``--pretrained``. See README.md.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that the script runs from a clone, installed or not

from recipes.LibriSpeech.librispeech_prepare import librispeech_manifests
from toolkit.data.batch import SpeechBatch
from toolkit.data.fairseq_folder import dictionary_beside
from toolkit.data.loader import Loader
from toolkit.data.manifest import Manifest, describe_empty_texts, read_manifests
from toolkit.data.tokens import Tokenizer
from toolkit.errors import ConfigError, run_main
from toolkit.models.ctc import CTCOutput, ctc_loss
from toolkit.recognition import compare, make_recognizer, trained_recognizer, transcribe
from toolkit.training.brain import Brain, Objective, Stage
from toolkit.training.experiment import Experiment, start


class ASR(Brain):
    """Letters (or subwords) from speech by CTC."""

    tokenizer: Tokenizer

    def compute_forward(self, batch: SpeechBatch, stage: Stage) -> CTCOutput:
        """Log probabilities of each frame's token; masks and dropout only where there is randomness, in training."""
        return self.modules.model(batch.waveforms, batch.lengths, rng=self.rng, update=self.update)

    def compute_objectives(self, predictions: CTCOutput, batch: SpeechBatch, stage: Stage) -> Objective:
        """The sum over utterances; in validation and test also word and character errors."""
        loss, count = ctc_loss(predictions.log_probs, predictions.frame_lengths, batch.tokens, batch.token_lengths)
        if stage is Stage.TRAIN:
            return Objective(loss, count)
        hypotheses = transcribe(predictions, self.tokenizer)
        return Objective(loss, count, compare(batch, hypotheses, record=self.record))


def read_splits(experiment: Experiment, splits: Sequence[str], manifests: Mapping[str, Path]) -> Manifest | None:
    """The utterances of ``splits``; None where there are none."""
    if not splits:
        return None
    hparams = experiment.hparams
    manifest = read_manifests(
        dict.fromkeys(manifests[split] for split in splits),
        replacements={"data_root": hparams["data_folder"]},
        root=hparams["audio_folder"],
    )
    if sentence := describe_empty_texts(manifest):
        experiment.say(f"warning: {sentence}")
    return manifest


def main(argv: Sequence[str]) -> None:
    """Prepare, train, test, write model/, transcripts and summary.json."""
    with start(argv, script=__file__) as experiment:
        hparams = experiment.hparams
        train_splits, valid_splits, test_splits = (hparams[f"{part}_splits"] for part in ("train", "valid", "test"))
        recognizer = trained_recognizer(experiment)
        if recognizer is not None:  # test_only: it has its tokens, and the training corpus may be elsewhere
            train_splits, valid_splits = [], []
        manifests = experiment.prepare(
            librispeech_manifests,
            [*train_splits, *valid_splits, *test_splits],
            data_folder=hparams["data_folder"],
            manifest_folder=hparams["manifest_folder"],
            audio_folder=hparams["audio_folder"],
            texts=True,
            subset_lists=hparams["subset_lists"],
            seed=hparams["seed"],
            say=experiment.say,
        )
        train, valid = (read_splits(experiment, splits, manifests) for splits in (train_splits, valid_splits))
        tests = {split: read_splits(experiment, [split], manifests) for split in test_splits}
        if recognizer is None:
            if train is None:
                raise ConfigError("train_splits is empty; name at least one split or manifest to train on.")
            train, report = train.filter(min_duration=hparams["min_duration"], max_duration=hparams["max_duration"])
            experiment.say(f"training: {report}")
            dictionary = dictionary_beside(manifests[split] for split in train_splits)
            recognizer = make_recognizer(experiment, train, dictionary=dictionary)

        def eval_loader(part: Manifest | None) -> Loader | None:
            return part and experiment.eval_loader(recognizer.dataset(part), batch_seconds=hparams["batch_seconds"])

        valid_loader = eval_loader(valid)
        test_loaders = {split: eval_loader(part) for split, part in tests.items()}
        brain = experiment.brain(
            ASR,
            modules={"model": recognizer.model},
            opt_class=hparams["opt_class"],
            schedule=hparams["schedule"],
            best_metric="wer",
            sample_rate=recognizer.sample_rate,
        )
        brain.tokenizer = recognizer.tokenizer
        if train is not None:
            brain.fit(
                experiment.train_loader(
                    recognizer.dataset(train),
                    batch_seconds=hparams["batch_seconds"],
                    effective_batch=hparams["effective_batch"],
                    mode="pad",
                    num_buckets=hparams["num_buckets"],
                    sample_rate=recognizer.sample_rate,
                ),
                valid_loader,
            )
        experiment.finish(
            brain,
            tests=test_loaders,
            save_model=recognizer.save,
            evaluate=hparams["evaluate"],
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
