"""What the cases share: how a loaded model is run beside a recording, and its tensors under the originals' names."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.recording import Recording, RecordingError
from tests.parity.report import Measured
from toolkit.models.convert.common import export_tensors
from toolkit.models.convert.fairseq_names import names_table
from toolkit.models.ctc import CTCModel
from toolkit.models.data2vec import Data2VecAudio, Data2VecText
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.nn.fast.common import set_fast
from toolkit.nn.feature_extractor import FeatureExtractor
from toolkit.seeds import Randomness
from toolkit.training.devices import Device

DROPPED = ("dropout", "attention_dropout", "activation_dropout", "dropout_input", "dropout_features", "layerdrop")
ROUNDING = {"fp32": 1e-5, "bf16": 1e-2}
"""What rounding may leave of a gradient that is zero, beside gradients of size 1."""

KEY_BIAS = "self_attn.k_proj.bias"
"""Attention does not see a bias on the keys: its gradient is zero, and what is recorded is rounding."""


@dataclass(frozen=True)
class Setup:
    """How to run: on which device, in which precision ("fp32", "bf16"), by the fast forms or the plain formulas, and
    whether compiled, as ``--compile`` of a recipe does it."""

    device: Device
    precision: str
    plain: bool
    compiled: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that training runs a step in."""
        return self.device.autocast(self.precision)

    def put(self, tensor: Tensor) -> Tensor:
        """On the device."""
        return tensor.to(self.device.torch_device)


