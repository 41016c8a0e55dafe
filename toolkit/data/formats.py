"""Readers of the manifest kinds: CSV, JSON, JSON lines and tab-separated tables; fairseq's tsv has its own module.

A row names its audio by ``wav``, or by shard, offset and size as ``toolkit.data.shards`` writes them.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from toolkit.data.shard_rows import SHARD_COLUMNS, ShardFolder
from toolkit.data.table import DATA_COLUMNS, Manifest, ManifestBuilder, shortened
from toolkit.errors import ManifestError

ALIASES = {
    "ID": ("id", "utt_id"),
    "wav": ("audio_filepath", "path", "audio", "file"),
    "wrd": ("words", "text", "transcript", "transcription", "sentence"),
    "spk_id": ("speaker", "speaker_id"),
}
"""Other names under which corpora carry our columns; taken where ours is missing."""

FIELD_LIMIT = 1 << 24
"""Characters in one field of a CSV file; the csv module's own limit is too small for long transcripts."""

SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}
"""What tables are separated by in the wild; ours by commas, or by tabs in a tsv."""

_PLACEHOLDER = re.compile(r"\$\{?(\w+)\}?|\{(\w+)\}")


class PathResolver:
    """Turns the paths of a manifest into real ones.

    Arguments
    ---------
    folder : the manifest's own folder, which relative paths start from.
    replacements : what stands for ``$name`` or ``{name}`` at the beginning of a path.
    """

    def __init__(self, folder: str, replacements: Mapping[str, str] | None) -> None:
        self.folder = os.path.abspath(folder)
        self.shards = ShardFolder(self.folder)
        # A replacement is relative to where the command runs, not to the manifest.
        self.replacements = {name: os.path.abspath(value) for name, value in (replacements or {}).items()}

    def __call__(self, path: str, where: str) -> str:
        path = path.strip()
        if path[:1] in "${":
            placeholder = _PLACEHOLDER.match(path)
            if placeholder is not None:
                name = placeholder[1] or placeholder[2]
                if name not in self.replacements:
                    raise ManifestError(
                        f"{where}: the path {path!r} begins with the placeholder {name}, for which nothing was given; "
                        f"give the folder that it stands for (replacements, or {name} in the YAML)."
                    )
                return self.replacements[name] + path[placeholder.end() :]
        return path if os.path.isabs(path) else os.path.normpath(os.path.join(self.folder, path))


def read_table(file: TextIO, name: str, resolve: PathResolver, delimiter: str) -> Manifest:
    """A table with a header line, separated by ``delimiter``."""
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise ManifestError(f"{name}, line 1: the column {twice[0]!r} comes twice; give each column its own name.")
        header = canonical_names(header)
        _check_separator(header, delimiter, name)
        builder = ManifestBuilder(_data_columns(header), name)
        for fields in reader:
            if not fields or (len(fields) == 1 and not fields[0].strip()):
                continue
            if len(fields) != len(header):
                raise ManifestError(
                    f"{name}, line {reader.line_num}: there are {len(fields)} fields where the header names "
                    f"{len(header)}; put quotes round a field that holds the separator, or complete the line."
                )
            row = dict(zip(header, fields, strict=True))
            add_row(builder, row, reader.line_num, resolve)
    except csv.Error as error:
        raise ManifestError(f"{name}, line {reader.line_num}: {error}; correct the line.") from error
    return builder.finish()


def _check_separator(header: list[str], delimiter: str, name: str) -> None:
    """Say so where the whole header is one field because something else separates the columns."""
    for other, called in SEPARATORS.items():
        if len(header) == 1 and other != delimiter and other in header[0]:
            names = canonical_names([column.strip() for column in header[0].split(other)])
            if any(column in names for column in DATA_COLUMNS):
                tabs = ", or name it .tsv" if other == "\t" else ""
                raise ManifestError(
                    f"{name}, line 1: the columns are separated by {called}, expected {SEPARATORS[delimiter]}; save "
                    f"the table with {SEPARATORS[delimiter]}{tabs}."
                )


