"""Fine-tune a pretrained text encoder to classify texts, or train one from scratch, on any CSV of (text, label).

    python train.py hparams/classify_tiny.yaml --data_folder /corpora/sms --bpe_folder /models/gpt2_bpe
    python train.py hparams/classify_tiny.yaml --data_folder /corpora/sms --pretrained ../data2vec/results/tiny/model
    python train.py hparams/classify_tiny.yaml --help

The same command again continues the run. ``--preset performance`` times a fixed number of updates, ``--preset eval``
gives the accuracy of the output folder's best checkpoint, or of the ``model/`` folder in ``--pretrained``. See
README.md.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that the script runs from a clone, installed or not

from toolkit.classification import Classification, accuracy, macro_f1, make_classifier, read_tables, trained_classifier
from toolkit.data.labelled_text import LabelledBatch, LabelledRows, collate_labelled
from toolkit.data.loader import Loader
from toolkit.data.units import TOKENS
from toolkit.errors import run_main
from toolkit.models.text_classifier import classification_loss
from toolkit.training.brain import Brain, Objective, Stage
from toolkit.training.experiment import start
from toolkit.training.text_loaders import text_eval_loader, text_train_loader


class Classifier(Brain):
    """Labels from texts."""

    task: Classification

    def compute_forward(self, batch: LabelledBatch, stage: Stage) -> Tensor:
        """Scores of each text's classes; dropout only where there is randomness, in training."""
        return self.modules.model(batch.tokens, rng=self.rng)

    def compute_objectives(self, predictions: Tensor, batch: LabelledBatch, stage: Stage) -> Objective:
        """The sum over texts; in validation and test also each label's F1."""
        loss, count = classification_loss(predictions, batch.labels)
        if stage is Stage.TRAIN:
            return Objective(loss, count, accuracy(predictions, batch.labels))
        return Objective(loss, count, self.task.compare(batch, predictions, record=self.record))

    def on_stage_end(self, stage: Stage, metrics: dict[str, float], epoch: int) -> Mapping[str, float]:
        """The mean of the labels' F1."""
        return macro_f1(metrics)


def main(argv: Sequence[str]) -> None:
    """Train, test, write model/, predictions and summary.json."""
    with start(argv, script=__file__) as experiment:
        hparams = experiment.hparams
        task = trained_classifier(experiment)  # with test_only; it has its tokens and labels
        tables = read_tables(experiment, trains=task is None)
        if task is None:
            assert tables.train is not None
            task = make_classifier(experiment, tables.train)

        def eval_loader(rows: LabelledRows) -> Loader:
            texts = task.dataset(rows)
            experiment.say(texts.report())
            return text_eval_loader(
                experiment, texts, batch_tokens=hparams["batch_tokens"], collate=collate_labelled
            )

        # Before the training, so that a label that is not known there shows now.
        valid_loader = None if tables.valid is None else eval_loader(tables.valid)
        test_loaders = {name: eval_loader(rows) for name, rows in tables.tests.items()}
        brain = experiment.brain(
            Classifier,
            modules={"model": task.model},
            opt_class=hparams["opt_class"],
            schedule=hparams["schedule"],
            best_metric="accuracy",
            best_mode="max",
            unit=TOKENS,
        )
        brain.task = task
        if tables.train is not None:
            train_loader = text_train_loader(
                experiment,
                task.dataset(tables.train),
                batch_tokens=hparams["batch_tokens"],
                effective_batch=hparams["effective_batch"],
                num_buckets=hparams["num_buckets"],
                collate=collate_labelled,
            )
            brain.fit(train_loader, valid_loader)
        experiment.finish(
            brain,
            tests=test_loaders,
            save_model=task.save,
            evaluate=hparams["evaluate"],
            rows_file="test_predictions.jsonl",
            derive=macro_f1,
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
