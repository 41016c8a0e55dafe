"""Read and write manifests: any accepted kind becomes one :class:`Manifest`, and any kind can be written from it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from toolkit.data import formats
from toolkit.data.columns import TextColumn
from toolkit.data.fairseq_format import fairseq_lines, read_fairseq
from toolkit.data.table import FilterReport, Manifest
from toolkit.errors import ManifestError

__all__ = [
    "FilterReport", "Manifest", "TextColumn",
    "describe_empty_texts", "name_some", "read_manifest", "read_manifests", "write_manifest",
]  # fmt: skip

NAMED = 5
"""Utterances that a sentence about some names."""

KINDS = (".csv", ".json", ".jsonl", ".tsv")


def read_manifest(
    path: str | os.PathLike[str],
    *,
    replacements: Mapping[str, str] | None = None,
    sample_rate: int | None = None,
    root: str | os.PathLike[str] | None = None,
) -> Manifest:
    """Read a manifest of any kind.

    * ``.csv``: a header line with ``ID,duration,wav`` and further columns (``spk_id``, ``wrd``, ...);
    * ``.json``: ``{id: {"wav": ..., "duration": ..., "words": ...}}``, or a list of objects;
    * ``.jsonl``: one object a line;
    * ``.tsv``: fairseq's (a root folder, then path and samples), with ``.wrd`` or ``.ltr`` of the same stem beside
      it; or a table with a header line like a CSV, separated by tabs.

    Transcripts stand in the column ``wrd`` (``words``, ``text``, ``transcript`` and ``sentence`` are taken for it
    where it is missing, and likewise ``id``, ``audio_filepath``, ``path`` and ``audio``).

    Arguments
    ---------
    path : the file.
    replacements : folders for placeholders at the beginning of paths, ``{"data_root": D}`` for ``$data_root/...`` and
        ``{data_root}/...``. Other relative paths start from the manifest's folder.
    sample_rate : Hz at which a fairseq tsv counts samples; None looks at its first audio file (16,000 if it is not
        there).
    root : the folder of a fairseq tsv's audio, in place of its first line; other kinds take no notice.

    Raises
    ------
    ManifestError with the file and the line: missing file or column, empty or bad value, an ID that comes twice,
    wrong text encoding, or no utterance at all.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ManifestError(f"{path!r} is no path of a manifest; give the name of a file, in quotes if it is a number.")
    path = Path(path)
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise ManifestError(f"the manifest {path} {reason}; check the path, or prepare the data first.")
    kind = path.suffix.lower()
    if kind not in (*KINDS, ".ndjson"):
        raise ManifestError(f"{path} is of no known kind of manifest; name it {', '.join(KINDS)} by its content.")
    resolve = formats.PathResolver(str(path.parent), replacements)
    try:
        return _read(path, kind, resolve, sample_rate, root)
    except UnicodeDecodeError as error:
        raise ManifestError(formats.not_utf8(path, error)) from error


