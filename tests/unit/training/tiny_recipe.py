"""A whole recipe in miniature, run as its own process by the tests: learns the energy of noise from its waveform.

Uses all that must not change a run: dropout of torch, masks and left-out layers of the toolkit's randomness, uneven
lengths, crops, an incomplete last update.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import torch
from torch import nn

from toolkit.data.dataset import DynamicItemDataset, speech_items
from toolkit.data.manifest import read_manifest
from toolkit.errors import run_main
from toolkit.training.brain import Brain, Objective, Stage
from toolkit.training.experiment import start


class TinyModel(nn.Module):
    """Frames of 80 samples to one number each."""

    def __init__(self, *, width: int = 8) -> None:
        super().__init__()
        self.first, self.side, self.last = nn.Linear(80, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.dropout = nn.Dropout(0.2)

    def forward(self, waveforms, *, rng=None):
        frames = waveforms.unfold(1, 80, 80)
        hidden = torch.tanh(self.first(frames))
        if rng is not None:
            keep = rng.numpy("mask").random(hidden.shape[:2]) > 0.3
            hidden = hidden * torch.from_numpy(keep).to(hidden).unsqueeze(-1)
        # Left out now and then, as layerdrop does: its parameters then have no gradient at all.
        if rng is None or rng.numpy("layerdrop").random() > 0.5:
            hidden = hidden + torch.tanh(self.side(hidden))
        return self.last(self.dropout(hidden)).squeeze(-1), frames


class Tiny(Brain):
    """Stops itself, faults or breaks off as the YAML asks."""

    def compute_forward(self, batch, stage):
        return self.modules.model(batch.waveforms, rng=self.rng)

    def compute_objectives(self, predictions, batch, stage):
        outputs, frames = predictions
        valid = torch.arange(frames.shape[1]).unsqueeze(0) < (batch.lengths // 80).unsqueeze(1)
        loss = ((outputs.float() - frames.float().square().mean(-1).sqrt()).square() * valid).sum()
        if stage is Stage.TRAIN and self.update in self.hparams.nonfinite_updates:
            loss = loss * float("nan")
        if stage is Stage.TRAIN and [self.update, self.rng.keys[-1]] == self.hparams.stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        if stage is not Stage.TRAIN:
            for name in batch.ids:
                self.record({"id": name, "frames": int(valid.sum())})
        return Objective(loss, valid.sum(), {"frames": (valid.sum(), len(batch))})

    def on_update_end(self, result):
        # Only one of several processes is told to stop; the others have to learn it from it.
        if self.update == self.hparams.stop_after and self.world.is_main:
            os.kill(os.getpid(), getattr(signal, self.hparams.stop_signal))


def main(argv):
    with start(argv, script=__file__) as experiment:
        hparams = experiment.hparams
        seen = experiment.prepare(lambda: os.getpid())
        assert isinstance(seen, int)
        manifest = read_manifest(hparams["manifest"])
        dataset = DynamicItemDataset(manifest, speech_items(hparams["sample_rate"]), ["id", "waveform"])
        held_out = DynamicItemDataset(
            manifest.select(np.arange(7)), speech_items(hparams["sample_rate"]), ["id", "waveform"]
        )
        brain = experiment.brain(
            Tiny,
            modules={"model": hparams["model"]},
            opt_class=hparams["opt_class"],
            schedule=hparams["schedule"],
        )
        brain.fit(
            experiment.train_loader(
                dataset,
                batch_seconds=hparams["batch_seconds"],
                effective_batch=hparams["effective_batch"],
                mode="crop",
                num_buckets=2,
            ),
            experiment.eval_loader(held_out, batch_seconds=hparams["batch_seconds"]),
        )
        experiment.finish(
            brain,
            tests={"held-out": experiment.eval_loader(held_out, batch_seconds=hparams["batch_seconds"])},
            save_model=lambda folder: _save(brain, folder),
            evaluate=hparams["evaluate"],
        )


def _save(brain, folder):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "model.npz", **{name: value.numpy() for name, value in brain.modules.state_dict().items()})


if __name__ == "__main__":
    sys.exit(run_main(main))
