"""fairseq's span masks, draw for draw: for repeating its runs, and for comparing with them.

The toolkit's own masks (:func:`toolkit.nn.masking.span_mask`) follow the same rules from one stream per utterance.
Here the order of the draws is the original's too. Its two generations differ in where they draw from: releases up to
0.12.2 use NumPy's global generator for the whole batch, the later ones a generator for each row. The later ones fail
where these settings are asked for: spans that must not overlap, and spans of uniform lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.errors import ModelError

Draws = np.random.RandomState | np.random.Generator


@dataclass(frozen=True, kw_only=True)
class FairseqMasking:
    """Settings of a mask, by the toolkit's names; beside each the original's where it differs.

    Arguments
    ---------
    mask_prob, mask_length, min_masks : share, positions per span, least number of spans.
    lengths : "static", "uniform", "normal" or "poisson" (mask_type).
    other : lower end of uniform lengths, standard deviation of normal ones (mask_other).
    overlap : whether spans may overlap (not no_overlap).
    min_space : positions left between spans that may not overlap.
    equal_counts : bring all rows to the smallest count (require_same_masks).
    dropout : share of the masked positions that are let go again (mask_dropout).

    Example
    -------
    >>> settings = FairseqMasking(mask_prob=0.65, mask_length=10, min_masks=2)
    >>> mask = settings.release_mask([100, 90], 100, np.random.RandomState(2))
    >>> mask.shape, int(mask[0].sum()) == int(mask[1].sum()), bool(mask[1, 90:].any())
    ((2, 100), True, False)
    """

    mask_prob: float
    mask_length: int
    min_masks: int = 0
    lengths: str = "static"
    other: float = 0.0
    overlap: bool = True
    min_space: int = 0
    equal_counts: bool = True
    dropout: float = 0.0

    def release_mask(
        self, row_lengths: Sequence[int] | None, size: int, state: np.random.RandomState, *, rows: int | None = None
    ) -> np.ndarray:
        """The mask of releases up to 0.12.2.

        Arguments
        ---------
        row_lengths : positions of each row without padding; None: all full, and all rows have the same number of
            spans.
        size : positions of the padded batch.
        state : what NumPy's global generator was: ``np.random.RandomState(seed)`` after ``np.random.seed(seed)``.
        rows : of the batch, where ``row_lengths`` is None.

        Returns
        -------
        (rows, size) bool, True where masked.
        """
        shared = self._count(size, state)  # drawn in any case
        if row_lengths is None:
            counts = [(size, shared)] * (rows or 1)
            masked = [self._positions(length, spans, state) for length, spans in counts]
        else:
            masked = [self._positions(length, self._count(length, state), state) for length in row_lengths]
        return self._finished(masked, size, state)

    def main_mask(
        self, row_lengths: Sequence[int], size: int, generators: Sequence[np.random.Generator]
    ) -> np.ndarray:
        """The mask of the main branch: a generator for each row, the last of which trims all rows.

        Arguments
        ---------
        row_lengths : positions of each row without padding.
        size : positions of the padded batch.
        generators : one for each row, ``np.random.default_rng(seed)``.

        Returns
        -------
        (rows, size) bool, True where masked.

        Raises
        ------
        ModelError : settings with which the original fails, or a row that would be masked wholly.
        """
        if not self.overlap or self.lengths == "uniform":
            raise ModelError(
                "fairseq's main branch fails for masks without overlap and for uniform lengths; take release_mask."
            )
        masked = [
            self._positions(length, self._count(length, generator), generator)
            for length, generator in zip(row_lengths, generators, strict=True)
        ]
        for row, (positions, length) in enumerate(zip(masked, row_lengths, strict=True)):
            if len(positions) >= length:
                raise ModelError(f"row {row} would be masked wholly, all {length} positions; mask less.")
        return self._finished(masked, size, generators[-1])

    def _count(self, length: int, draws: Draws) -> int:
        return max(self.min_masks, int(self.mask_prob * length / float(self.mask_length) + draws.random()))

    def _positions(self, length: int, spans: int, draws: Draws) -> np.ndarray:
        """The masked positions of one row, sorted."""
        widths = self._widths(length, spans, draws)
        if not len(widths):
            return np.empty(0, dtype=np.int64)
        if not self.overlap:
            assert isinstance(draws, np.random.RandomState)  # main_mask has refused
            found = _apart(length, widths, self.min_space, draws)
        else:
            room = int(widths.min())
            if length - room <= spans:
                room = length - spans - 1
            starts = draws.choice(length - room, spans, replace=False)
            spans_of = zip(starts, widths, strict=True)
            found = np.concatenate([np.arange(start, start + width) for start, width in spans_of])
        return np.unique(found[found < length]).astype(np.int64)

    def _widths(self, length: int, spans: int, draws: Draws) -> np.ndarray:
        if self.lengths == "static":
            return np.full(spans, self.mask_length)
        if self.lengths == "uniform":
            assert isinstance(draws, np.random.RandomState)  # main_mask has refused
            widths = draws.randint(int(self.other), self.mask_length * 2 + 1, size=spans)
        elif self.lengths == "normal":
            # Python's rounding of halves to even is NumPy's
            widths = np.maximum(np.rint(draws.normal(self.mask_length, self.other, size=spans)), 1).astype(np.int64)
        elif self.lengths == "poisson":
            widths = draws.poisson(self.mask_length, size=spans)
        else:
            raise ModelError(
                f"lengths is {self.lengths!r}, expected one of 'static', 'uniform', 'normal' and 'poisson'."
            )
        if len(widths) and not widths.sum():
            widths[0] = min(self.mask_length, length - 1)
        return widths

    def _finished(self, masked: list[np.ndarray], size: int, draws: Draws) -> np.ndarray:
        """Rows trimmed to equal counts, then thinned out, in this order row by row.

        Releases draw the positions that stay, the main branch (whose generators are no RandomState) those that go.
        """
        fewest = min(len(positions) for positions in masked)
        mask = np.zeros((len(masked), size), dtype=bool)
        for row, positions in enumerate(masked):
            if self.equal_counts and len(positions) > fewest:
                positions = draws.choice(positions, fewest, replace=False)
            holes = int(np.rint(len(positions) * self.dropout))
            if self.dropout > 0 and isinstance(draws, np.random.RandomState):
                positions = draws.choice(positions, len(positions) - holes, replace=False)
            elif self.dropout > 0:
                positions = np.setdiff1d(positions, draws.choice(np.sort(positions), holes, replace=False))
            mask[row, positions] = True
        return mask


def _apart(length: int, widths: np.ndarray, space: int, draws: np.random.RandomState) -> np.ndarray:
    """Positions of spans that keep ``space`` between them: the longest first, each in a free piece of the row that
    is drawn in proportion to its length, until none has room."""
    pieces, shortest = [(0, length)], int(widths.min())
    found: list[np.ndarray] = []
    for width in sorted(widths.tolist(), reverse=True):
        sizes = np.array([end - start if end - start >= width + space else 0 for start, end in pieces])
        if not sizes.sum():
            break
        start, end = pieces.pop(int(draws.choice(len(pieces), p=sizes / sizes.sum())))
        first = int(draws.randint(start, end - width))
        found.append(np.arange(first, first + width))
        if first - start - space >= shortest:
            pieces.append((start, first - space + 1))
        if end - first - width - space > shortest:
            pieces.append((first + width + space, end))
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)
