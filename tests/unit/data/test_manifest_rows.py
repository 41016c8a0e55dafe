"""What is said of a manifest that changed."""

from __future__ import annotations

import pytest

from toolkit.data.manifest import Manifest
from toolkit.data.manifest_rows import describe_changes, write_rows

ROWS = [{"ID": f"u{n}", "duration": 1.0 + n, "wav": f"/{n}.wav", "wrd": "A\tB" if n else ""} for n in range(5)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ROWS, ""),
        ([{**row, "wav": "/elsewhere.wav"} for row in ROWS], ""),
        (ROWS[1:], "1 row removed (first 'u0') of 5 before"),
        ([*ROWS, {**ROWS[0], "ID": "new"}, {**ROWS[0], "ID": "x"}], "2 rows added (first 'new') of 5 before"),
        ([*ROWS[:3], {**ROWS[3], "wrd": "B"}, ROWS[4]], "1 row changed (first 'u3') of 5 before"),
        ([*ROWS[:4], {**ROWS[4], "duration": 1.5}], "1 row changed (first 'u4') of 5 before"),
        ([*ROWS[:2], *ROWS[:1:-1]], "the same rows in another order, from row 3 ('u4') on"),
        ([{**row, "spk": "x"} for row in ROWS], "its columns were ID, duration, wrd and are ID, duration, spk, wrd"),
    ],
)
def test_changes_in_words(tmp_path, rows, words):
    path = tmp_path / "rows.gz"
    write_rows(path, Manifest.from_rows(ROWS))
    assert describe_changes(path, Manifest.from_rows(rows)) == words


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x1f\x8b\x08"])
def test_a_file_that_cannot_be_read_says_nothing(tmp_path, content):
    path = tmp_path / "rows.gz"
    if content is not None:
        path.write_bytes(content)
    assert describe_changes(path, Manifest.from_rows(ROWS)) == ""
