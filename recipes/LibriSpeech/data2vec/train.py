"""Pretrain data2vec on LibriSpeech, or on any manifests.

    python train.py hparams/data2vec_tiny.yaml --data_folder /corpora/LibriSpeech
    torchrun --nproc_per_node=8 train.py hparams/data2vec_base.yaml --data_folder /corpora/LibriSpeech
    python train.py hparams/data2vec_tiny.yaml --help

The same command again continues the run. ``--preset performance`` times a fixed number of updates, ``--preset eval``
measures the loss of what the output folder holds. See README.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that the script runs from a clone, installed or not

from recipes.LibriSpeech.splits import read_splits
from toolkit.errors import run_main
from toolkit.pretraining import make_pretraining, pretrain
from toolkit.training.experiment import start


def main(argv: Sequence[str]) -> None:
    """Prepare, train, evaluate, write model/ and summary.json."""
    with start(argv, script=__file__) as experiment:
        task = make_pretraining(experiment)
        splits = read_splits(experiment, trains=not experiment.options.test_only)
        pretrain(experiment, task, train=splits.train, valid=splits.valid, tests=splits.tests)


if __name__ == "__main__":
    sys.exit(run_main(main))
