"""The one shape that every manifest is read into: a columnar table of utterances."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.data.columns import TextColumn, TextColumnBuilder
from toolkit.errors import ManifestError

DATA_COLUMNS = ("ID", "duration", "wav")
"""Columns that every manifest has."""


@dataclass(frozen=True)
class FilterReport:
    """What a filter by duration kept and dropped: numbers of utterances and hours of audio."""

    kept: int
    too_short: int
    too_long: int
    hours_kept: float
    hours_dropped: float

    def __str__(self) -> str:
        dropped = self.too_short + self.too_long
        return (
            f"kept {self.kept:,} of {self.kept + dropped:,} utterances ({self.hours_kept:.2f} h); dropped "
            f"{self.too_short:,} too short and {self.too_long:,} too long ({self.hours_dropped:.2f} h)"
        )


class Manifest:
    """Utterances in columns: ``ID``, ``duration`` (seconds), ``wav`` (path), and any further columns of text.

    Made by ``read_manifest`` or :meth:`from_rows`; never changed afterwards. A row takes the bytes of its text and
    some 30 more, so that 281,241 rows of LibriSpeech with transcripts take about 90 MB.

    Arguments
    ---------
    ids : (rows,) text, all different.
    durations : (rows,) float64 seconds.
    texts : the other columns by name, ``wav`` among them.
    source : where it came from, for messages.
    root, sample_rate : of a fairseq tsv: its first line, and the rate at which its frames were counted.

    Example
    -------
    >>> manifest = Manifest.from_rows([{"ID": "a", "duration": 1.5, "wav": "/a.wav", "wrd": "HELLO"}])
    >>> manifest.columns, manifest.row(0)["wrd"], len(manifest)
    (('ID', 'duration', 'wav', 'wrd'), 'HELLO', 1)
    """

    def __init__(
        self,
        ids: TextColumn,
        durations: np.ndarray,
        texts: Mapping[str, TextColumn],
        *,
        source: str = "the manifest",
        root: str | None = None,
        sample_rate: int | None = None,
    ) -> None:
        self.ids, self.durations = ids, durations
        self.source, self.root, self.sample_rate = source, root, sample_rate
        self._texts = dict(texts)

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, object]], *, source: str = "the rows") -> Manifest:
        """A manifest of dictionaries, all with the keys of the first; raises ManifestError as reading a file does."""
        if not rows:
            raise ManifestError(f"{source}: there are no utterances; check what it was made from.")
        builder = ManifestBuilder(list(rows[0]), source)
        for index, row in enumerate(rows):
            builder.add(row, f"row {index}")
        return builder.finish()

    def __len__(self) -> int:
        return len(self.durations)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Manifest):
            return NotImplemented
        return (
            self.columns == other.columns
            and self.ids == other.ids
            and np.array_equal(self.durations, other.durations)
            and all(self._texts[name] == other._texts[name] for name in self._texts)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns: ID, duration, then the others in the file's order."""
        return ("ID", "duration", *self._texts)

    @property
    def hours(self) -> float:
        """Hours of audio."""
        return float(self.durations.sum()) / 3600

    @property
    def nbytes(self) -> int:
        """Memory of all columns in bytes."""
        return self.ids.nbytes + self.durations.nbytes + sum(column.nbytes for column in self._texts.values())

    def column(self, name: str) -> Sequence[str] | np.ndarray:
        """The column ``name``: a sequence of strings, or float64 seconds for "duration". Raises ManifestError."""
        if name in ("ID", "id"):
            return self.ids
        if name == "duration":
            return self.durations
        if name not in self._texts:
            raise ManifestError(
                f"{self.source} has no column {name!r}; it has {', '.join(self.columns)}: add the column, or correct "
                "its name in the header."
            )
        return self._texts[name]

    def row(self, index: int) -> dict[str, str | float]:
        """Row ``index`` as a dictionary."""
        values = {name: column[index] for name, column in self._texts.items()}
        return {"ID": self.ids[index], "duration": float(self.durations[index]), **values}

    def select(self, rows: Sequence[int] | np.ndarray) -> Manifest:
        """A manifest of the rows ``rows``, in their order."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) == 0:
            raise ManifestError(f"{self.source}: none of the {len(self):,} utterances is selected; widen the limits.")
        texts = {name: column.take(rows) for name, column in self._texts.items()}
        return self._replaced(self.ids.take(rows), self.durations[rows], texts)

    def filter(
        self, *, min_duration: float | None = None, max_duration: float | None = None
    ) -> tuple[Manifest, FilterReport]:
        """Drop utterances shorter than ``min_duration`` or longer than ``max_duration`` (seconds, both inclusive).

        Raises
        ------
        ManifestError if nothing is left, or a limit is no number.
        """
        for name, limit in (("min_duration", min_duration), ("max_duration", max_duration)):
            if limit is not None and not isinstance(limit, (int, float)):
                raise ManifestError(f"{name} is {limit!r}, expected seconds, or null for no limit.")
        short = self.durations < (0 if min_duration is None else min_duration)
        long = self.durations > (math.inf if max_duration is None else max_duration)
        kept = np.flatnonzero(~(short | long))
        hours = float(self.durations[kept].sum()) / 3600
        report = FilterReport(len(kept), int(short.sum()), int((long & ~short).sum()), hours, self.hours - hours)
        if len(kept) == 0:
            raise ManifestError(
                f"{self.source}: no utterance lasts {0 if min_duration is None else min_duration:g} to "
                f"{'any number of' if max_duration is None else format(max_duration, 'g')} seconds (they last "
                f"{self.durations.min():.2f} to {self.durations.max():.2f}); change min_duration or max_duration."
            )
        return (self if len(kept) == len(self) else self.select(kept)), report

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any ID, duration, text, or the order of rows.

        Paths are left out: the same corpus in another folder is the same corpus.
        """
        digest = hashlib.blake2b(digest_size=16)
        columns = {"ID": self.ids, **{name: self._texts[name] for name in sorted(self._texts) if name != "wav"}}
        for name, column in columns.items():
            digest.update(f"{name}:{len(column)};".encode())
            digest.update(np.ascontiguousarray(column.offsets, dtype=np.int64))
            digest.update(np.ascontiguousarray(column.data))
        digest.update(np.ascontiguousarray(self.durations))
        return digest.hexdigest()

    def _replaced(self, ids: TextColumn, durations: np.ndarray, texts: dict[str, TextColumn]) -> Manifest:
        return Manifest(ids, durations, texts, source=self.source, root=self.root, sample_rate=self.sample_rate)

    @staticmethod
    def concatenate(manifests: Sequence[Manifest]) -> Manifest:
        """All rows of ``manifests`` in one; columns that not all of them have are left out.

        Raises
        ------
        ManifestError if there is none, or an ID stands in two of them.
        """
        if not manifests:
            raise ManifestError("there are no manifests to read; give at least one.")
        if len(manifests) == 1:
            return manifests[0]
        source = " + ".join(manifest.source for manifest in manifests)
        common = [name for name in manifests[0]._texts if all(name in other._texts for other in manifests)]
        ids = TextColumn.concatenate([manifest.ids for manifest in manifests])
        hashes = np.fromiter((hash(value) for value in ids), dtype=np.int64, count=len(ids))
        pair = first_duplicate(ids, hashes)
        if pair is not None:
            raise ManifestError(f"{source}: the ID {ids[pair[1]]!r} stands in two manifests; IDs must be unique.")
        texts = {name: TextColumn.concatenate([manifest._texts[name] for manifest in manifests]) for name in common}
        durations = np.concatenate([manifest.durations for manifest in manifests])
        return Manifest(ids, durations, texts, source=source, sample_rate=manifests[0].sample_rate)


