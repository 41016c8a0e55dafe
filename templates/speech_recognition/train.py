"""Train a speech recognizer on your own recordings: copy this folder and change what you like.

    python train.py train.yaml --train_manifest my_train.csv --test_manifest my_test.csv --output_folder my_run
    python train.py train.yaml --help

The same command again continues the run. See README.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the script runs from a clone, installed or not

from toolkit.data.batch import SpeechBatch
from toolkit.data.parts import read_parts
from toolkit.data.tokens import Tokenizer
from toolkit.errors import run_main
from toolkit.models.ctc import CTCOutput, ctc_loss
from toolkit.recognition import compare, make_recognizer, trained_recognizer, transcribe
from toolkit.training.brain import Brain, Objective, Stage
from toolkit.training.experiment import start


class Recognizer(Brain):
    """Letters (or subwords) from speech by CTC."""

    tokenizer: Tokenizer

    def compute_forward(self, batch: SpeechBatch, stage: Stage) -> CTCOutput:
        """Log probabilities of each frame's token; masks and dropout only where there is randomness, in training."""
        return self.modules.model(batch.waveforms, batch.lengths, rng=self.rng, update=self.update)

    def compute_objectives(self, predictions: CTCOutput, batch: SpeechBatch, stage: Stage) -> Objective:
        """The sum over utterances; in validation and test also word and character errors."""
        loss, count = ctc_loss(
            predictions.log_probs,
            predictions.frame_lengths,
            batch.tokens,
            batch.token_lengths,
            on_host=self.device_row.on_host("ctc_loss"),
        )
        if stage is Stage.TRAIN:
            return Objective(loss, count)
        hypotheses = transcribe(predictions, self.tokenizer)
        return Objective(loss, count, compare(batch, hypotheses, record=self.record))


def main(argv: Sequence[str]) -> None:
    """Read, train, test, write model/, transcripts and summary.json."""
    with start(argv, script=__file__) as experiment:
        hparams = experiment.hparams
        recognizer = trained_recognizer(experiment)  # with test_only; it has its tokens
        train, valid, test = read_parts(hparams, say=experiment.say, texts=True, trains=recognizer is None)
        if recognizer is None:
            recognizer = make_recognizer(experiment, train)
        train, valid, test = (part and recognizer.dataset(part) for part in (train, valid, test))
        batch_seconds = hparams["batch_seconds"]
        brain = experiment.brain(
            Recognizer,
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
                    train,
                    batch_seconds=batch_seconds,
                    effective_batch=hparams["effective_batch"],
                    mode="pad",
                    num_buckets=hparams["num_buckets"],
                    sample_rate=recognizer.sample_rate,
                ),
                experiment.eval_loader(valid, batch_seconds=batch_seconds),
            )
        experiment.finish(
            brain,
            tests={"test": experiment.eval_loader(test, batch_seconds=batch_seconds)} if test else {},
            save_model=recognizer.save,
            evaluate=hparams["evaluate"],
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
