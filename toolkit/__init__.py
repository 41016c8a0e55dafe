"""Pretrain and fine-tune speech models from recipes: wav2vec 2.0 and CTC, on any device."""

import os

__version__ = "0.1.0"

# OpenMP's threads spin a little while they wait for each other, then sleep. libgomp reads this once, when torch loads
# it, so it has to stand here, before the first import of torch. Long spinning is a disaster beside any other busy
# process. Audio seconds per second of the speech recognition template (2 M parameters), two threads on two cores, runs
# of 40 to 60 updates. Alone: spinning without end (OMP_WAIT_POLICY=active) 135 to 139, 3,000 spins 134, none (passive)
# 103 to 109. Beside one busy process: 100,000 spins 7 to 8, 3,000 spins 52 to 54, none 83 to 84. Values that are there
# stay.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "3000"