class ManifestBuilder:
    """Collects and checks rows for a :class:`Manifest`.

    Arguments
    ---------
    columns : names of the columns; ID, duration and wav must be among them.
    source : the file's name, for messages.
    """

    def __init__(self, columns: Sequence[str], source: str) -> None:
        self.source, self.columns = source, tuple(columns)
        missing = [name for name in DATA_COLUMNS if name not in columns]
        if missing:
            raise ManifestError(
                f"{source} has no column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; it has "
                f"{', '.join(columns) or 'none'}, and needs ID, duration (seconds) and wav (path)."
            )
        for name in columns:
            if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
                raise ManifestError(f"{source}: the column name {name!r} is not valid Unicode text; rename the column.")
        self._ids = TextColumnBuilder()
        self._hashes = array("q")
        self._durations = array("d")
        self._names = [name for name in columns if name not in ("ID", "duration")]
        self._texts = [TextColumnBuilder() for _ in self._names]
        self._places: list[str] | array = array("q")

    def add(self, row: Mapping[str, object], place: str | int) -> None:
        """Add a row; ``place`` (a line number or words) is where it stands, for messages."""
        # Not by truth: 0 is a good ID.
        identity = "" if row.get("ID") is None else str(row["ID"]).strip()
        where = self._where(place)
        if not identity:
            raise ManifestError(f"{where}: the ID is empty; give each utterance its own.")
        if not str(row.get("wav") or "").strip():
            raise ManifestError(f"{where}: the path in column wav is empty; give the path or delete the row.")
        self._durations.append(self._duration(row.get("duration"), where))
        self._append(self._ids, identity, "ID", where)
        self._hashes.append(hash(identity))
        for name, column in zip(self._names, self._texts, strict=True):
            if name not in row:
                raise ManifestError(f"{where}: there is no {name!r}, which other rows have; complete the row.")
            self._append(column, str(row[name]), name, where)
        if isinstance(place, str) and not isinstance(self._places, list):
            self._places = []
        self._places.append(place)

    def finish(self, *, root: str | None = None, sample_rate: int | None = None) -> Manifest:
        """The manifest; raises ManifestError if it is empty or an ID comes twice."""
        if not self._durations:
            raise ManifestError(f"{self.source} holds no utterances; check how it was made.")
        ids = self._ids.finish()
        pair = first_duplicate(ids, np.frombuffer(self._hashes, dtype=np.int64))
        if pair is not None:
            first, second = (self._where(self._places[row]) for row in pair)
            raise ManifestError(
                f"{second}: the ID {ids[pair[1]]!r} stands already in {first.removeprefix(self.source + ', ')}; IDs "
                "must be unique."
            )
        durations = np.array(self._durations, dtype=np.float64)
        texts = {name: column.finish() for name, column in zip(self._names, self._texts, strict=True)}
        return Manifest(ids, durations, texts, source=self.source, root=root, sample_rate=sample_rate)

    def _where(self, place: str | int) -> str:
        return f"{self.source}, {place if isinstance(place, str) else f'line {place}'}"

    @staticmethod
    def _append(column: TextColumnBuilder, value: str, name: str, where: str) -> None:
        try:
            column.append(value)
        except UnicodeEncodeError as error:
            raise ManifestError(f"{where}: the column {name} is not valid Unicode text; correct the row.") from error

    @staticmethod
    def _duration(value: object, where: str) -> float:
        try:
            seconds = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            seconds = math.nan
        if not (math.isfinite(seconds) and seconds > 0):
            raise ManifestError(
                f"{where}: the duration is {shortened(repr(value))}, expected seconds greater than 0; correct or "
                "delete the row, or prepare the manifest again."
            )
        return seconds


def shortened(text: str) -> str:
    """``text``, its middle left out where it is too long to be read in a message."""
    return text if len(text) <= 60 else f"{text[:40]}...{text[-10:]}"


def first_duplicate(ids: TextColumn, hashes: np.ndarray) -> tuple[int, int] | None:
    """The first two rows with one ID, or None; ``hashes`` (rows,) are equal where IDs are."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    pairs = []
    for place in np.flatnonzero(ordered[1:] == ordered[:-1]):
        # Equal hashes are nearly always equal IDs; a run of three and more shows up pair by pair.
        first, second = int(order[place]), int(order[place + 1])
        if ids[first] == ids[second]:
            pairs.append((second, first))
    return min(pairs)[::-1] if pairs else None
