"""Pretrain and fine-tune speech models from recipes: wav2vec 2.0 and CTC, on any device."""

import os

__version__ = "0.1.0"

# OpenMP's threads spin for about 0.1 ms while they wait for each other, then sleep. libgomp reads this once, when torch
# loads it, so it has to stand here, before the first import of torch. Its own choice is a hundred times as long, which
# is a disaster beside any other busy process. Audio seconds per second of the speech recognition template (2 M
# parameters) with two threads on two cores, alone and beside one busy process: 100,000 spins 137 and 7, 3,000 spins 130
# and 53, none (OMP_WAIT_POLICY=passive) 103 and 84. Values that are there stay.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "3000"
