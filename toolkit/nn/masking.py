"""Span masks over frames and channels (wav2vec 2.0, section 3.1 and appendix A), one random stream per utterance.

Everything here runs on the host in NumPy: a mask costs well under a millisecond per utterance, and the
counts of masked frames must be known before the device is asked for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import ModelError
from toolkit.nn.transfer import to_device
from toolkit.seeds import Randomness

LARGEST_DRAW = 1 - 2.0**-53
"""The largest number that ``Generator.random`` gives."""

SHORTEST_MASKABLE = 3
"""Rows of fewer positions than this are never masked: a prediction needs something left to be made from, and one
masked frame alone has no other to be told from."""


def check_mask_settings(prob: float, length: int, name: str) -> None:
    """Refuse a mask that makes no sense.

    Raises
    ------
    ModelError : ``prob`` is outside 0..1 or ``length`` is below 1.
    """
    if not 0 <= prob <= 1:
        raise ModelError(
            f"{name}_prob is {prob}, expected 0 to 1: the share that masked spans would cover if none overlapped."
        )
    if length < 1:
        raise ModelError(f"{name}_length is {length}, expected at least 1 position per span.")


def span_positions(
    num_positions: int, *, mask_prob: float, mask_length: int, min_masks: int, generator: np.random.Generator
) -> np.ndarray:
    """The masked positions of one row, sorted and unique.

    As in fairseq: ``int(mask_prob * n / mask_length + u)`` spans, u uniform in 0..1, at least ``min_masks``;
    their starts are drawn without replacement and leave room for a whole span, spans may overlap.
    A mask_prob of 0.65 therefore masks about 49 % of the positions.
    Beyond the original: a row that would be masked wholly keeps one position (the original raises an error),
    and a row of one or two positions is not masked.

    Arguments
    ---------
    num_positions : real positions of the row (frames without padding, or channels).
    mask_prob : share of positions that the spans would cover if none overlapped.
    mask_length : positions per span.
    min_masks : least number of spans; 0 lets a row go unmasked.
    generator : the row's own stream.

    Returns
    -------
    (masked,) int64
    """
    spans = max(int(mask_prob * num_positions / mask_length + generator.random()), min_masks)
    if spans == 0 or num_positions < SHORTEST_MASKABLE:
        return np.empty(0, dtype=np.int64)
    # A row too short for so many different starts gives up the room for whole spans at its end.
    room = mask_length if num_positions - mask_length > spans else num_positions - spans - 1
    starts = generator.choice(num_positions - room, spans, replace=False)
    positions = np.unique(starts[:, None] + np.arange(mask_length))
    positions = positions[positions < num_positions]
    if len(positions) == num_positions:
        positions = np.delete(positions, generator.integers(num_positions))
    return positions


def most_masked(num_positions: int, *, mask_prob: float, mask_length: int, min_masks: int) -> int:
    """The most positions that :func:`span_positions` can mask in rows of at most ``num_positions``."""
    if num_positions < SHORTEST_MASKABLE:
        return 0
    spans = max(int(mask_prob * num_positions / mask_length + LARGEST_DRAW), min_masks)
    return min(spans * mask_length, num_positions - 1)


def span_mask(
    row_lengths: Sequence[int],
    size: int,
    *,
    mask_prob: float,
    mask_length: int,
    min_masks: int = 0,
    equal_counts: bool = True,
    rng: Randomness,
    stream: str = "mask",
) -> np.ndarray:
    """Span masks for a batch; each row's mask is a function of ``rng`` and the row's index alone.

    Arguments
    ---------
    row_lengths : real positions of each row; nothing beyond them is masked.
    size : positions of the padded batch.
    mask_prob, mask_length, min_masks : see :func:`span_positions`.
    equal_counts : trim every row to the smallest count among the masked rows by dropping random positions, as
        fairseq does (it takes spans apart where lengths differ). Rows without any mask stay without and set
        no minimum.
    rng : place in the tree of random streams; row r draws from ``rng.numpy(stream, r)``.
    stream : name of the streams, so that time and channel masks differ.

    Returns
    -------
    (batch, size) bool, True where masked.

    Example
    -------
    >>> mask = span_mask([50, 30], 50, mask_prob=0.65, mask_length=10, min_masks=2, rng=Randomness(1))
    >>> mask.shape, bool(mask[1, 30:].any()), len(set(mask.sum(1).tolist()))
    ((2, 50), False, 1)
    """
    generators = [rng.numpy(stream, row) for row in range(len(row_lengths))]
    rows = [
        span_positions(
            int(length), mask_prob=mask_prob, mask_length=mask_length, min_masks=min_masks, generator=generator
        )
        for length, generator in zip(row_lengths, generators, strict=True)
    ]
    if equal_counts:
        fewest = min((len(row) for row in rows if len(row)), default=0)
        rows = [
            generator.choice(row, fewest, replace=False) if len(row) > fewest else row
            for row, generator in zip(rows, generators, strict=True)
        ]
    mask = np.zeros((len(rows), size), dtype=bool)
    for row, positions in enumerate(rows):
        mask[row, positions] = True
    return mask


@dataclass(frozen=True)
class MaskedFrames:
    """Where a batch is masked, known on the host and on the device.

    The number of masked frames differs from batch to batch, and tensors of S rows have a new shape each time. Where
    that costs a compilation, there are ``capacity`` rows for each utterance instead, whatever is masked: first its
    masked frames, then filling of weight 0. R is S without filling, else batch * capacity.

    mask : (batch, frames) bool NumPy array, True where masked.
    counts : masked frames of each utterance; S in all.
    positions : (R,) int64 tensor on the device, into the batch * frames rows, utterance by utterance. What fills up is
        the utterance's first frame.
    weights : (R,) float32 on the device, 1 for a masked frame and 0 for filling; None: nothing was filled up.
    slots : (S,) int64 NumPy array, the row of each masked frame among the R; None: nothing was filled up.
    order : (R,) int64 on the device, the number (0 to S - 1) of the masked frame in each row, 0 in what fills up; None:
        nothing was filled up.
    on_device : ``mask`` as a tensor there; None: nothing was filled up.
    """

    mask: np.ndarray
    counts: tuple[int, ...]
    positions: Tensor
    weights: Tensor | None = None
    slots: np.ndarray | None = None
    order: Tensor | None = None
    on_device: Tensor | None = None

    @classmethod
    def of(
        cls, mask: np.ndarray | Tensor, device: torch.device | str, *, capacity: int | None = None
    ) -> MaskedFrames:
        """From a (batch, frames) mask; one on a device other than the CPU is fetched, which waits for it.

        Arguments
        ---------
        mask : True where masked.
        device : where the tensors are needed.
        capacity : rows for each utterance, more if one has more masked frames; None: no filling.
        """
        host = (mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)).astype(bool, copy=False)
        found, counts = np.flatnonzero(host), host.sum(1)
        if capacity is None:
            return cls(host, tuple(counts.tolist()), to_device(torch.from_numpy(found), device))
        batch, frames = host.shape
        capacity = max(capacity, int(counts.max(initial=0)))
        # where each masked frame stands among those of its own utterance
        within = np.arange(len(found)) - np.repeat(np.cumsum(counts) - counts, counts)
        slots = found // frames * capacity + within
        positions = np.repeat(np.arange(batch) * frames, capacity)
        positions[slots] = found
        counted = np.zeros(batch * capacity, dtype=bool)
        counted[slots] = True
        order = np.zeros(batch * capacity, dtype=np.int64)
        order[slots] = np.arange(len(found))
        arrays = (positions, counted, order, host)
        positions, counted, order, on_device = (to_device(torch.from_numpy(array), device) for array in arrays)
        return cls(host, tuple(counts.tolist()), positions, counted.float(), slots, order, on_device)

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Rows of each utterance, filling included; R in all."""
        if self.weights is None:
            return self.counts
        return (len(self.weights) // len(self.counts),) * len(self.counts)

    def spread_rows(self, rows: np.ndarray | Tensor) -> Tensor:
        """(S, ...) positions among the S masked frames -> (R, ...) on the device, positions among the R rows."""
        if self.slots is None:
            return self.spread(rows)
        return self.spread(self.slots[torch.as_tensor(rows).cpu().numpy()])

    def spread(self, values: np.ndarray | Tensor) -> Tensor:
        """(S, ...) on the host or the device -> (R, ...) on the device, zeros in what fills up."""
        if self.slots is None or self.weights is None:
            return to_device(torch.as_tensor(values), self.positions.device)
        host = torch.as_tensor(values).cpu()
        out = host.new_zeros(len(self.weights), *host.shape[1:])
        out[torch.from_numpy(self.slots)] = host
        return to_device(out, self.positions.device)

    @property
    def total(self) -> int:
        """S, the masked frames of the whole batch."""
        return sum(self.counts)
