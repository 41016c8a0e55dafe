"""Columns of text that take few bytes a row: one block of UTF-8 and an offset each, no Python object per row."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

CHUNK = 8192
"""Rows gathered at a time when a column is selected from, to keep the index arrays small."""


class TextColumn(Sequence[str]):
    """An immutable column of strings.

    Example
    -------
    >>> column = TextColumn.of(["a", "", "ça"])
    >>> column[2], len(column), column.take([2, 0])[1]
    ('ça', 3, 'a')
    """

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self.data, self.offsets = data, offsets

    @classmethod
    def of(cls, values: Iterable[str]) -> TextColumn:
        """A column of ``values``."""
        builder = TextColumnBuilder()
        for value in values:
            builder.append(value)
        return builder.finish()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        row = int(row)
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a column of {len(self)}")
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes().decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.offsets[1:]:
            yield self.data[start:end].tobytes().decode("utf-8")
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TextColumn):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.data, other.data)

    __hash__ = None  # type: ignore[assignment]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.data.nbytes + self.offsets.nbytes

    def take(self, rows: Sequence[int] | np.ndarray) -> TextColumn:
        """A column of the rows ``rows``, in their order."""
        rows = np.asarray(rows, dtype=np.int64)
        starts = self.offsets[:-1].astype(np.int64)[rows]
        sizes = self.offsets[1:].astype(np.int64)[rows] - starts
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        data = np.empty(offsets[-1], dtype=np.uint8)
        for first in range(0, len(rows), CHUNK):
            piece = slice(first, first + CHUNK)
            begin, end = offsets[first], offsets[min(first + CHUNK, len(rows))]
            shift = np.repeat(starts[piece] - offsets[:-1][piece], sizes[piece])
            data[begin:end] = self.data[np.arange(begin, end) + shift]
        return TextColumn(data, _small(offsets))

    @staticmethod
    def concatenate(columns: Sequence[TextColumn]) -> TextColumn:
        """One column of all rows of ``columns``."""
        bases = np.cumsum([0] + [len(column.data) for column in columns])
        offsets = [column.offsets[1:].astype(np.int64) + base for column, base in zip(columns, bases, strict=False)]
        return TextColumn(np.concatenate([column.data for column in columns]), _small(np.concatenate([[0], *offsets])))


class TextColumnBuilder:
    """Collects strings for a :class:`TextColumn`."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._offsets = array("q", [0])

    def append(self, value: str) -> None:
        """Add one row."""
        self._data += value.encode("utf-8")
        self._offsets.append(len(self._data))

    def finish(self) -> TextColumn:
        """The column; the builder must not be used afterwards."""
        data = np.frombuffer(bytes(self._data), dtype=np.uint8)
        offsets = _small(np.frombuffer(self._offsets, dtype=np.int64))
        self._data, self._offsets = bytearray(), array("q", [0])
        return TextColumn(data, offsets)


def _small(offsets: np.ndarray) -> np.ndarray:
    """Offsets in 32 bits where they fit."""
    return offsets.astype(np.uint32 if offsets[-1] < 1 << 32 else np.int64)
