"""Batches of speech: padded tensors with absolute lengths in samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import ConfigError


@dataclass(frozen=True, eq=False)
class SpeechBatch:
    """Some utterances, padded to one length.

    Arguments
    ---------
    ids : IDs of the utterances.
    waveforms : (batch, samples) float32, zeros after the end of each utterance.
    lengths : (batch,) int64, samples of each utterance; always on the host.
    tokens : (batch, tokens) int64, padded with ``PAD_TOKEN``; None without transcripts.
    token_lengths : (batch,) int64, always on the host; None without transcripts.
    texts : transcripts; None without.
    extras : other output keys of the dataset, a list of the utterances' values each.
    """

    ids: list[str]
    waveforms: Tensor
    lengths: Tensor
    tokens: Tensor | None = None
    token_lengths: Tensor | None = None
    texts: list[str] | None = None
    extras: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SpeechBatch:
        """The batch with waveforms and tokens on ``device``.

        Lengths stay on the host: frame counts, masks and CTC ask for them there, and none has to wait for the device.
        """
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking), names=("waveforms", "tokens"))

    def pin_memory(self) -> SpeechBatch:
        """The batch with its tensors in page-locked memory, for copies that overlap with work."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def seconds(self, sample_rate: int) -> float:
        """Seconds of audio, without padding."""
        return float(self.lengths.sum()) / sample_rate

    @property
    def relative_lengths(self) -> Tensor:
        """(batch,) float32, lengths as shares of the padded size: for code that comes from SpeechBrain."""
        return self.lengths.to(torch.float32) / self.waveforms.shape[1]

    def _mapped(
        self,
        move: Callable[[Tensor], Tensor],
        names: Sequence[str] = ("waveforms", "lengths", "tokens", "token_lengths"),
    ) -> SpeechBatch:
        moved = {name: move(value) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **moved)


PAD_TOKEN = 1
"""Padding of ``tokens``: fairseq's ``<pad>``. What stands there never counts; token_lengths say where it begins."""

_OWN_KEYS = ("id", "waveform", "tokens", "text")


def collate_speech(items: Sequence[Mapping[str, Any]], *, samples: int | None = None) -> SpeechBatch:
    """Utterances (output keys of a dataset) to a batch.

    Arguments
    ---------
    items : dictionaries with "id" and "waveform" (samples,), and perhaps "tokens", "text" and others.
    samples : pad to this many samples; None or less than the longest: to the longest. Speech is never cut here.

    Raises
    ------
    ConfigError if "id" or "waveform" is missing.
    """
    for key in ("id", "waveform"):
        if not items or key not in items[0]:
            raise ConfigError(
                f"a batch of speech needs {key!r} of each utterance; add it to the dataset's output keys."
            )
    waveforms, lengths = _padded([item["waveform"] for item in items], torch.float32, samples or 0, 0.0)
    tokens = token_lengths = None
    if "tokens" in items[0]:
        tokens, token_lengths = _padded([item["tokens"] for item in items], torch.int64, 0, PAD_TOKEN)
    return SpeechBatch(
        ids=[item["id"] for item in items],
        waveforms=waveforms,
        lengths=lengths,
        tokens=tokens,
        token_lengths=token_lengths,
        texts=[item["text"] for item in items] if "text" in items[0] else None,
        extras={key: [item[key] for item in items] for key in items[0] if key not in _OWN_KEYS},
    )


def _padded(rows: Sequence[np.ndarray], dtype: torch.dtype, size: int, fill: float) -> tuple[Tensor, Tensor]:
    """(rows, max(size, longest)) filled up with ``fill``, and (rows,) int64 lengths."""
    lengths = [len(row) for row in rows]
    size = max(size, *lengths)
    padded = torch.empty((len(rows), size), dtype=dtype)
    values = padded.numpy()
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        values[index, :length] = row
        values[index, length:] = fill
    return padded, torch.tensor(lengths, dtype=torch.int64)
