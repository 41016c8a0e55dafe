"""data2vec of speech and of text: sizes, our steps, and what they are measured beside.

transformers has data2vec's encoders and not its pretraining. Beside speech stands data2vec as one would write it on
transformers' encoder; beside text a step of masked language modelling with its model, which has no teacher, and
predicts the words themselves.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from step_models import TINY_CONV, OurStep, PeerStep, Size, SpeechSize
from torch import Tensor, nn

from toolkit.data.text_masks import TextMasking
from toolkit.models.data2vec import Data2VecAudio, Data2VecText
from toolkit.models.text_encoder import TextEncoder
from toolkit.training.devices import Device

DECAY = 0.999
MASK_PROB, MASK_LENGTH = 0.35, 4
TEXT_GRAD_NORM = 5.0
IGNORED = -100
"""The label of tokens that transformers' loss passes over."""


@dataclass(frozen=True)
class TextSize(Size):
    """The architecture of an encoder of text: vocabulary and blocks; the last token id is the mask's."""

    vocab_size: int = 50265
    max_positions: int = 512
    layerdrop: float = 0.0
    teacher: bool = True

    def gflop(self, batch: int, length: int) -> float:
        """Arithmetic of our step's matrix products in GFLOP; the small head on the masked tokens is not counted."""
        return batch * 2 * 4 * self.layer_products(length) / 1e9


DATA2VEC_AUDIO_SIZES = {
    "base": SpeechSize(extractor_norm="layer", pos_kernel=95, pos_depth=5, teacher=True),
    "tiny": SpeechSize(
        conv_layers=TINY_CONV,
        extractor_norm="layer",
        dim=32,
        num_layers=2,
        ffn_dim=64,
        num_heads=2,
        pos_kernel=15,
        pos_groups=4,
        pos_depth=5,
        teacher=True,
    ),
}
TEXT_SIZES = {
    "base": TextSize(),
    "tiny": TextSize(dim=32, num_layers=2, ffn_dim=64, num_heads=2, vocab_size=100),
}


class OurData2VecAudio(OurStep):
    """data2vec of speech; drawing masks is part of the step."""

    def __init__(self, size: SpeechSize, device: Device, precision: str) -> None:
        encoder = size.encoder(dropout_input=0.0, feature_grad_mult=1.0)
        model = Data2VecAudio(encoder, top_layers=min(8, size.num_layers))
        super().__init__(model, device, precision, max_grad_norm=None)


class _PlainData2Vec(nn.Module):
    """transformers' Data2VecAudioModel and the linear layer that predicts from it."""

    def __init__(self, encoder: nn.Module, dim: int) -> None:
        super().__init__()
        self.encoder, self.prediction = encoder, nn.Linear(dim, dim)


class PeerData2VecAudio(PeerStep):
    """data2vec written plainly on transformers' Data2VecAudioModel, with the same sizes, dropouts and layerdrop.

    The teacher is a deep copy of the transformer, moved parameter by parameter, and hears what the student's
    convolutions made, as in fairseq. Masks are drawn outside the measured time.
    """

    def __init__(self, size: SpeechSize, device: Device, precision: str) -> None:
        import transformers  # only this process needs it

        self.config = transformers.Data2VecAudioConfig(
            **size.peer_settings(),
            num_conv_pos_embeddings=size.pos_depth,
            conv_pos_kernel_size=size.pos_kernel // size.pos_depth,
            feat_proj_dropout=0.0,
        )
        model = _PlainData2Vec(transformers.Data2VecAudioModel(self.config), size.dim)
        super().__init__(model, device, precision, max_grad_norm=None)
        self.size = size
        self.teacher = copy.deepcopy(self.model.encoder.encoder).eval().requires_grad_(False)
        self.ffn_outputs: list[Tensor] = []
        for layer in self.teacher.layers[-min(8, size.num_layers) :]:
            layer.feed_forward.register_forward_hook(lambda module, inputs, output: self.ffn_outputs.append(output))

    def prepare(self, waveforms: Tensor) -> Callable[[], Tensor]:
        """The step as a function that returns the loss per masked frame, its mask drawn."""
        from transformers.models.data2vec import modeling_data2vec_audio as peer

        shape = (len(waveforms), self.size.frames(waveforms.shape[1])[-1])
        mask = peer._compute_mask_indices(shape, self.config.mask_time_prob, self.config.mask_time_length, min_masks=1)
        return functools.partial(self._run, waveforms, torch.as_tensor(mask, device=waveforms.device).bool())

    def _run(self, waveforms: Tensor, mask: Tensor) -> Tensor:
        loss = self._update(self._loss, waveforms, mask)
        with torch.no_grad():
            for own, students in zip(self.teacher.parameters(), self.model.encoder.encoder.parameters(), strict=True):
                own.mul_(DECAY).add_(students, alpha=1 - DECAY)
        return loss

    def _loss(self, waveforms: Tensor, mask: Tensor) -> Tensor:
        encoder = self.model.encoder
        features = encoder.feature_extractor(waveforms).transpose(1, 2)
        projected, _ = encoder.feature_projection(features)
        with torch.no_grad():
            self.ffn_outputs.clear()
            self.teacher(projected)
            # (batch, frames, dim) -> (batch, dim, frames), over which the norm runs
            normed = [F.instance_norm(out.float().transpose(1, 2)) for out in self.ffn_outputs]
            targets = (sum(normed) / len(normed)).transpose(1, 2)[mask]
        masked = torch.where(mask[..., None], encoder.masked_spec_embed.to(projected.dtype), projected)
        predictions = self.model.prediction(encoder.encoder(masked).last_hidden_state[mask]).float()
        return F.mse_loss(predictions, targets, reduction="sum") * targets.shape[1] ** -0.5 / len(targets)


