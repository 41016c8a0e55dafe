"""Pretrain and fine-tune speech models from recipes: wav2vec 2.0, data2vec and CTC, on any device."""

import os

__version__ = "0.1.0"

# OpenMP's threads sleep while they wait for each other instead of spinning. libgomp reads this once, when torch loads
# it, so it has to stand here, before the first import of torch. With two threads on two cores and one other busy
# process a tiny CTC model trained 55 audio seconds per second with it and 3 without. A value that is there stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
