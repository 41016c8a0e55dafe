"""Pretrain wav2vec 2.0 on your own recordings: copy this folder and change what you like.

    python train.py train.yaml --train_manifest my_recordings.csv --output_folder my_pretraining
    python train.py train.yaml --help

The same command again continues the run. See README.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the script runs from a clone, installed or not

from toolkit.data.parts import read_parts
from toolkit.errors import run_main
from toolkit.pretraining import make_pretraining, pretrain
from toolkit.training.experiment import start


def main(argv: Sequence[str]) -> None:
    """Read, train, evaluate, write model/ and summary.json."""
    with start(argv, script=__file__) as experiment:
        task = make_pretraining(experiment)
        trains = not experiment.options.test_only
        train, valid, test = read_parts(experiment.hparams, say=experiment.say, texts=False, trains=trains)
        pretrain(experiment, task, train=train, valid=valid, tests={"test": test} if test else {})


if __name__ == "__main__":
    sys.exit(run_main(main))
