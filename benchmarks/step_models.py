"""What the measured steps have in common, and wav2vec 2.0: its sizes, our step, and transformers' step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.models.wav2vec2 import Wav2Vec2Encoder, Wav2Vec2Pretraining
from toolkit.seeds import Randomness
from toolkit.training.compilation import compile_modules
from toolkit.training.devices import Device
from toolkit.training.distributed import World
from toolkit.training.objective import on_device
from toolkit.training.optim import LossScale, build_optimizer
from toolkit.training.parallel import make_parallel
from toolkit.training.step import UpdateStep

OPTIMIZER = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}
BASE_CONV = ((512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2), (512, 2, 2))
TINY_CONV = ((32, 10, 5), (32, 8, 8), (32, 4, 4), (32, 2, 2))


@dataclass(frozen=True)
class Size:
    """The blocks that both sides build: width, layers, inner width, heads, and whether a teacher runs beside them."""

    dim: int = 768
    num_layers: int = 12
    ffn_dim: int = 3072
    num_heads: int = 12
    layerdrop: float = 0.05
    teacher: bool = False

    def layer_products(self, positions: int) -> float:
        """Multiplications of the blocks for one sequence, forward; layerdrop is taken off by its expectation."""
        layer = 4 * self.dim**2 + 2 * self.dim * self.ffn_dim + 2 * positions * self.dim
        return positions * layer * self.num_layers * (1 - self.layerdrop)


@dataclass(frozen=True)
class SpeechSize(Size):
    """The architecture of an encoder of speech: convolutions, positional convolutions, and the blocks."""

    conv_layers: tuple[tuple[int, int, int], ...] = BASE_CONV
    extractor_norm: str = "group"
    pos_kernel: int = 128
    pos_groups: int = 16
    pos_depth: int = 1
    num_codes: int = 320
    final_dim: int = 256
    large: bool = False
    """wav2vec 2.0 LARGE's other settings: layer norm after each convolution, biases, norms before the blocks, no
    dropout, no penalty."""

    def frames(self, samples: int) -> list[int]:
        """Frames after each convolution."""
        counts = []
        for _, kernel, stride in self.conv_layers:
            samples = (samples - kernel) // stride + 1
            counts.append(samples)
        return counts

    def gflop(self, batch: int, samples: int) -> float:
        """Arithmetic of one step's matrix products in GFLOP: forward, both backward directions, and the teacher's pass.

        Layerdrop is taken off by its expectation; recomputed products and the quantizer (under 1 %) are not counted.
        """
        counts = self.frames(samples)
        convolutions, inputs = 0, 1
        for (channels, kernel, _), frames in zip(self.conv_layers, counts, strict=True):
            convolutions += frames * kernel * inputs * channels
            inputs = channels
        frames, dim = counts[-1], self.dim
        body = frames * (inputs * dim + self.pos_kernel * dim * dim // self.pos_groups) + self.layer_products(frames)
        # The teacher hears what the student's convolutions made, and is given no gradient.
        return batch * 2 * (3 * convolutions + (4 if self.teacher else 3) * body) / 1e9

    def encoder(self, **settings: Any) -> Wav2Vec2Encoder:
        """Our encoder of this size."""
        if self.large:
            settings = {"conv_bias": True, "pre_norm": True, "dropout": 0.0, "attention_dropout": 0.0,
                        "dropout_input": 0.0, "feature_grad_mult": 1.0, **settings}  # fmt: skip
        return Wav2Vec2Encoder(
            conv_layers=self.conv_layers,
            extractor_norm=self.extractor_norm,
            dim=self.dim,
            num_layers=self.num_layers,
            ffn_dim=self.ffn_dim,
            num_heads=self.num_heads,
            pos_kernel=self.pos_kernel,
            pos_groups=self.pos_groups,
            pos_depth=self.pos_depth,
            layerdrop=self.layerdrop,
            **settings,
        )

    def peer_settings(self) -> dict[str, Any]:
        """What transformers' configurations of speech encoders have in common."""
        return {
            "conv_dim": tuple(channels for channels, _, _ in self.conv_layers),
            "conv_kernel": tuple(kernel for _, kernel, _ in self.conv_layers),
            "conv_stride": tuple(stride for _, _, stride in self.conv_layers),
            "hidden_size": self.dim,
            "num_hidden_layers": self.num_layers,
            "intermediate_size": self.ffn_dim,
            "num_attention_heads": self.num_heads,
            "num_conv_pos_embedding_groups": self.pos_groups,
            "hidden_dropout": 0.0 if self.large else 0.1,
            "attention_dropout": 0.0 if self.large else 0.1,
            "activation_dropout": 0.0,
            "layerdrop": self.layerdrop,
            "mask_time_prob": 0.65,
            "attn_implementation": "sdpa",
        }


TINY = SpeechSize(
    conv_layers=TINY_CONV,
    dim=32,
    num_layers=2,
    ffn_dim=64,
    num_heads=2,
    pos_kernel=16,
    pos_groups=4,
    num_codes=8,
    final_dim=16,
)
LARGE_FORM: dict[str, Any] = {"extractor_norm": "layer", "layerdrop": 0.0, "large": True}
WAV2VEC2_SIZES = {
    "base": SpeechSize(),
    "large": SpeechSize(dim=1024, num_layers=24, ffn_dim=4096, num_heads=16, final_dim=768, **LARGE_FORM),
    "tiny": TINY,
    "tiny_large": replace(TINY, **LARGE_FORM),
}


