"""What `step.py` measures: one pretraining step of ours, or of transformers' model, in a process of its own.

Started by `step.py` only. The process makes its model, answers each line on its standard input with one step, and
prints a JSON line for it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from toolkit.models.wav2vec2 import Wav2Vec2Encoder, Wav2Vec2Pretraining
from toolkit.seeds import Randomness
from toolkit.training.compilation import compile_modules
from toolkit.training.devices import DTYPES, Device, prepare_process, resolve_device
from toolkit.training.distributed import World
from toolkit.training.optim import LossScale, build_optimizer
from toolkit.training.options import RunOptions
from toolkit.training.parallel import make_parallel
from toolkit.training.profiling import profile_updates
from toolkit.training.step import UpdateStep

MAX_GRAD_NORM = 10.0
OPTIMIZER = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}
BASE_CONV = ((512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2), (512, 2, 2))


@dataclass(frozen=True)
class Size:
    """The architecture that both sides build: convolutions, width, layers, inner width, heads, positional window."""

    conv_layers: tuple[tuple[int, int, int], ...] = BASE_CONV
    dim: int = 768
    num_layers: int = 12
    ffn_dim: int = 3072
    num_heads: int = 12
    pos_kernel: int = 128
    pos_groups: int = 16
    num_codes: int = 320
    final_dim: int = 256
    layerdrop: float = 0.05
    large: bool = False
    """LARGE's other settings: layer norm after each convolution, biases, norms before the blocks, no dropout."""

    def frames(self, samples: int) -> list[int]:
        """Frames after each convolution."""
        counts = []
        for _, kernel, stride in self.conv_layers:
            samples = (samples - kernel) // stride + 1
            counts.append(samples)
        return counts

    def gflop(self, batch: int, samples: int) -> float:
        """Arithmetic of one step's matrix products, forward and both backward directions, in GFLOP.

        Layerdrop is taken off by its expectation; recomputed products and the quantizer (under 1 %) are not counted.
        """
        counts = self.frames(samples)
        products, inputs = 0, 1
        for (channels, kernel, _), frames in zip(self.conv_layers, counts, strict=True):
            products += frames * kernel * inputs * channels
            inputs = channels
        frames, dim = counts[-1], self.dim
        products += frames * (inputs * dim + self.pos_kernel * dim * dim // self.pos_groups)
        layer = 4 * dim * dim + 2 * dim * self.ffn_dim + 2 * frames * dim
        products += frames * layer * self.num_layers * (1 - self.layerdrop)
        return batch * products * 2 * 3 / 1e9


TINY = Size(
    conv_layers=((32, 10, 5), (32, 8, 8), (32, 4, 4), (32, 2, 2)),
    dim=32,
    num_layers=2,
    ffn_dim=64,
    num_heads=2,
    pos_kernel=16,
    pos_groups=4,
    num_codes=8,
    final_dim=16,
)

SIZES = {
    "base": Size(),
    "large": Size(dim=1024, num_layers=24, ffn_dim=4096, num_heads=16, final_dim=768, layerdrop=0.0, large=True),
    "tiny": TINY,
    "tiny_large": replace(TINY, large=True, layerdrop=0.0),
}


class Ours:
    """A step of the toolkit as its recipes make it: forward, backward, guard, clipping, fused AdamW."""

    def __init__(
        self, size: Size, device: Device, precision: str, *, compile_mode: str = "none", parallel: str = "ddp"
    ) -> None:
        drop = 0.0 if size.large else 0.1
        encoder = Wav2Vec2Encoder(
            extractor_norm="layer" if size.large else "group",
            conv_bias=size.large,
            pre_norm=size.large,
            dropout=drop,
            attention_dropout=drop,
            dropout_input=drop,
            feature_grad_mult=1.0 if size.large else 0.1,
            conv_layers=size.conv_layers,
            dim=size.dim,
            num_layers=size.num_layers,
            ffn_dim=size.ffn_dim,
            num_heads=size.num_heads,
            pos_kernel=size.pos_kernel,
            pos_groups=size.pos_groups,
            layerdrop=size.layerdrop,
        )
        model = Wav2Vec2Pretraining(
            encoder, num_codes=size.num_codes, final_dim=size.final_dim, dropout_features=drop,
            penalty_weight=0.0 if size.large else 10.0,
        )  # fmt: skip
        self.model = model.to(device.torch_device).train()
        self.device, self.precision = device, precision
        modules = torch.nn.ModuleDict({"model": self.model})
        sharing = make_parallel(parallel, modules, World(), device)
        optimizer = build_optimizer(self.model, functools.partial(torch.optim.AdamW, **OPTIMIZER))
        sharing.follow_frozen()
        scale = LossScale(device.torch_device) if device.needs_scaler(precision) else None
        self.step = UpdateStep(
            optimizer, World(), max_grad_norm=MAX_GRAD_NORM, loss_scale=scale, parallel=sharing
        )
        if compile_mode != "none":
            compile_modules(modules, by_block=True, mode=compile_mode)
        self.update = 0

    def prepare(self, waveforms: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The step as a function that returns the loss () in nats per masked frame; drawing masks is part of it."""
        return functools.partial(self._run, waveforms)

    def _run(self, waveforms: torch.Tensor) -> torch.Tensor:
        rng = Randomness(1).child("update", self.update, 0)
        with self.device.autocast(self.precision):
            out = self.model(waveforms, None, rng=rng, update=self.update)
        self.step.backward(out.loss_sum)
        count = torch.full((), float(out.num_masked), device=waveforms.device)
        result = self.step.finish(self.update, out.loss_sum.detach().float(), count).result
        self.update += 1
        return result.loss_sum / result.count


class Peer:
    """transformers' Wav2Vec2ForPreTraining with the same sizes, dropouts and layerdrop, and torch's AdamW.

    Masks and negatives are drawn outside the measured time, as its examples do in the data loader. It has neither
    the penalty on the features nor the factor on their gradient.
    """

    def __init__(
        self, size: Size, device: Device, precision: str, *, compile_mode: str = "none", parallel: str = "ddp"
    ) -> None:
        import transformers  # only this process needs it

        config = transformers.Wav2Vec2Config(
            conv_dim=tuple(channels for channels, _, _ in size.conv_layers),
            conv_kernel=tuple(kernel for _, kernel, _ in size.conv_layers),
            conv_stride=tuple(stride for _, _, stride in size.conv_layers),
            hidden_size=size.dim,
            num_hidden_layers=size.num_layers,
            intermediate_size=size.ffn_dim,
            num_attention_heads=size.num_heads,
            num_conv_pos_embeddings=size.pos_kernel,
            num_conv_pos_embedding_groups=size.pos_groups,
            num_codevectors_per_group=size.num_codes,
            codevector_dim=size.final_dim,
            proj_codevector_dim=size.final_dim,
            hidden_dropout=0.0 if size.large else 0.1,
            attention_dropout=0.0 if size.large else 0.1,
            activation_dropout=0.0,
            feat_proj_dropout=0.0 if size.large else 0.1,
            feat_quantizer_dropout=0.0 if size.large else 0.1,
            feat_extract_norm="layer" if size.large else "group",
            conv_bias=size.large,
            do_stable_layer_norm=size.large,
            layerdrop=size.layerdrop,
            mask_time_prob=0.65,
            attn_implementation="sdpa",
        )
        self.model = transformers.Wav2Vec2ForPreTraining(config).to(device.torch_device).train()
        self.config, self.device, self.precision, self.size = config, device, precision, size
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **OPTIMIZER)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.needs_scaler(precision))
        if compile_mode != "none":
            self.model.compile(mode=compile_mode, dynamic=False)

    def prepare(self, waveforms: torch.Tensor) -> Callable[[], torch.Tensor]:
        """The step as a function that returns the loss () in nats per masked frame, its masks and negatives drawn."""
        from transformers.models.wav2vec2 import modeling_wav2vec2 as peer

        shape = (len(waveforms), self.size.frames(waveforms.shape[1])[-1])
        mask = peer._compute_mask_indices(shape, self.config.mask_time_prob, self.config.mask_time_length, min_masks=2)
        negatives = peer._sample_negative_indices(shape, self.config.num_negatives, mask)
        mask, negatives = (torch.as_tensor(t, device=waveforms.device) for t in (mask, negatives))
        return functools.partial(self._run, waveforms, mask, negatives, int(mask.sum()))

    def _run(self, waveforms: torch.Tensor, mask: torch.Tensor, negatives: torch.Tensor, count: int) -> torch.Tensor:
        with self.device.autocast(self.precision):
            loss = self.model(waveforms, mask_time_indices=mask.bool(), sampled_negative_indices=negatives).loss
        self.scaler.scale(loss / count).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach() / count


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
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
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
    build = Ours if arguments.variant == "ours" else Peer
    size = SIZES[arguments.size]
    if arguments.layerdrop is not None:
        size = replace(size, layerdrop=arguments.layerdrop)
    model = build(
        size, device, arguments.precision,
        compile_mode=arguments.compile_mode, parallel=arguments.parallel,
    )  # fmt: skip
    waveforms = torch.randn(arguments.batch, round(arguments.seconds * 16000)).to(device.torch_device)
    print(json.dumps({"said": said, "device": device.name, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "products":
            print(json.dumps({"gflops": product_rate(device, arguments.precision)}), flush=True)
        elif command == "profile":
            print(json.dumps(_profile(model, waveforms, device, int(rest[0]))), flush=True)
        else:
            steps = int(rest[0]) if command == "steps" else 1
            print(json.dumps(_timed_steps(model, waveforms, device, steps)), flush=True)


def _timed_steps(model: Ours | Peer, waveforms: torch.Tensor, device: Device, steps: int) -> dict[str, float]:
    """Means over some steps that nobody waits for in between, as in a run between two rows of its log."""
    runs = [model.prepare(waveforms) for _ in range(steps)]
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


def _profile(model: Ours | Peer, waveforms: torch.Tensor, device: Device, steps: int) -> dict[str, object]:
    """Print time by operation on standard error; returns the three largest costs and how often the host waited."""
    runs = iter([model.prepare(waveforms) for _ in range(steps)])
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