def read_json(text: str, name: str, resolve: PathResolver) -> Manifest:
    """``{id: {"wav": ..., "duration": ..., ...}}``, or a list of such objects that hold their own ID."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_object)
    except _DuplicateKeyError as error:
        raise ManifestError(f"{name}: the key {error.args[0]!r} comes twice; IDs must be unique.") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            # One object a line under the name .json.
            return read_json_lines(iter(text.split("\n")), name, resolve)
        raise ManifestError(
            f"{name}, line {error.lineno}: this is not JSON ({error.msg}); correct the file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{name}: {_why_not_loaded(error)}; correct the file.") from error
    if isinstance(value, dict) and isinstance(value.get("wav"), str):
        # A single line of JSON lines under the name .json.
        value = [value]
    if isinstance(value, dict):
        rows: Iterable[tuple[str, Any]] = ((f"entry {key!r}", _with_id(key, row)) for key, row in value.items())
    elif isinstance(value, list):
        rows = ((f"entry {index}", row) for index, row in enumerate(value))
    else:
        raise ManifestError(
            f'{name} is neither a JSON object nor a list of objects; write {{ID: {{"wav": ..., "duration": ...}}}}, a '
            "list of objects with ID, wav and duration, or one such object a line."
        )
    return _read_objects(rows, name, resolve)


def read_json_lines(lines: Iterator[str], name: str, resolve: PathResolver) -> Manifest:
    """One JSON object a line."""

    def rows() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise ManifestError(
                        f"{name}, line {number}: this is not a JSON object ({error.msg}); correct the line."
                    ) from error
                except (ValueError, RecursionError) as error:
                    raise ManifestError(
                        f"{name}, line {number}: {_why_not_loaded(error)}; correct the line."
                    ) from error

    return _read_objects(rows(), name, resolve)


def _read_objects(rows: Iterable[tuple[str | int, Any]], name: str, resolve: PathResolver) -> Manifest:
    builder: ManifestBuilder | None = None
    renamed: dict[str, str] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            where = place if isinstance(place, str) else f"line {place}"
            raise ManifestError(f"{name}, {where}: this is not an object with wav and duration; correct it.")
        if builder is None:
            names = canonical_names(list(row))
            renamed = dict(zip(row, names, strict=True))
            builder = ManifestBuilder(_data_columns(names), name)
        try:
            texts = {renamed.get(key, key): _text_of(value) for key, value in row.items()}
        except RecursionError as error:
            where = place if isinstance(place, str) else f"line {place}"
            raise ManifestError(f"{name}, {where}: {_why_not_loaded(error)}; correct it.") from error
        add_row(builder, texts, place, resolve)
    if builder is None:
        raise ManifestError(f"{name} holds no utterances; check how it was made.")
    return builder.finish()


def canonical_names(names: list[str]) -> list[str]:
    """``names`` with other corpora's names turned into ours, where ours is missing."""
    renamed = dict.fromkeys(names)
    for ours, others in ALIASES.items():
        if ours not in names:
            other = next((name for name in others if name in names), None)
            if other is not None:
                renamed[other] = ours
    return [new or old for old, new in renamed.items()]


def _data_columns(names: list[str]) -> list[str]:
    """The columns that the manifest will have: wav in place of shard, offset and size."""
    if "wav" in names or not all(name in names for name in SHARD_COLUMNS):
        return names
    return ["wav" if name == "shard" else name for name in names if name not in SHARD_COLUMNS[1:]]


def add_row(builder: ManifestBuilder, row: dict[str, Any], place: str | int, resolve: PathResolver) -> None:
    """Add ``row`` to ``builder`` with its path made real."""
    if str(row.get("wav") or "").strip():
        where = place if isinstance(place, str) else f"line {place}"
        row["wav"] = resolve(str(row["wav"]), f"{builder.source}, {where}")
    elif "wav" not in row and "shard" in row and "shard" not in builder.columns:
        where = place if isinstance(place, str) else f"line {place}"
        row["wav"] = resolve.shards.entry(row, f"{builder.source}, {where} (utterance {shortened(str(row.get('ID')))})")
    builder.add(row, place)


def read_text(path: Path) -> str:
    """A UTF-8 file's text (a byte order mark is dropped); raises ManifestError."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ManifestError(not_utf8(path, error)) from error


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """The sentence for a file in another encoding."""
    line = path.read_bytes()[: _position_of(path, error)].count(b"\n") + 1
    return f"{path}, line {line}: the text is not UTF-8; save the file as UTF-8."


def _position_of(path: Path, error: UnicodeDecodeError) -> int:
    """Byte of the first fault in the whole file (a stream's decoder only knows the piece it read)."""
    try:
        path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as whole:
        return whole.start
    return error.start


def _why_not_loaded(error: ValueError | RecursionError) -> str:
    """What is wrong with JSON that is well formed and yet cannot be loaded."""
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    return "a number has too many digits"


class _DuplicateKeyError(Exception):
    """A JSON object holds a key twice."""


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return value


def _with_id(key: str, row: object) -> object:
    return {"ID": key, **row} if isinstance(row, dict) else row


def _text_of(value: object) -> object:
    """JSON values as text: strings and numbers as they are, null as nothing, the rest as JSON."""
    if value is None:
        return ""
    if isinstance(value, (list, dict, bool)):
        return json.dumps(value, ensure_ascii=False)
    return value