class OurStep:
    """A step of the toolkit as its recipes make it: forward, backward, guard, clipping, fused AdamW.

    Arguments
    ---------
    model : gives ``loss_sum`` and ``num_masked``.
    device, precision : where, and in which format.
    max_grad_norm : clip the gradient's norm to this; None = off.
    """

    def __init__(self, model: nn.Module, device: Device, precision: str, *, max_grad_norm: float | None) -> None:
        self.model = model.to(device.torch_device).train()
        self.device, self.precision, self.max_grad_norm = device, precision, max_grad_norm
        self.update = 0
        self.arrange()

    def arrange(self, *, compile_mode: str = "none", parallel: str = "ddp") -> None:
        """Before the first step: compile the blocks (a mode of torch.compile) and share the model out."""
        modules = nn.ModuleDict({"model": self.model})
        sharing = make_parallel(parallel, modules, World(), self.device)
        optimizer = build_optimizer(self.model, functools.partial(torch.optim.AdamW, **OPTIMIZER))
        sharing.follow_frozen()
        scale = LossScale(self.device.torch_device) if self.device.needs_scaler(self.precision) else None
        self.step = UpdateStep(
            optimizer, World(), max_grad_norm=self.max_grad_norm, loss_scale=scale, parallel=sharing
        )
        if compile_mode != "none":
            compile_modules(modules, by_block=True, mode=compile_mode)

    def prepare(self, batch: Tensor) -> Callable[[], Tensor]:
        """The step as a function that returns the loss () per masked position."""
        return functools.partial(self._run, batch, None)

    def _run(self, *inputs: Tensor | None) -> Tensor:
        rng = Randomness(1).child("update", self.update, 0)
        with self.device.autocast(self.precision):
            out = self.model(*inputs, rng=rng, update=self.update)
        self.step.backward(out.loss_sum)
        count = on_device(out.num_masked, self.device.torch_device)
        result = self.step.finish(self.update, out.loss_sum.detach().float(), count).result
        self.update += 1
        if hasattr(self.model, "finish_update"):  # a teacher moves
            self.model.finish_update(self.update)
        return result.loss_sum / result.count


class PeerStep:
    """A step with torch's own means: autocast, clipping, AdamW as it comes; arguments as of `OurStep`."""

    def __init__(self, model: nn.Module, device: Device, precision: str, *, max_grad_norm: float | None) -> None:
        self.model = model.to(device.torch_device).train()
        self.device, self.precision, self.max_grad_norm = device, precision, max_grad_norm
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **OPTIMIZER)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.needs_scaler(precision))

    def arrange(self, *, compile_mode: str = "none", parallel: str = "ddp") -> None:
        """Before the first step: compile the model; it is not shared out."""
        if compile_mode != "none":
            self.model.compile(mode=compile_mode, dynamic=False)

    def _update(self, loss_of: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """One step on the mean loss () that ``loss_of(*inputs)`` gives; returns it."""
        with self.device.autocast(self.precision):
            loss = loss_of(*inputs)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


class OurWav2Vec2(OurStep):
    """wav2vec 2.0; drawing masks and negatives is part of the step."""

    def __init__(self, size: SpeechSize, device: Device, precision: str) -> None:
        model = Wav2Vec2Pretraining(
            size.encoder(), num_codes=size.num_codes, final_dim=size.final_dim,
            dropout_features=0.0 if size.large else 0.1, penalty_weight=0.0 if size.large else 10.0,
        )  # fmt: skip
        super().__init__(model, device, precision, max_grad_norm=10.0)


class PeerWav2Vec2(PeerStep):
    """transformers' Wav2Vec2ForPreTraining with the same sizes, dropouts and layerdrop.

    Masks and negatives are drawn outside the measured time, as its examples do in the data loader. It has neither
    the penalty on the features nor the factor on their gradient.
    """

    def __init__(self, size: SpeechSize, device: Device, precision: str) -> None:
        import transformers  # only this process needs it

        self.config = transformers.Wav2Vec2Config(
            **size.peer_settings(),
            num_conv_pos_embeddings=size.pos_kernel,
            num_codevectors_per_group=size.num_codes,
            codevector_dim=size.final_dim,
            proj_codevector_dim=size.final_dim,
            feat_proj_dropout=0.0 if size.large else 0.1,
            feat_quantizer_dropout=0.0 if size.large else 0.1,
            feat_extract_norm=size.extractor_norm,
            conv_bias=size.large,
            do_stable_layer_norm=size.large,
        )
        super().__init__(transformers.Wav2Vec2ForPreTraining(self.config), device, precision, max_grad_norm=10.0)
        self.size = size

    def prepare(self, waveforms: Tensor) -> Callable[[], Tensor]:
        """The step as a function that returns the loss () in nats per masked frame, its masks and negatives drawn."""
        from transformers.models.wav2vec2 import modeling_wav2vec2 as peer

        shape = (len(waveforms), self.size.frames(waveforms.shape[1])[-1])
        mask = peer._compute_mask_indices(shape, self.config.mask_time_prob, self.config.mask_time_length, min_masks=2)
        negatives = peer._sample_negative_indices(shape, self.config.num_negatives, mask)
        mask, negatives = (torch.as_tensor(t, device=waveforms.device) for t in (mask, negatives))
        return functools.partial(self._update, self._loss, waveforms, mask, negatives)

    def _loss(self, waveforms: Tensor, mask: Tensor, negatives: Tensor) -> Tensor:
        out = self.model(waveforms, mask_time_indices=mask.bool(), sampled_negative_indices=negatives)
        return out.loss / mask.sum()
