"""What the training loop of the pretraining recipe costs beside the bare step that `step.py` times.

    python benchmarks/loop.py --precision bf16 --save

Runs recipes/LibriSpeech/wav2vec2/train.py as it is (FLAC decoding, crops, sampler, guard, log rows) on files of
noise, cropped to the batch of `step.py`. After each update of the recipe, a second model makes one bare step of the
same shape in the same process, so that both see the same machine. Updates in which a checkpoint or a validation runs
are none: the run is shorter. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import soundfile
import torch
from checks import check_device, check_numbers
from step_models import WAV2VEC2_SIZES, OurWav2Vec2

from toolkit.errors import run_main
from toolkit.pretraining import MaskedPretraining, pretrain
from toolkit.training.devices import resolve_device

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "LibriSpeech" / "wav2vec2"
RATE = 16000


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hparams", default="w2v2_base.yaml", help="a YAML of the recipe; the bare step is BASE's")
    parser.add_argument("--batch", type=int, default=2, help="utterances in the batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each crop")
    parser.add_argument("--updates", type=int, default=12, help="measured updates")
    parser.add_argument("--warmup", type=int, default=2, help="updates before, not measured")
    parser.add_argument("--size", choices=WAV2VEC2_SIZES, default="base", help="sizes of the bare step")
    parser.add_argument("recipe", nargs="*", help="further arguments of the recipe, after --")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results")
    options = parser.parse_args(argv)
    check_numbers(options, batch=1, seconds=0.1, updates=1, warmup=0)
    check_device(options.device)
    return options


def write_noise(folder: Path, count: int, seconds: float) -> Path:
    """FLAC files of noise (the most work to decode), a little longer than the crops, and their manifest."""
    rng = np.random.default_rng(1)
    lines = ["ID,duration,wav"]
    for index in range(count):
        samples = round((seconds + 2) * RATE)
        path = folder / f"noise_{index:02d}.flac"
        soundfile.write(path, 0.1 * rng.standard_normal(samples), RATE)
        lines.append(f"{path.stem},{samples / RATE},{path}")
    manifest = folder / "noise.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def load_recipe() -> ModuleType:
    """The recipe's script as a module."""
    spec = importlib.util.spec_from_file_location("wav2vec2_recipe", RECIPE / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each measured update of the loop, and of the bare step made after it."""
    recipe = load_recipe()
    walls: dict[str, list[float]] = {"loop": [], "step": []}

    class Timed(MaskedPretraining):
        """The recipe's Brain, with a bare step after each update."""

        def on_fit_start(self) -> None:
            bare = OurWav2Vec2(WAV2VEC2_SIZES[options.size], resolve_device(options.device), options.precision)
            waveforms = torch.randn(options.batch, round(options.seconds * RATE))
            self.bare = bare.prepare(waveforms.to(self.device))
            self.started = time.perf_counter()

        def on_update_end(self, result: Any) -> None:
            self.device_row.synchronize()
            ended = time.perf_counter()
            self.bare()
            self.device_row.synchronize()
            stepped = time.perf_counter()
            if self.update > options.warmup:
                walls["loop"].append(ended - self.started)
                walls["step"].append(stepped - ended)
            self.started = time.perf_counter()

    recipe.pretrain = functools.partial(pretrain, brain_class=Timed)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_noise(Path(folder), 8 * options.batch, options.seconds)
        batch_seconds = options.batch * options.seconds
        values = {
            "data_folder": folder, "output_folder": f"{folder}/run", "train_splits": f"[{manifest}]",
            "valid_splits": "[]", "test_splits": "[]", "crop_seconds": options.seconds, "batch_seconds": batch_seconds,
            "effective_batch": batch_seconds, "precision": options.precision, "device": options.device,
            "max_updates": options.warmup + options.updates, "log_interval": 2, "ckpt_interval_minutes": 1000,
        }  # fmt: skip
        recipe.main(
            [str(RECIPE / "hparams" / options.hparams), *(f"--{key}={value}" for key, value in values.items())]
            + options.recipe
        )
    return walls


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and save if asked."""
    options = parse(argv)
    walls = measure(options)
    audio = options.batch * options.seconds
    rates = {name: audio / statistics.median(seconds) for name, seconds in walls.items()}
    share = statistics.median(step / loop for step, loop in zip(walls["step"], walls["loop"], strict=True))
    result = {
        **rates,
        "share": share,
        "unit": "audio seconds per second",
        "precision": options.precision,
        "size": options.size,
        "batch": options.batch,
        "seconds": options.seconds,
        "walls": walls,
    }
    print(f"\nrecipe's loop {rates['loop']:.2f} audio s/s, bare step {rates['step']:.2f}: {100 * share:.1f} % kept")
    if options.save:
        path = HERE / "results" / f"loop_{options.size}_{options.device.split(':')[0]}_{options.precision}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"saved: {path}")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_main(main))
