"""What `step.py` measures: one pretraining step of ours, or of its peer on transformers, in a process of its own.

Started by `step.py` only. The process makes its model, answers each line on its standard input with one step, and
prints a JSON line for it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from step_data2vec import (
    DATA2VEC_AUDIO_SIZES,
    TEXT_SIZES,
    OurData2VecAudio,
    OurData2VecText,
    PeerData2VecAudio,
    PeerMaskedLM,
    TextSize,
)
from step_models import WAV2VEC2_SIZES, OurStep, OurWav2Vec2, PeerStep, PeerWav2Vec2, SpeechSize

from toolkit.training.devices import DTYPES, Device, prepare_process, resolve_device
from toolkit.training.options import RunOptions
from toolkit.training.profiling import profile_updates

SAMPLE_RATE = 16000


@dataclass(frozen=True)
class Measured:
    """A model that can be measured.

    sizes : architectures by name.
    ours, peer : make the steps: ``(size, device, precision)``.
    peer_words : what the peer is.
    unit, short_unit : what is counted per second.
    batch : sequences in a batch, unless told otherwise.
    """

    sizes: Mapping[str, SpeechSize | TextSize]
    ours: Callable[..., OurStep]
    peer: Callable[..., PeerStep]
    peer_words: str
    unit: str
    short_unit: str
    batch: int

    @property
    def is_text(self) -> bool:
        """Whether it reads tokens, not audio."""
        return self.ours is OurData2VecText

    def amount(self, options: argparse.Namespace) -> float:
        """Audio seconds, or tokens, of a step."""
        return options.batch * (options.length if self.is_text else options.seconds)

    def gflop(self, options: argparse.Namespace) -> float:
        """Arithmetic of one step of ours."""
        length = options.length if self.is_text else round(options.seconds * SAMPLE_RATE)
        return self.sizes[options.size].gflop(options.batch, length)

    def inputs(self, options: argparse.Namespace) -> torch.Tensor:
        """(batch, samples) noise, or (batch, length) random tokens from ``<s>`` to ``</s>``; alike on both sides."""
        generator = torch.Generator().manual_seed(1)
        if not self.is_text:
            return torch.randn(options.batch, round(options.seconds * SAMPLE_RATE), generator=generator)
        last = self.sizes[options.size].vocab_size - 1
        tokens = torch.randint(4, last, (options.batch, options.length), generator=generator)
        tokens[:, 0], tokens[:, -1] = 0, 2
        return tokens


AUDIO_UNIT = ("audio second", "audio s/s")
MODELS = {
    "w2v2": Measured(WAV2VEC2_SIZES, OurWav2Vec2, PeerWav2Vec2, "transformers", *AUDIO_UNIT, 2),
    "data2vec_audio": Measured(
        DATA2VEC_AUDIO_SIZES, OurData2VecAudio, PeerData2VecAudio, "data2vec on transformers", *AUDIO_UNIT, 2
    ),
    "data2vec_text": Measured(
        TEXT_SIZES, OurData2VecText, PeerMaskedLM, "transformers' masked LM", "token", "tokens/s", 4
    ),
}


def product_rate(device: Device, precision: str) -> float:
    """GFLOP per second of the model's largest kind of product (rows x 3072 x 768), the best of a few."""
    dtype = DTYPES[precision]
    rows = 1024 if device.type == "cpu" else 16384
    left = torch.randn(rows, 3072, device=device.torch_device, dtype=dtype)
    right = torch.randn(768, 3072, device=device.torch_device, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            torch.nn.functional.linear(left, right)
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return 4 * 2 * rows * 3072 * 768 / best / 1e9


def main() -> None:
    """Answer each line on standard input: `step`, `steps N`, `products`, or `profile N`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=["ours", "peer", "tuned_peer"], required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--size", choices=["base", "large", "tiny", "tiny_large"], required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile_mode", default="none")
    parser.add_argument("--parallel", default="ddp")
    parser.add_argument("--layerdrop", type=float)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    options = RunOptions(
        device=arguments.device,
        precision=arguments.precision,
        threads=arguments.threads,
        fast_allocator=arguments.variant != "peer",
        fast_products=arguments.variant != "peer",
    )
    said = prepare_process(device, options)
    torch.manual_seed(0)
    measured = MODELS[arguments.model]
    build = measured.ours if arguments.variant == "ours" else measured.peer
    size = measured.sizes[arguments.size]
    if arguments.layerdrop is not None:
        size = replace(size, layerdrop=arguments.layerdrop)
    model = build(size, device, arguments.precision)
    model.arrange(compile_mode=arguments.compile_mode, parallel=arguments.parallel)
    inputs = measured.inputs(arguments).to(device.torch_device)
    print(json.dumps({"said": said, "device": device.name, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "products":
            print(json.dumps({"gflops": product_rate(device, arguments.precision)}), flush=True)
        elif command == "profile":
            print(json.dumps(_profile(model, inputs, device, int(rest[0]))), flush=True)
        else:
            steps = int(rest[0]) if command == "steps" else 1
            print(json.dumps(_timed_steps(model, inputs, device, steps)), flush=True)


def _timed_steps(
    model: OurStep | PeerStep, inputs: torch.Tensor, device: Device, steps: int
) -> dict[str, float]:
    """Means over some steps that nobody waits for in between, as in a run between two rows of its log."""
    runs = [model.prepare(inputs) for _ in range(steps)]
    device.synchronize()
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    for run in runs:
        loss = run()
    device.synchronize()
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall": wall / steps,
        "user": (after.ru_utime - before.ru_utime) / steps,
        "kernel": (after.ru_stime - before.ru_stime) / steps,
        "peak_memory_gb": device.peak_memory_bytes() / 1e9,
        "loss": float(loss),
    }


def _profile(model: OurStep | PeerStep, inputs: torch.Tensor, device: Device, steps: int) -> dict[str, object]:
    """Print time by operation on standard error; returns the three largest costs and how often the host waited."""
    runs = iter([model.prepare(inputs) for _ in range(steps)])
    profile, _ = profile_updates(
        lambda: next(runs)(), updates=steps, synchronize=device.synchronize, on_device=device.type != "cpu"
    )
    print(profile.table(), file=sys.stderr, flush=True)
    return {
        "step_ms": profile.milliseconds,
        "busy": profile.busy,
        "largest": profile.largest(3),
        "host_waits_per_step": profile.waits,
    }


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