class _Hiding:
    """Hides tokens of a batch, anew at each call and alike on both sides, as the loader of the recipe does."""

    def __init__(self, size: TextSize) -> None:
        self.mask_id = size.vocab_size - 1
        self._masking = TextMasking(
            mask_id=self.mask_id, vocab_size=size.vocab_size, mask_prob=MASK_PROB, mask_length=MASK_LENGTH
        )
        self._rng = np.random.default_rng(1)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(batch, length) int64 with hidden tokens."""
        rows = [self._masking(row, self._rng)[0] for row in tokens.cpu().numpy()]
        return torch.from_numpy(np.stack(rows)).to(tokens.device)


class OurData2VecText(OurStep):
    """data2vec of text; masks are drawn outside the measured time, as the recipe does in the data loader."""

    def __init__(self, size: TextSize, device: Device, precision: str) -> None:
        self.hide = _Hiding(size)
        encoder = TextEncoder(
            vocab_size=size.vocab_size,
            dim=size.dim,
            num_layers=size.num_layers,
            ffn_dim=size.ffn_dim,
            num_heads=size.num_heads,
            max_positions=size.max_positions,
            layerdrop=size.layerdrop,
        )
        model = Data2VecText(encoder, mask_id=self.hide.mask_id, top_layers=min(10, size.num_layers))
        super().__init__(model, device, precision, max_grad_norm=TEXT_GRAD_NORM)

    def prepare(self, tokens: Tensor) -> Callable[[], Tensor]:
        """The step as a function that returns the loss per masked token."""
        return functools.partial(self._run, self.hide(tokens), tokens)


class PeerMaskedLM(PeerStep):
    """transformers' Data2VecTextForMaskedLM of the same size: no teacher, and a head over the vocabulary.

    The loss is over the masked tokens; the head runs over all, as transformers' does.
    """

    def __init__(self, size: TextSize, device: Device, precision: str) -> None:
        import transformers  # only this process needs it

        self.hide = _Hiding(size)
        config = transformers.Data2VecTextConfig(
            vocab_size=size.vocab_size,
            hidden_size=size.dim,
            num_hidden_layers=size.num_layers,
            intermediate_size=size.ffn_dim,
            num_attention_heads=size.num_heads,
            max_position_embeddings=size.max_positions + 2,
            type_vocab_size=1,
            pad_token_id=1,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            attn_implementation="sdpa",
        )
        model = transformers.Data2VecTextForMaskedLM(config)
        super().__init__(model, device, precision, max_grad_norm=TEXT_GRAD_NORM)

    def prepare(self, tokens: Tensor) -> Callable[[], Tensor]:
        """The step as a function that returns the loss in nats per masked token."""
        source = self.hide(tokens)
        labels = tokens.masked_fill(source == tokens, IGNORED)
        return functools.partial(self._update, self._loss, source, labels)

    def _loss(self, source: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=source, labels=labels).loss
