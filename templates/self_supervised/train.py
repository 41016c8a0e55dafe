"""Pretrain wav2vec 2.0 on your own recordings: copy this folder and change what you like.

    python train.py train.yaml --train_manifest my_recordings.csv --output_folder my_pretraining
    python train.py train.yaml --help

The same command again continues the run. See README.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the script runs from a clone, installed or not

from toolkit.data.batch import SpeechBatch
from toolkit.data.dataset import DynamicItemDataset, speech_items
from toolkit.data.parts import read_parts
from toolkit.errors import run_main
from toolkit.models.model_files import save_model_folder
from toolkit.models.pretrainer import load_whole_model
from toolkit.models.wav2vec2 import PretrainingOutput
from toolkit.training.brain import Brain, Objective, Stage
from toolkit.training.experiment import start
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


def main(argv: Sequence[str]) -> None:
    """Read, train, evaluate, write model/ and summary.json."""
    with start(argv, script=__file__) as experiment:
        hparams = experiment.hparams
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
        parts = read_parts(hparams, say=experiment.say, texts=False)
        train, valid, test = (part and DynamicItemDataset(part, items, ["id", "waveform"]) for part in parts)
        batch_seconds = hparams["batch_seconds"]
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
            experiment.eval_loader(valid, batch_seconds=batch_seconds),
        )
        experiment.finish(
            brain,
            tests={"test": experiment.eval_loader(test, batch_seconds=batch_seconds)} if test else {},
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
