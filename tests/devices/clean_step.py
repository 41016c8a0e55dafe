"""Makes training steps on the stand-in device and prints, as JSON, what they asked of it; `test_clean_step.py` runs it.

    python clean_step.py steps|numbers|graphs
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from watching import DeviceWatch

from recipes.LibriSpeech.ASR.train import ASR
from recipes.WikiText.data2vec.train import TextPretraining
from toolkit.data.batch import SpeechBatch
from toolkit.data.text import TextBatch
from toolkit.models.ctc import CTCModel
from toolkit.models.data2vec import Data2VecAudio, Data2VecText
from toolkit.models.text_encoder import TextEncoder
from toolkit.models.wav2vec2 import Wav2Vec2Encoder, Wav2Vec2Pretraining
from toolkit.pretraining import MaskedPretraining
from toolkit.training.brain import Objective
from toolkit.training.context import RunContext
from toolkit.training.devices import resolve_device

DEVICE = "npu"
CONV = [(16, 10, 5), (16, 3, 2), (16, 2, 2)]
VOCABULARY, MASK = 20, 19


class Letters(ASR):
    """ASR with a plain loss over the same log probabilities.

    torch's CTC is one operation, of which nothing can be seen from outside, and the stand-in has none of its own.
    """

    def compute_objectives(self, predictions, batch, stage):
        return Objective(-predictions.log_probs[..., 1].sum(), len(batch))


def encoder(**changes: Any) -> Wav2Vec2Encoder:
    """A small encoder with all that is random in training."""
    settings = {"conv_layers": CONV, "dim": 16, "num_layers": 3, "ffn_dim": 32, "num_heads": 2, "pos_kernel": 8,
                "pos_groups": 2, "layerdrop": 0.0, "mask_length": 4}  # fmt: skip
    return Wav2Vec2Encoder(**settings | changes)


def text_encoder(**changes: Any) -> TextEncoder:
    """A small text encoder."""
    settings = {"vocab_size": VOCABULARY, "dim": 16, "num_layers": 3, "ffn_dim": 32, "num_heads": 2,
                "max_positions": 64}  # fmt: skip
    return TextEncoder(**settings | changes)


TASKS: dict[str, tuple[type, Callable[..., torch.nn.Module]]] = {
    "wav2vec2": (MaskedPretraining, lambda **c: Wav2Vec2Pretraining(encoder(**c), final_dim=8, num_codes=6,
                                                                    num_negatives=5)),
    "data2vec_audio": (MaskedPretraining, lambda **c: Data2VecAudio(
        encoder(extractor_norm="layer", pos_depth=2, **c), top_layers=2)),
    "ctc": (Letters, lambda **c: CTCModel(encoder(mask_channel_prob=0.3, mask_channel_length=4, **c), VOCABULARY,
                                      final_dropout=0.1)),
    "data2vec_text": (TextPretraining, lambda **c: Data2VecText(text_encoder(**c), mask_id=MASK, top_layers=2)),
}  # fmt: skip


def speech_batch(samples: int, seed: int, *, full: bool) -> SpeechBatch:
    """Three utterances of different lengths (unless ``full``) and transcripts, padded to ``samples``."""
    rng = np.random.default_rng(seed)
    lengths = np.full(3, samples) if full else rng.integers(samples // 2, samples + 1, 3)
    waveforms = rng.standard_normal((3, samples)).astype(np.float32) * (np.arange(samples) < lengths[:, None])
    return SpeechBatch(
        ids=[f"{seed}-{i}" for i in range(3)],
        waveforms=torch.from_numpy(waveforms.astype(np.float32)),
        lengths=torch.from_numpy(lengths),
        tokens=torch.from_numpy(rng.integers(2, VOCABULARY, (3, 6))),
        token_lengths=torch.from_numpy(rng.integers(1, 7, 3)),
    )


def text_batch(length: int, seed: int) -> TextBatch:
    """Three texts of different lengths, padded to ``length``, a third of their tokens hidden."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 2, length + 1, 3)
    tokens = np.where(np.arange(length) < lengths[:, None], rng.integers(4, MASK, (3, length)), 1)
    chosen = (rng.random((3, length)) < 0.3) & (tokens != 1)
    source = np.where(chosen, MASK, tokens)
    return TextBatch(ids=["a", "b", "c"], tokens=torch.from_numpy(tokens), lengths=torch.from_numpy(lengths),
                     source=torch.from_numpy(source), chosen=torch.from_numpy(chosen))  # fmt: skip


def batch_of(task: str, bucket: int, seed: int) -> Any:
    """A batch of one of two shapes; what is in it differs with the seed."""
    if task == "data2vec_text":
        return text_batch((24, 40)[bucket], seed)
    return speech_batch((1200, 1700)[bucket], seed, full=task != "ctc")


class Batches:
    """Updates of two micro-batches, the shapes in turn."""

    updates_per_epoch = 100

    def __init__(self, task: str) -> None:
        self.task = task

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[Any]:
        """Micro-batches as a loader gives them."""
        for update in range(first_update, self.updates_per_epoch):
            for micro in range(2):
                batch = batch_of(self.task, micro, 2 * update + micro)
                yield SimpleNamespace(batch=batch, epoch=epoch, update=update, micro=micro, last=micro == 1, bad=())


def make_brain(task: str, *, updates: int, precision: str = "fp32", on_update: Callable[[], None], compiled=False, **changes):
    """The recipe's Brain on the device; nothing is logged before the end."""
    brain_class, build = TASKS[task]

    class Watched(brain_class):
        def on_update_end(self, result):
            super().on_update_end(result)
            on_update()

    torch.manual_seed(0)
    return Watched(
        {"model": build(**changes)},
        functools.partial(torch.optim.AdamW, lr=1e-3),
        run_opts={"max_updates": updates, "precision": precision, "log_interval": 1000, "max_grad_norm": 1.0,
                  "compile": compiled, "device": DEVICE},
        context=RunContext(device=resolve_device(DEVICE)),
    )  # fmt: skip


def steps() -> dict[str, Any]:
    """For each task: what waited in updates 2 to 4, and whether they made the same operations on the same shapes."""
    results = {}
    for task, precision, changes in [
        ("wav2vec2", "fp32", {}), ("wav2vec2", "bf16", {}), ("wav2vec2", "fp16", {"layerdrop": 0.4}),
        ("data2vec_audio", "bf16", {}), ("ctc", "bf16", {}), ("data2vec_text", "bf16", {}),
    ]:  # fmt: skip
        watch, seen = DeviceWatch(DEVICE), []
        brain = make_brain(task, updates=5, precision=precision, on_update=lambda: seen.append(watch.take()), **changes)
        with watch:
            brain.fit(Batches(task))
        middle = seen[1:4]  # the first update makes the optimizer's state, the last one is logged
        where = ""
        for first, second in zip(middle[0][1], middle[1][1], strict=False):
            if first != second:
                where = f"{first} / {second}"
                break
        results[f"{task} {precision}"] = {
            "waits": sorted({wait for waits, _ in middle for wait in waits}),
            "operations": [len(operations) for _, operations in middle],
            "same": all(operations == middle[0][1] for _, operations in middle),
            "layerdrop": bool(changes),
            "where": where,
        }
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"steps": steps}[sys.argv[1]](), indent=1))
