"""The demo corpus: the same in any order, disjoint voices and sentences, LibriSpeech's layout, resumable."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from demo.espeak import Espeak, SpeechError, Voice
from demo.make_corpus import SAMPLE_RATE, Settings, cast, main, make_corpus, plan, utterance
from demo.sentences import SPLITS, VOCABULARY, keyed_integer, sentences, split_of

SMALL = Settings(train=98, dev=10, test=20)


@pytest.fixture(scope="module")
def engine() -> Espeak:
    return Espeak()


def test_an_utterance_does_not_depend_on_what_was_spoken_before(engine: Espeak) -> None:
    voices = [speaker for speaker in cast(1) if speaker.voice.variant in ("f5", "Annie", "klatt3", "m2")]
    names = [(speaker, f"{speaker.number}-{place}") for speaker in voices for place in range(3)]
    forward = {name: utterance(engine, speaker, name, "seven red boxes", 1) for speaker, name in names}
    backward = {name: utterance(engine, speaker, name, "seven red boxes", 1) for speaker, name in reversed(names)}
    for _, name in names:
        np.testing.assert_array_equal(forward[name], backward[name])
    speaker, name = names[0]
    assert not np.array_equal(forward[name][:4000], utterance(engine, speaker, name, "seven red boxes", 2)[:4000])


def test_a_breathy_voice_breathes_by_its_seed(engine: Espeak) -> None:
    one, same, other = (engine.speak("seven red boxes", Voice("en-us", "f5"), seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_the_speech_is_speech(engine: Espeak) -> None:
    for speaker in cast(1)[::7]:
        short = utterance(engine, speaker, "a", "six", 1)
        long = utterance(engine, speaker, "a", "victor painted eleven umbrellas under the bridge", 1)
        assert short.dtype == np.float32 and 0.25 < np.abs(long).max() <= 1.0
        assert 0.2 * SAMPLE_RATE < len(short) < len(long) / 2 and 1.5 < len(long) / SAMPLE_RATE < 6


def test_a_variant_that_does_not_exist_is_refused(engine: Espeak) -> None:
    with pytest.raises(SpeechError, match=r"no variant 'f33'; it has .*f3"):
        engine.speak("six", Voice("en-us", "f33"), seed=1)
    with pytest.raises(SpeechError, match=r"could not speak 'six' as en-gb\+f3 \(code 2\)"):
        engine.speak("six", Voice("en-gb", "f3"), seed=1)


def test_every_speaker_of_the_cast_can_speak(engine: Espeak) -> None:
    for speaker in cast(SMALL.seed):
        engine.check(speaker.voice)


@pytest.mark.parametrize("seed", [1234, 7])
def test_voices_and_sentences_of_the_splits_are_disjoint(seed: int) -> None:
    speakers, chapters = cast(seed), plan(replace(Settings(), seed=seed))
    splits = Counter(speaker.split for speaker in speakers)
    assert splits["train"] >= 40 and splits["dev"] >= 5 and splits["test"] >= 8
    assert len({speaker.voice.variant for speaker in speakers}) == len(speakers)  # so no voice is in two splits
    assert {(s.split, s.sex) for s in speakers} == {(split, sex) for split in SPLITS for sex in "FM"}
    texts = {split: [t for c in chapters if c.speaker.split == split for t in c.texts] for split in SPLITS}
    assert {split: len(own) for split, own in texts.items()} == {"train": 4000, "dev": 100, "test": 200}
    everything = [text for own in texts.values() for text in own]
    assert len(set(everything)) == len(everything)
    words = {split: {word for text in own for word in text.split()} for split, own in texts.items()}
    assert words["test"] <= words["train"] == set(VOCABULARY)  # the test asks for unseen sentences, not unseen words


def test_other_counts_never_move_a_sentence_to_another_split() -> None:
    train, test = sentences("train", 2000, seed=5), sentences("test", 1000, seed=9)
    assert not set(train) & set(test) and all(split_of(text) == "test" for text in test)
    assert sentences("train", 50, seed=5) == train[:50]
    with pytest.raises(ValueError, match=r"100000 sentences for dev are more than .* take \d+ at most"):
        sentences("dev", 100000, seed=1)


def test_the_draw_is_the_same_everywhere() -> None:
    assert keyed_integer(1, "a") == 5469735371966330324
    assert sentences("test", 2, seed=1234) == [
        "julia wanted three silver umbrellas",
        "maria wanted seven orange ladders",
    ]


def listing(corpus: Path) -> dict[str, bytes]:
    return {str(file.relative_to(corpus)): file.read_bytes() for file in sorted(corpus.rglob("*")) if file.is_file()}


def test_layout_resume_and_independence_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(tmp_path / "one", SMALL, num_processes=1, quiet=True)
    transcripts = sorted(corpus.glob("*/*/*/*.trans.txt"))
    assert {file.parts[-4] for file in transcripts} == set(SPLITS)
    found = Counter()
    for file in transcripts:
        split, speaker, chapter = file.parts[-4:-1]
        assert file.name == f"{speaker}-{chapter}.trans.txt"
        lines = file.read_text().splitlines()
        found[split] += len(lines)
        for place, line in enumerate(lines):
            name, text = line.split(" ", 1)
            assert name == f"{speaker}-{chapter}-{place:04d}"
            assert text == text.upper() and set(text.lower().split()) <= set(VOCABULARY)
            info = soundfile.info(file.parent / f"{name}.flac")
            assert (info.samplerate, info.channels, info.format, info.subtype) == (SAMPLE_RATE, 1, "FLAC", "PCM_16")
    assert found == {"train": SMALL.train, "dev": SMALL.dev, "test": SMALL.test}
    table = [row.split("|") for row in (corpus / "SPEAKERS.TXT").read_text().splitlines() if not row.startswith(";")]
    assert {row[0].strip() for row in table} == {file.parts[-3] for file in transcripts}
    minutes = sum(soundfile.info(file).duration for file in corpus.rglob("*.flac")) / 60
    assert sum(float(row[3]) for row in table) == pytest.approx(minutes, abs=0.01 * len(table))

    # Interrupted: no mark of the end, a chapter without transcript, one utterance of it missing.
    before = listing(corpus)
    (tmp_path / "one" / "corpus.json").unlink()
    transcripts[3].unlink()
    next(transcripts[3].parent.glob("*.flac")).unlink()
    kept = transcripts[0].stat().st_mtime_ns
    arguments = [f"--{split}={getattr(SMALL, split)}" for split in SPLITS]
    assert main(["--output_folder", str(tmp_path / "one"), "--num_processes", "2", *arguments]) == 0
    assert listing(corpus) == before and transcripts[0].stat().st_mtime_ns == kept

    assert main(["--output_folder", str(tmp_path / "one"), "--seed", "9", *arguments]) == 2
    assert "holds a corpus made with other settings" in capsys.readouterr().err
    assert json.loads((tmp_path / "one" / "corpus.json").read_text())["utterances"] == 128
