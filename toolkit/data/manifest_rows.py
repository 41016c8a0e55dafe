"""What the rows of a manifest were: one line for each, kept beside a run, to say in words what has changed since.

A fingerprint only tells that something did. The lines (an ID and 8 bytes of a hash over the row) take some 13 bytes a
row compressed, 4 MB for the 281,241 utterances of LibriSpeech, and are written once a run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from toolkit.data.table import Manifest

LEVEL = 1
"""Of compression: fast; hashes cannot be made smaller."""


def row_hashes(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(ID, hash) of each row; the hash changes with the duration and any text of the row, paths left out."""
    columns = [manifest.column(name) for name in _columns(manifest)]
    for row, identity in enumerate(manifest.ids):
        content = repr([identity, float(manifest.durations[row]), *(column[row] for column in columns)])
        yield identity, hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def write_rows(path: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write the rows of ``manifest`` to ``path``, a gzip of JSON lines."""
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=LEVEL) as file:
        file.write(json.dumps({"columns": _columns(manifest)}) + "\n")
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in row_hashes(manifest))


def describe_changes(path: str | os.PathLike[str], manifest: Manifest) -> str:
    """What differs between the rows in ``path`` and those of ``manifest``, in words; empty where that cannot be said.

    Example
    -------
    >>> import tempfile
    >>> rows = [{"ID": name, "duration": 1.0, "wav": "/a.wav", "wrd": "A"} for name in "abc"]
    >>> path = tempfile.mkdtemp() + "/rows.gz"
    >>> write_rows(path, Manifest.from_rows(rows))
    >>> describe_changes(path, Manifest.from_rows([rows[0], {**rows[1], "duration": 2.0}, {**rows[2], "ID": "d"}]))
    "1 row added (first 'd'), 1 removed (first 'c'), 1 changed (first 'b') of 3 before"
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            columns = json.loads(file.readline())["columns"]
            before = dict(json.loads(line) for line in file)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return ""  # of an older version, or damaged: that the data changed is known without it
    if columns != _columns(manifest):
        return f"its columns were {_named(columns)} and are {_named(_columns(manifest))}"
    now = dict(row_hashes(manifest))
    kinds = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "changed": [name for name in now if before.get(name, now[name]) != now[name]],
    }
    found = [(kind, names) for kind, names in kinds.items() if names]
    if found:
        parts = [
            f"{len(names):,}{('' if number else ' row' if len(names) == 1 else ' rows')} {kind} (first {names[0]!r})"
            for number, (kind, names) in enumerate(found)
        ]
        return f"{', '.join(parts)} of {len(before):,} before"
    moved = next(((row, name) for row, (name, was) in enumerate(zip(now, before, strict=True)) if name != was), None)
    return "" if moved is None else f"the same rows in another order, from row {moved[0] + 1} ({moved[1]!r}) on"


def _columns(manifest: Manifest) -> list[str]:
    return sorted(name for name in manifest.columns if name not in ("ID", "duration", "wav"))


def _named(columns: list[str]) -> str:
    return ", ".join(["ID", "duration", *columns])


def rows_path(folder: Path, name: str) -> Path:
    """Where a run in ``folder`` keeps the rows of its manifest ``name``."""
    return folder / f"{name}_rows.jsonl.gz"
