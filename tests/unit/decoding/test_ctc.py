"""Greedy CTC decoding."""

import torch
import torch.nn.functional as F

from toolkit.data.manifest import Manifest
from toolkit.data.tokens import LetterTokenizer
from toolkit.decoding.ctc import describe_impossible, greedy_decode


def scores(frames, vocabulary=6):
    return F.one_hot(torch.tensor(frames), vocabulary).float()


def test_repeats_merge_and_blanks_separate():
    frames = [[1, 1, 0, 1, 2, 2, 0, 0, 3], [0, 0, 0, 0, 0, 0, 0, 0, 0], [4, 0, 4, 4, 5, 5, 5, 4, 4]]
    assert greedy_decode(scores(frames), None) == [[1, 1, 2, 3], [], [4, 4, 5, 4]]


def test_padding_is_not_read():
    frames = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]
    expected = [[1, 2, 3, 4], [1, 2], []]
    assert greedy_decode(scores(frames), torch.tensor([4, 2, 0])) == expected
    assert greedy_decode(scores(frames), [4, 2, 0]) == expected


def test_any_blank():
    assert greedy_decode(scores([[0, 0, 5, 0, 1]]), [5], blank_id=5) == [[0, 0, 1]]


def test_against_the_definition():
    """Merge first, then drop blanks: on random frames."""
    best = torch.randint(0, 4, (20, 50), generator=torch.Generator().manual_seed(0))
    for row, decoded in zip(best.tolist(), greedy_decode(scores(best.tolist()), None), strict=True):
        merged = [token for place, token in enumerate(row) if place == 0 or token != row[place - 1]]
        assert decoded == [token for token in merged if token != 0]


def test_transcripts_too_long_for_their_frames_are_named():
    # 4 frames each, and a word ends with a token of its own: five tokens; three equal letters, which need two blanks
    # between; two that just fit
    texts = {"long": "ABAB", "repeats": "AAA", "fits": "AA", "empty": "", "unknown": "\u00c4AAAAAAA"}
    rows = [{"ID": name, "duration": 4.0, "wav": "/a.wav", "wrd": text} for name, text in texts.items()]
    manifest = Manifest.from_rows(rows)
    tokenizer = LetterTokenizer.from_texts(["AB"])
    sentence = describe_impossible(manifest, tokenizer, lambda samples: samples // 10, sample_rate=10)
    assert "2 of 5 utterances have more tokens than the model has frames for (long, repeats)" in sentence
    assert describe_impossible(manifest.select([2, 3]), tokenizer, lambda samples: samples // 10, 10) is None
