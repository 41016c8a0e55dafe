"""Error rates against jiwer's own, sums over ranks, and the file of hypotheses."""

import json
import math
import os
import random

import jiwer
import pytest

from toolkit.decoding.scoring import (
    ErrorCounts,
    WordErrors,
    count_character_errors,
    count_word_errors,
    write_hypotheses,
)


def sentences(seed, count=30):
    chance = random.Random(seed)
    vocabulary = ["A", "CAT", "SAT", "ON", "THE", "MAT", "ÄPFEL", "日本", "it's"]
    return [" ".join(chance.choices(vocabulary, k=chance.randint(1, 9))) for _ in range(count)]


def test_rates_are_those_of_jiwer():
    references, hypotheses = sentences(1), sentences(2)
    errors = WordErrors()
    errors.extend([str(i) for i in range(30)], references, hypotheses)
    assert errors.wer == pytest.approx(100 * jiwer.wer(references, hypotheses), rel=1e-12)
    assert errors.cer == pytest.approx(100 * jiwer.cer(references, hypotheses), rel=1e-12)


def test_kinds_of_errors():
    assert count_word_errors("A B C D", "A X C D E F") == ErrorCounts(1, 0, 2, 4)
    assert count_word_errors("A B C", "A C") == ErrorCounts(0, 1, 0, 3)
    assert count_character_errors("AB CD", "ABCD") == ErrorCounts(0, 1, 0, 5)


def test_white_space_does_not_count():
    assert count_word_errors(" A  B ", "A B").edits == 0
    assert count_character_errors(" A  B ", "A B") == ErrorCounts(0, 0, 0, 3)


def test_empty_references_and_hypotheses():
    assert count_word_errors("", "") == ErrorCounts()
    assert count_word_errors("", "A B") == ErrorCounts(insertions=2)
    assert count_character_errors("  ", "A B") == ErrorCounts(insertions=3)
    assert count_word_errors("A B", "") == ErrorCounts(deletions=2, reference=2)
    errors = WordErrors()
    assert errors.wer == 0.0
    errors.add("silence", "", "A")
    assert math.isinf(errors.wer)
    errors.add("speech", "A B", "A B")
    assert errors.wer == 50.0 and errors.sentence_error_percent == 50.0


def test_counts_add_up_over_ranks():
    references, hypotheses = sentences(3), sentences(4)
    ids = [f"{i:03d}" for i in range(30)]
    whole = WordErrors()
    whole.extend(ids, references, hypotheses)
    ranks = [WordErrors() for _ in range(3)]
    for rank, part in enumerate(ranks):
        part.extend(ids[rank::3], references[rank::3], hypotheses[rank::3])
    merged = ranks[0].merge(ranks[1:])
    assert merged == whole
    sums = [part.metrics() for part in ranks]
    for name, value in (("wer", whole.wer), ("cer", whole.cer)):
        assert sum(s[name][0] for s in sums) / sum(s[name][1] for s in sums) == pytest.approx(value, rel=1e-12)


def test_hypotheses_file(tmp_path):
    errors = WordErrors()
    errors.add("u1", "日本 A", "A\n")
    errors.add("u2", "", 'say "B"')
    path = write_hypotheses(tmp_path / "new" / "test_hypotheses.jsonl", errors.transcripts)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": "u1", "reference": "日本 A", "hypothesis": "A\n"},
        {"id": "u2", "reference": "", "hypothesis": 'say "B"'},
    ]
    assert "日本" in lines[0] and os.listdir(path.parent) == [path.name]


def test_a_failed_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "hypotheses.jsonl"
    path.write_text("older\n")

    def broken():
        yield from WordErrors().transcripts
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write_hypotheses(path, broken())
    assert path.read_text() == "older\n" and os.listdir(tmp_path) == [path.name]
