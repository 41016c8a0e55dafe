"""Makes training steps on the stand-in device and prints, as JSON, what they asked of it; `test_clean_step.py` runs it.

    python clean_step.py steps|numbers|graphs
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from functorch.compile import make_boxed_func
from torch._functorch.aot_autograd import aot_module_simplified

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
from toolkit.seeds import Randomness
from toolkit.training.brain import Brain, Objective, Stage
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
    # One batch of transcribed speech has no padding, which must not make a difference.
    return speech_batch((1200, 1700)[bucket], seed, full=task != "ctc" or seed == 4)


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


def make_brain(
    task: str,
    *,
    updates: int,
    on_update: Callable[[], None] = lambda: None,
    run_opts: dict[str, Any] | None = None,
    **changes: Any,
) -> Brain:
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
        run_opts={"max_updates": updates, "log_interval": 1000, "max_grad_norm": 1.0, **(run_opts or {})},
        context=RunContext(device=resolve_device(DEVICE)),
    )


def steps() -> dict[str, Any]:
    """For each task: what waited in updates 2 to 4, and whether they made the same operations on the same shapes."""
    results = {}
    for task, precision, layerdrop in [
        ("wav2vec2", "fp32", 0.0), ("wav2vec2", "bf16", 0.0), ("wav2vec2", "fp16", 0.4),
        ("data2vec_audio", "bf16", 0.0), ("ctc", "bf16", 0.0), ("data2vec_text", "bf16", 0.0),
    ]:  # fmt: skip
        watch, seen = DeviceWatch(DEVICE), []
        look = functools.partial(_look, watch, seen)
        brain = make_brain(task, updates=5, on_update=look, run_opts={"precision": precision}, layerdrop=layerdrop)
        with watch:
            brain.fit(Batches(task))
        middle = seen[1:4]  # the first update makes the optimizer's state, the last one is logged
        results[f"{task} {precision}"] = {
            "waits": sorted({wait for waits, _ in middle for wait in waits}),
            "operations": [len(operations) for _, operations in middle],
            "same": all(operations == middle[0][1] for _, operations in middle),
            "layerdrop": layerdrop,
        }
    return results


def _look(watch: DeviceWatch, seen: list[Any]) -> None:
    seen.append(watch.take())


def numbers() -> dict[str, Any]:
    """Loss, gradients and metrics of a batch on the CPU and on the device, without dropout; the largest difference."""
    results = {}
    off = {"dropout": 0.0, "attention_dropout": 0.0}
    for task in TASKS:
        quiet = {} if task == "data2vec_text" else {"dropout_input": 0.0}
        torch.manual_seed(0)
        model = TASKS[task][1](**off, **quiet).train()
        if hasattr(model, "dropout_features"):
            model.dropout_features = 0.0
        if hasattr(model, "final_dropout"):
            model.final_dropout = 0.0
        with torch.no_grad():  # scores that differ by more than rounding, so that no choice hangs on it
            for name, parameter in model.named_parameters():
                if "bias" not in name and "norm" not in name:
                    parameter.mul_(3)
        for bucket in range(2):
            batch = batch_of(task, bucket, 5 + bucket)
            here = _one_step(task, model.to("cpu"), batch)
            there = _one_step(task, model.to(DEVICE), batch.to(DEVICE))
            differences = {name: _relative(value, there[name]) for name, value in here.items()}
            results[f"{task} {bucket}"] = {"compared": len(here), "largest": max(differences.values()),
                                           "where": max(differences, key=differences.get)}  # fmt: skip
    return results


def _one_step(task: str, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    brain_class, _ = TASKS[task]
    self = SimpleNamespace(modules=SimpleNamespace(model=model), rng=Randomness(3), update=1)
    predictions = brain_class.compute_forward(self, batch, Stage.TRAIN)
    objective = brain_class.compute_objectives(self, predictions, batch, Stage.TRAIN)
    if task == "ctc":  # frames of padding mean nothing, and the two ways fill them differently
        real = torch.arange(predictions.log_probs.shape[1])[None] < predictions.frame_lengths[:, None]
        values = (predictions.log_probs[..., 1] * real.to(predictions.log_probs.device)).sum()
        objective = Objective(values, objective.count)
    model.zero_grad()
    objective.loss_sum.backward()
    found = {"loss": objective.loss_sum.detach(), "count": torch.as_tensor(float(objective.count))}
    found |= {f"metric {name}": torch.as_tensor(value) / max(float(count), 1.0)
              for name, (value, count) in objective.metrics.items()}  # fmt: skip
    found |= {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().cpu().double().clone() for name, value in found.items()}


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp(min=1e-3))


def graphs() -> dict[str, Any]:
    """For each task: graphs by the update in which they were made, graph breaks, and kinds of block."""
    made: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def forward(module: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
            made.append(brain.update)
            return make_boxed_func(module.forward)

        def backward(module: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
            return make_boxed_func(module.forward)

        return aot_module_simplified(graph, inputs, fw_compiler=forward, bw_compiler=backward)

    torch._dynamo.register_backend(counting, name="counting")
    results = {}
    for task in TASKS:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        made.clear()
        options = {"precision": "bf16", "compile": True, "compile_backend": "counting"}
        brain = make_brain(task, updates=4, run_opts=options, layerdrop=0.4)
        brain.fit(Batches(task))
        counters = torch._dynamo.utils.counters
        results[task] = {"made": list(made), "breaks": dict(counters["graph_break"])}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"steps": steps, "numbers": numbers, "graphs": graphs}[sys.argv[1]](), indent=1), flush=True)
    # Torch's thread for the backward passes of a device of this kind lives to the end, and aborts a process that takes
    # down its globals before it: there is nothing left to do here but that.
    os._exit(0)
