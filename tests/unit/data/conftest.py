"""Real audio and small corpora for the tests of the data room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from toolkit.data.manifest import Manifest
from toolkit.seeds import Randomness

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


@pytest.fixture
def fairseq_manifests() -> Path:
    return FIXTURES / "fairseq_manifests"


@pytest.fixture
def odd_audio() -> Path:
    return FIXTURES / "odd_audio"


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Manifest]:
    """Writes noise as FLAC and returns its manifest."""

    def make(
        count: int = 12, *, seed: int = 0, low: float = 0.1, high: float = 0.6, sample_rate: int = 16000
    ) -> Manifest:
        folder = tmp_path / "corpus"
        folder.mkdir(exist_ok=True)
        rows = []
        for index in range(count):
            rng = Randomness(seed).numpy("corpus", index)
            samples = rng.standard_normal(int(rng.uniform(low, high) * sample_rate)).astype(np.float32) * 0.1
            path = folder / f"utt{index:03d}.flac"
            soundfile.write(path, samples, sample_rate)
            row = {"ID": f"utt{index:03d}", "duration": len(samples) / sample_rate, "wav": str(path)}
            rows.append(row | {"wrd": "AB CD"[: 1 + index % 5].strip()})
        return Manifest.from_rows(rows)

    return make
