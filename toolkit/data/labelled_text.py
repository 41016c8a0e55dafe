"""Texts with a label each: read from CSV tables, held out, encoded, and collated to batches."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.data.dictionary_tokens import DictionaryTokenizer
from toolkit.data.formats import not_utf8
from toolkit.data.text import collate_text
from toolkit.data.text_bpe import Gpt2Bpe, Gpt2Tokenizer, number_counts
from toolkit.data.text_dictionary import TextDictionary
from toolkit.data.token_common import END, UNKNOWN, short
from toolkit.errors import ConfigError, ManifestError
from toolkit.seeds import Randomness

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Endings of tables, and what parts their fields."""

NAMED = 5
"""Labels that a sentence about them names."""


@dataclass(frozen=True)
class LabelledRows:
    """Rows of tables.

    texts, labels : of each row.
    places : (file, line) of each row.
    source : the files' names, for messages.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    places: tuple[tuple[Path, int], ...]
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, row: int) -> str:
        """File and line, for a message."""
        path, line = self.places[row]
        return f"{path}, line {line}"

    def classes(self) -> tuple[str, ...]:
        """The labels that occur, sorted.

        Raises
        ------
        ManifestError : there is only one.
        """
        found = tuple(sorted(set(self.labels)))
        if len(found) < 2:
            raise ManifestError(
                f"{self.source}: all {len(self):,} texts have the label {short(found[0])}; a classifier needs texts of "
                "two labels at least."
            )
        return found

    def select(self, rows: Sequence[int] | np.ndarray) -> LabelledRows:
        """The rows ``rows``, in their order."""
        chosen = [int(row) for row in rows]
        columns = (tuple(column[row] for row in chosen) for column in (self.texts, self.labels, self.places))
        return LabelledRows(*columns, self.source)  # type: ignore[arg-type]


def read_labelled_rows(
    paths: Sequence[str | Path], *, text_column: str = "text", label_column: str = "label"
) -> LabelledRows:
    """Read CSV (or, by the name's ending, tab-separated) tables with a header line; other columns are passed over.

    Raises
    ------
    ManifestError : with the file and the line: a missing file or column, an empty text or label, a row of another
        width, wrong encoding, or no row at all.
    """
    texts: list[str] = []
    labels: list[str] = []
    places: list[tuple[Path, int]] = []
    for path in map(Path, paths):
        before = len(texts)
        for line, text, label in _read_table(path, text_column, label_column):
            texts.append(text)
            labels.append(label)
            places.append((path, line))
        if len(texts) == before:
            raise ManifestError(f"{path} holds no rows below its header line; check how it was made.")
    source = " + ".join(str(path) for path in paths)
    return LabelledRows(tuple(texts), tuple(labels), tuple(places), source)


def _read_table(path: Path, text_column: str, label_column: str) -> Iterator[tuple[int, str, str]]:
    """(line, text, label) of each row."""
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise ManifestError(f"the table {path} {reason}; give a CSV file with the columns {text_column}, "
                            f"{label_column}.")  # fmt: skip
    if path.suffix.lower() not in SEPARATORS:
        raise ManifestError(f"{path} is of no known kind of table; name it {' or '.join(SEPARATORS)} by its content.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from _rows_of(csv.reader(file, delimiter=SEPARATORS[path.suffix.lower()], strict=True), path,
                                text_column, label_column)  # fmt: skip
    except UnicodeDecodeError as error:
        raise ManifestError(not_utf8(path, error)) from error


def _rows_of(reader: Any, path: Path, text_column: str, label_column: str) -> Iterator[tuple[int, str, str]]:
    line = 1
    try:
        header = next(reader, [])
        places = [_place_of(column, header, path) for column in (text_column, label_column)]
        line = reader.line_num + 1
        for fields in reader:
            where = f"{path}, line {line}"
            if fields and len(fields) != len(header):
                raise ManifestError(
                    f"{where}: {len(fields)} fields, where the header line has {len(header)}; put a text that holds a "
                    "separator in double quotes."
                )
            if fields:
                text, label = (fields[place].strip() for place in places)
                for column, value in ((text_column, text), (label_column, label)):
                    if not value:
                        raise ManifestError(f"{where}: the column {column} is empty; complete or delete the row.")
                yield line, text, label
            line = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(f"{path}, line {line}: {error}; correct the quotes of the row that begins here.") from error


def _place_of(column: str, header: Sequence[str], path: Path) -> int:
    names = [name.strip() for name in header]
    if names.count(column) != 1:
        found = "two columns" if column in names else "no column"
        raise ManifestError(
            f"{path} has {found} {column}; its header line has {', '.join(names) or 'none'}: name the columns with "
            "--text_column and --label_column."
        )
    return names.index(column)


def hold_out_rows(rows: LabelledRows, share: float, *, seed: int) -> tuple[LabelledRows, LabelledRows]:
    """Two parts of ``rows``: what is left, and about ``share`` of the rows of each label, by the seed.

    Every label keeps a row at least in the first part, and the second has one row at least.

    Raises
    ------
    ConfigError : the share is not between 0 and 1, or no label has two rows.
    """
    if not 0 < share < 1:
        raise ConfigError(f"valid_share is {share}; expected a share above 0 and below 1, or 0 for no validation.")
    labels = np.array(rows.labels, dtype=object)
    held: list[int] = []
    spare: list[int] = []
    for label in sorted(set(rows.labels)):
        members = np.flatnonzero(labels == label)
        # By the label's name, so that a further label changes nothing in the others.
        members = members[Randomness(seed).numpy("valid share", label).permutation(len(members))]
        count = min(round(share * len(members)), len(members) - 1)
        held += members[:count].tolist()
        spare += members[:-1].tolist()
    if not spare:
        raise ConfigError(
            f"{rows.source} has one text of each label, too few to hold some out; name a table in valid_splits, or set "
            "valid_share to 0."
        )
    chosen = sorted(held or spare[:1])
    return rows.select(np.setdiff1d(np.arange(len(rows)), chosen)), rows.select(chosen)


def dictionary_of(rows: LabelledRows, bpe: Gpt2Bpe) -> TextDictionary:
    """The dictionary of the pieces that occur in ``rows``, frequent ones first."""
    counts: np.ndarray = np.zeros(len(bpe.pieces), dtype=np.int64)
    for text in rows.texts:
        counts += np.bincount(bpe.encode(text), minlength=len(counts))
    return TextDictionary.from_counts(number_counts(counts))


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """Some texts, padded to one length, and their labels.

    Arguments
    ---------
    ids : file and line of each ("train.csv:17").
    tokens : (batch, length) int64, padded with 1.
    lengths : (batch,) int64, tokens of each text; always on the host.
    labels : (batch,) int64, the number of each text's class.
    texts : as they stand in the table.
    """

    ids: list[str]
    tokens: Tensor
    lengths: Tensor
    labels: Tensor
    texts: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabelledBatch:
        """The batch with its tokens and labels on ``device``; lengths stay on the host."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> LabelledBatch:
        """The batch with its tensors in page-locked memory, for copies that overlap with work."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, move: Callable[[Tensor], Tensor]) -> LabelledBatch:
        return replace(self, tokens=move(self.tokens), labels=move(self.labels))


class LabelledTexts:
    """Rows as a model wants them: tokens between ``<s>`` and ``</s>``, and the number of the label.

    Arguments
    ---------
    rows : texts and labels.
    tokenizer : between texts and tokens.
    labels : the classes, in the order of the model's outputs.
    max_length : tokens of a text at most, both special ones counted; longer ones lose their end.

    Raises
    ------
    ManifestError : a label that is none of ``labels``.
    """

    def __init__(
        self,
        rows: LabelledRows,
        tokenizer: Gpt2Tokenizer | DictionaryTokenizer,
        labels: Sequence[str],
        *,
        max_length: int,
    ) -> None:
        numbers = {label: number for number, label in enumerate(labels)}
        for row, label in enumerate(rows.labels):
            if label not in numbers:
                raise ManifestError(
                    f"{rows.where(row)}: the label {short(label)} is none of the model's ({_some(labels)}); correct "
                    "the row, or train with texts of this label."
                )
        self.rows, self.class_names = rows, tuple(labels)
        self.labels: np.ndarray = np.array([numbers[label] for label in rows.labels], dtype=np.int64)
        encoded = [tokenizer.encode(text, special=True) for text in rows.texts]
        self.num_cut = sum(len(tokens) > max_length for tokens in encoded)
        self.max_length = max_length
        kept = [tokens if len(tokens) <= max_length else [*tokens[: max_length - 1], END] for tokens in encoded]
        self.lengths: np.ndarray = np.array([len(tokens) for tokens in kept], dtype=np.int64)
        self._tokens: np.ndarray = np.concatenate([np.array(tokens, dtype=np.int32) for tokens in kept])
        self._starts = np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def report(self) -> str:
        """What there is, what was cut and what the dictionary lacks, for the log."""
        counts = Counter(self.rows.labels).most_common(NAMED)
        more = f" and {len(set(self.rows.labels)) - NAMED} more" if len(set(self.rows.labels)) > NAMED else ""
        words = ", ".join(f"{label} {count:,}" for label, count in counts)
        unknown = int((self._tokens == UNKNOWN).sum())
        return (
            f"{self.rows.source}: {len(self):,} texts, {len(self._tokens):,} tokens ({unknown:,} unknown), "
            f"{self.num_cut:,} cut to {self.max_length} tokens; labels: {words}{more}"
        )

    def fingerprint(self) -> str:
        """Equal where tokens and labels are (hexadecimal): for a checkpoint, which must go on with the same texts."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for values in (self.lengths, self._tokens, self.labels):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()[:16]

    def load(self, row: int, *, epoch: int, crop_samples: int | None = None, seed: int = 0) -> dict[str, Any]:
        """One item: "id", "tokens", "label", "text"."""
        path, line = self.rows.places[row]
        start = int(self._starts[row])
        return {
            "id": f"{path.name}:{line}",
            "tokens": self._tokens[start : start + int(self.lengths[row])].astype(np.int64),
            "label": int(self.labels[row]),
            "text": self.rows.texts[row],
        }


def collate_labelled(items: Sequence[Mapping[str, Any]], *, samples: int | None = None) -> LabelledBatch:
    """Items of `LabelledTexts` to a batch, padded to ``samples`` tokens (None, or too few: to the longest).

    Example
    -------
    >>> items = [{"id": "a.csv:2", "tokens": np.array([0, 5, 2]), "label": 1, "text": "five"}]
    >>> collate_labelled(items, samples=4).tokens.tolist()
    [[0, 5, 2, 1]]
    """
    batch = collate_text(items, samples=samples)
    labels = torch.tensor([item["label"] for item in items], dtype=torch.int64)
    return LabelledBatch(batch.ids, batch.tokens, batch.lengths, labels, [item["text"] for item in items])


def _some(labels: Sequence[str]) -> str:
    named = ", ".join(labels[:NAMED])
    return f"{named} and {len(labels) - NAMED} more" if len(labels) > NAMED else named
