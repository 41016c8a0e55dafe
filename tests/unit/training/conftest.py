"""A small corpus on disk, and the miniature recipe run as its own process (or processes)."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def noise_manifest(tmp_path_factory):
    """21 FLAC files of noise, 0.31 to 0.99 s at 8 kHz, and their manifest."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(3)
    rows = []
    for index in range(21):
        samples = int(rng.integers(2500, 7900))
        waveform = rng.normal(scale=rng.uniform(0.02, 0.3), size=samples)
        path = folder / f"noise{index:02d}.flac"
        soundfile.write(path, np.clip(waveform, -0.99, 0.99), 8000)
        rows.append({"ID": path.stem, "duration": samples / 8000, "wav": str(path)})
    manifest = folder / "noise.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return manifest


@pytest.fixture
def run_tiny(noise_manifest):
    """Runs tiny_recipe.py with --key value arguments; ``processes`` > 1 starts it by torchrun."""

    def run(output_folder, *, processes=1, check=0, **keys):
        words = [str(HERE / "tiny.yaml"), "--output_folder", str(output_folder), "--manifest", str(noise_manifest)]
        for key, value in keys.items():
            words += [f"--{key}={value}"]
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        done = subprocess.run(
            [*launcher, str(HERE / "tiny_recipe.py"), *words],
            capture_output=True,
            text=True,
            env=environment,
            timeout=240,
        )
        if check is not None:
            assert done.returncode == check, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def weights():
    """The weights that a run of the miniature recipe left in its model folder."""

    def read(output_folder):
        with np.load(Path(output_folder) / "model" / "model.npz") as file:
            return {name: file[name] for name in file.files}

    return read