def prepare(model: nn.Module, setup: Setup) -> nn.Module:
    """The model as the recordings were made: nothing dropped, and no mask but the given ones."""
    for module in model.modules():
        for name in (*DROPPED, "final_dropout"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
        if isinstance(module, Wav2Vec2Encoder):
            module.mask_prob = module.mask_channel_prob = 0.0  # masks are given, or there are none
    set_fast(model, not setup.plain)
    if setup.compiled:
        model.compile(dynamic=False)
    return model


def randomness() -> Randomness:
    """As training passes it; with nothing to drop and every choice given, it decides nothing."""
    return Randomness(0).child("update", 0, 0)


class Inputs:
    """The recorded batch: waveforms, lengths in samples (None: all full), and which frames are real."""

    def __init__(self, recording: Recording, encoder: Wav2Vec2Encoder, setup: Setup, measured: Measured) -> None:
        self.waveforms = recording.tensor("in.source")
        measured.inputs.add("in.source")
        self.lengths: Tensor | None = None
        if "in.padding_mask" in recording.tensors:
            self.lengths = (~recording.tensors["in.padding_mask"]).sum(1)
            measured.inputs.add("in.padding_mask")
        if "in.lengths" in recording.tensors:
            if self.lengths is None:
                self.lengths = recording.tensors["in.lengths"]
            measured.add("in.lengths", self.lengths, "equal")
        self.batch, samples = self.waveforms.shape
        lengths = torch.full((self.batch,), samples) if self.lengths is None else self.lengths
        self.frames = int(encoder.frame_lengths(torch.tensor([samples])))
        # (batch, frames), True where a frame is no padding
        self.real = torch.arange(self.frames) < encoder.frame_lengths(lengths)[:, None]
        self.waveforms = setup.put(self.waveforms)

    def real_rows(self, ours: Tensor) -> Tensor:
        """(batch, frames, ...) -> (real frames, ...)."""
        return ours.detach().cpu()[self.real]

    def real_of(self, theirs: Tensor) -> Tensor:
        """(batch, frames, ...) of a recording -> (real frames, ...)."""
        return theirs[self.real]

    def real_of_time_first(self, theirs: Tensor) -> Tensor:
        """(frames, batch, ...) -> (real frames, ...)."""
        return theirs.transpose(0, 1)[self.real]


def watch(model: nn.Module, **modules: str) -> dict[str, Tensor]:
    """A dict that fills, at each forward, with what the named modules get and give (``name_in``, ``name``)."""
    seen: dict[str, Any] = {}

    def remember(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        seen[name + "_in"], seen[name] = inputs[0], output

    for name, path in modules.items():
        model.get_submodule(path).register_forward_hook(
            lambda _, inputs, output, name=name: remember(name, inputs, output)
        )
    return seen


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that the model has now, copied, under the originals' names."""
    ours = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    classes = {CTCModel: "ctc", Data2VecAudio: "data2vec_audio", Data2VecText: "data2vec_text"}
    kind = classes.get(type(model), "wav2vec2_pretraining")
    return export_tensors(names_table(kind, model.config), ours)


def say_gradients(
    recording: Recording, measured: Measured, model: nn.Module, setup: Setup, prefix: str, norms: str
) -> None:
    """Recorded gradients (``prefix``), their norms (scalars below ``norms``)."""
    tensors = [name for name in recording.tensors if name.startswith(prefix)]
    scalars = [path for path in recording.scalars if path.startswith(f"scalars.{norms}.")]
    original = {name: name.removeprefix(prefix) for name in tensors}
    original |= {path: path.removeprefix(f"scalars.{norms}.") for path in scalars}
    ours = gradients(model)
    for name in tensors:
        if original[name] in ours:
            measured.add(name, ours[original[name]], "gradients")
    for path in scalars:
        name = original[path]
        if name not in ours:
            continue
        key = path.removeprefix("scalars.")
        if name.endswith(KEY_BIAS):
            # Zero in exact arithmetic: held against the size of the gradient of the same keys' weights.
            weight = recording.scalars.get(path.removesuffix("bias") + "weight", 1.0)
            measured.scalar(key, ours[name].norm(), limit=ROUNDING[setup.precision] * float(weight))
        else:
            measured.scalar(key, ours[name].norm(), "gradients")


def say_trained(recording: Recording, measured: Measured, model: nn.Module, group: str) -> None:
    """Which parameters got a gradient, by the originals' names; a key's bias may be on either side."""
    lists = {
        path: names
        for path in (f"{group}.params_with_nonzero_grad", f"{group}.params_with_zero_or_no_grad")
        if isinstance(names := recording.scalars.get("scalars." + path), list)
    }
    every = sorted({name for names in lists.values() for name in names})
    ours = gradients(model)
    trained = {name for name in every if name in ours and bool(ours[name].any())}
    for path, names in lists.items():
        mine = trained if path.endswith("nonzero_grad") else set(every) - trained
        biases = {name for name in every if name.endswith(KEY_BIAS)}
        measured.scalar(path, (mine - biases) | (biases & set(names)), "equal")


def layers_of(encoded_layers: Any, inputs: Inputs, measured: Measured, layer: str, ffn: str | None) -> None:
    """Outputs of all layers, and of their feed-forward networks, recorded as (frames, batch, dim)."""
    for index, (output, inner) in enumerate(encoded_layers):
        measured.add(f"{layer}{index}", inputs.real_rows(output), view=inputs.real_of_time_first)
        if ffn is not None:
            measured.add(f"{ffn}{index}", inputs.real_rows(inner), view=inputs.real_of_time_first)


def say_convolutions(
    recording: Recording, measured: Measured, encoder: Wav2Vec2Encoder, inputs: Inputs, setup: Setup
) -> None:
    """mid.convI_out (batch, channels, frames), and mid.convI_head, the first frames of the first utterance.

    The first I convolutions are an extractor of their own, so that what is compared is what runs in training.
    """
    whole, config = encoder.feature_extractor, encoder.config
    for index in range(len(whole.blocks)):
        names = [name for name in (f"mid.conv{index}_out", f"mid.conv{index}_head") if name in recording.tensors]
        if not names:
            continue
        part = FeatureExtractor(
            config["conv_layers"][: index + 1],
            norm=config["extractor_norm"],
            bias=config["conv_bias"],
            norm_over_padding=True,
        )
        part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()})
        part = set_fast(part.to(inputs.waveforms.device), not setup.plain)
        dtype = torch.bfloat16 if setup.precision == "bf16" else None
        with torch.no_grad():
            out = part(inputs.waveforms, inputs.lengths, dtype=dtype).float().transpose(1, 2).cpu()
        for name in names:
            head = recording.tensors[name].shape[-1]
            measured.add(name, out if name.endswith("_out") else out[0, :, :head])


def scalars_as_given(recording: Recording, measured: Measured, paths: list[str]) -> None:
    """Numbers that tell the model what to do."""
    for path in paths:
        if "scalars." + path in recording.scalars:
            measured.inputs.add("scalars." + path)


def check_mask(recording: Recording, name: str, shape: tuple[int, int]) -> Tensor:
    """A recorded mask of the right shape."""
    mask = recording.tensor(name)
    if tuple(mask.shape) != shape or mask.dtype != torch.bool:
        raise RecordingError(
            f"{recording.folder}: {name} is {mask.dtype} of {tuple(mask.shape)}, expected truth values of {shape}."
        )
    return mask