def _read(
    path: Path,
    kind: str,
    resolve: formats.PathResolver,
    sample_rate: int | None,
    root: str | os.PathLike[str] | None,
) -> Manifest:
    if kind == ".json":
        return formats.read_json(formats.read_text(path), str(path), resolve)
    # newline="" leaves line ends inside quoted fields to the csv module; other Unicode line ends are text.
    with open(path, encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file:
        if kind == ".csv":
            return formats.read_table(file, str(path), resolve, ",")
        if kind == ".tsv":
            first = file.readline()
            file.seek(0)
            if "\t" in first:
                return formats.read_table(file, str(path), resolve, "\t")
            return read_fairseq(path, file, resolve, sample_rate, root)
        return formats.read_json_lines(file, str(path), resolve)


def read_manifests(
    paths: Iterable[str | os.PathLike[str]],
    *,
    replacements: Mapping[str, str] | None = None,
    sample_rate: int | None = None,
    root: str | os.PathLike[str] | None = None,
) -> Manifest:
    """Read several manifests, of any kinds, into one; arguments and errors as for :func:`read_manifest`."""
    return Manifest.concatenate(
        [read_manifest(path, replacements=replacements, sample_rate=sample_rate, root=root) for path in paths]
    )


def describe_empty_texts(manifest: Manifest, column: str = "wrd") -> str | None:
    """A sentence about utterances whose transcript is empty, None where there are none.

    Example
    -------
    >>> texts = {"a": "X", "b": ""}
    >>> rows = [{"ID": name, "duration": 1.0, "wav": "/a.wav", "wrd": text} for name, text in texts.items()]
    >>> print(describe_empty_texts(Manifest.from_rows(rows)))
    the rows: 1 of 2 utterances has an empty transcript (b) and counts as silence; complete the row if words are spoken.
    """
    texts = manifest.column(column)
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if not empty:
        return None
    has, counts, rows = ("has", "counts", "row") if len(empty) == 1 else ("have", "count", "rows")
    return (
        f"{manifest.source}: {len(empty)} of {len(manifest)} utterances {has} an empty transcript "
        f"({name_some(manifest, empty)}) and {counts} as silence; complete the {rows} if words are spoken."
    )


def name_some(manifest: Manifest, rows: Sequence[int]) -> str:
    """The first few utterances of ``rows`` by their IDs, for a message."""
    named = ", ".join(manifest.ids[row] for row in rows[:NAMED])
    return f"{named} and {len(rows) - NAMED} more" if len(rows) > NAMED else named


def write_manifest(
    path: str | os.PathLike[str],
    manifest: Manifest | Sequence[Mapping[str, object]],
    *,
    data_root: str | os.PathLike[str] | None = None,
    sample_rate: int | None = None,
) -> Path:
    """Write a manifest; the suffix says the kind. The file appears whole or not at all.

    Arguments
    ---------
    path : ``.csv``, ``.json``, ``.jsonl`` or ``.tsv`` (fairseq's, with ``.wrd`` and ``.ltr`` beside it where there
        are transcripts; byte for byte what its own scripts write).
    manifest : a manifest, or rows as dictionaries with ``ID``, ``duration``, ``wav`` and more.
    data_root : folder that paths are written relative to: as ``$data_root/...`` in CSV, ``{data_root}/...`` in JSON,
        and as the first line of a tsv. None writes whole paths; a tsv then gets the manifest's own root or the
        deepest common one.
    sample_rate : Hz at which a tsv counts samples; None takes the manifest's (16,000 where it has none).

    Returns
    -------
    The path written.
    """
    path = Path(path)
    if not isinstance(manifest, Manifest):
        manifest = Manifest.from_rows(list(manifest))
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ManifestError(f"{path} is of no known kind of manifest; name it {', '.join(KINDS)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".tsv":
        _write_fairseq(path, manifest, data_root, sample_rate)
    else:
        placeholder = None if data_root is None else ("$data_root" if kind == ".csv" else "{data_root}")
        root = None if data_root is None else os.path.abspath(data_root)
        rows = (_portable(manifest.row(index), root, placeholder) for index in range(len(manifest)))
        with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            if kind == ".csv":
                writer = csv.DictWriter(file, manifest.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            elif kind == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            else:
                table = {row.pop("ID"): row for row in rows}
                file.write(json.dumps(table, ensure_ascii=False, indent=2) + "\n")
    return path


def _portable(row: dict[str, str | float], root: str | None, placeholder: str | None) -> dict[str, str | float]:
    wav = str(row["wav"])
    if root is not None and wav.startswith(root.rstrip(os.sep) + os.sep):
        row["wav"] = f"{placeholder}/{os.path.relpath(wav, root).replace(os.sep, '/')}"
    return row


def _write_fairseq(
    path: Path, manifest: Manifest, data_root: str | os.PathLike[str] | None, sample_rate: int | None
) -> None:
    texts = fairseq_lines(path, manifest, data_root, sample_rate)
    # The tsv last: it is what readers look for.
    for file, rows in reversed(texts.items()):
        with whole_file(file) as temporary:
            temporary.write_bytes("".join(f"{row}\n" for row in rows).encode())


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary neighbour that takes the name ``path`` when its writing has ended well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
