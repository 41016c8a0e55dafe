"""Make the demo's speech corpus: synthetic speech in LibriSpeech's own layout.

    python demo/make_corpus.py --output_folder demo_run/corpus

writes ``LibriSpeech/{train,dev,test}/SPK/CHAPTER/SPK-CHAPTER-UTT.flac`` at 16 kHz, a ``.trans.txt`` beside
them and ``SPEAKERS.TXT``. Voices and sentences of the three splits are disjoint. Every utterance is a
function of (seed, its name), so the number of processes changes nothing, and an interrupted run is
completed by the same command: a chapter whose ``.trans.txt`` stands is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder, without installing

from demo.espeak import Espeak, SpeechError, Voice
from demo.sentences import SPLITS, keyed_integer, sentences

SAMPLE_RATE = 16000
FORMAT = 1  # raise it when anything here changes what is heard: corpora of another number are refused, not mixed
UTTERANCES_PER_CHAPTER = 20

# The variants of espeak-ng that speak clearly and sound unlike each other; left out: whispers, very slow
# ones, those that reach full scale, robots, and near copies. Every fifth is unseen in training, see `cast`.
FEMALE = (
    "Alicia Andrea Annie anika aunty belinda f1 f2 f3 f4 f5 grandma linda shelby steph"
).split()  # fmt: skip
MALE = (
    "Alex Andy Denis Diogo Henrique Hugo Lee Mario Michael Mike Nguyen Reed RicishayMax2 adam announcer antonio "
    "boris david ed edward gustave iven3 iven4 john klatt3 klatt5 m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel "
    "miguel mike2 norbert pablo paul pedro quincy rob robert sandro travis victor"
).split()
ACCENTS = ("en-us", "en-us", "en-gb-x-rp")


@dataclass(frozen=True)
class Settings:
    """What decides the corpus: the numbers of sentences, and the seed."""

    train: int = 4000
    dev: int = 100
    test: int = 200
    seed: int = 1234
    format: int = FORMAT


@dataclass(frozen=True)
class Speaker:
    """One voice with its number in the corpus, its sex as SPEAKERS.TXT writes it, and its split."""

    number: int
    sex: str
    split: str
    voice: Voice


@dataclass(frozen=True)
class Chapter:
    """The unit of work: some sentences by one speaker."""

    speaker: Speaker
    number: int
    texts: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        return f"{self.speaker.number}-{self.number}"

    def folder(self, corpus: Path) -> Path:
        return corpus / self.speaker.split / str(self.speaker.number) / str(self.number)

    def transcript(self, corpus: Path) -> Path:
        return self.folder(corpus) / f"{self.name}.trans.txt"


def cast(seed: int) -> list[Speaker]:
    """The speakers of all splits: of each sex every tenth variant goes to dev, and every sixth or so to test.

    The choice follows the order of the alphabet; it was not made by how well a voice is understood.
    """
    speakers = []
    for sex, variants in (("F", FEMALE), ("M", MALE)):
        for place, variant in enumerate(variants):
            split = {3: "test", 5: "dev", 7: "test"}.get(place % 12, "train")
            number = 100 + len(speakers)
            voice = Voice(
                accent=ACCENTS[keyed_integer(seed, "accent", variant) % len(ACCENTS)],
                variant=variant,
                rate=150 + keyed_integer(seed, "rate", variant) % 36,
                pitch=42 + keyed_integer(seed, "pitch", variant) % 17,
                pitch_range=40 + keyed_integer(seed, "range", variant) % 21,
            )
            speakers.append(Speaker(number, sex, split, voice))
    return speakers


def plan(settings: Settings) -> list[Chapter]:
    """All chapters: each split's sentences dealt out to its speakers in turn."""
    chapters = []
    speakers = cast(settings.seed)
    for split in SPLITS:
        texts = sentences(split, getattr(settings, split), settings.seed)
        voices = [speaker for speaker in speakers if speaker.split == split]
        for place, speaker in enumerate(voices):
            own = texts[place :: len(voices)]
            for start in range(0, len(own), UTTERANCES_PER_CHAPTER):
                number = 1000 * speaker.number + start // UTTERANCES_PER_CHAPTER
                part = tuple(own[start : start + UTTERANCES_PER_CHAPTER])
                chapters.append(Chapter(speaker, number, part, settings.seed))
    return chapters


def utterance(engine: Espeak, speaker: Speaker, name: str, text: str, seed: int) -> np.ndarray:
    """Speak ``text`` and put it into a room: manner, level and noise drawn for (seed, name).

    In train, the speaker's size and the room's color vary as well, from one utterance to the next: fifty
    voices are few, and a model that has heard them only as they are knows them by heart and no others.

    Returns
    -------
    (samples,) float32 at 16 kHz, within -1..1.
    """
    random = np.random.Generator(np.random.SFC64(keyed_integer(seed, "utterance", name)))
    voice = replace(
        speaker.voice,
        rate=round(speaker.voice.rate * random.uniform(0.94, 1.06)),
        pitch=speaker.voice.pitch + int(random.integers(-4, 5)),
    )
    spoken = engine.speak(text, voice, seed=keyed_integer(seed, "voice", name)).astype(np.float32)
    varied = speaker.split == "train"
    # Played faster, all resonances rise: a smaller speaker.
    waveform = soxr.resample(spoken, engine.sample_rate * (random.uniform(0.9, 1.1) if varied else 1.0), SAMPLE_RATE)
    if varied:
        waveform[1:] += random.uniform(-0.5, 0.5) * waveform[:-1]  # brighter or duller
    waveform *= random.uniform(0.3, 0.8) / max(float(np.abs(waveform).max()), 1.0)
    noise = random.standard_normal(len(waveform), dtype=np.float32)
    level = float(np.sqrt(np.mean(np.square(waveform)))) * 10 ** (-random.uniform(25, 40) / 20)  # 25 to 40 dB below
    return np.clip(waveform + level * noise, -1.0, 1.0)


_engine: Espeak | None = None  # one for each worker process: the library may be initialized only once in a process


def make_chapter(chapter: Chapter, corpus: Path) -> int:
    """Write one chapter's audio and then, as the mark that it is whole, its transcripts."""
    global _engine
    if _engine is None:
        _engine = Espeak()
    folder = chapter.folder(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for place, text in enumerate(chapter.texts):
        name = f"{chapter.name}-{place:04d}"
        waveform = utterance(_engine, chapter.speaker, name, text, chapter.seed)
        soundfile.write(folder / f"{name}.flac", waveform, SAMPLE_RATE, subtype="PCM_16")
        lines.append(f"{name} {text.upper()}\n")
    write_whole(chapter.transcript(corpus), "".join(lines))
    return len(lines)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_speakers(corpus: Path, chapters: Sequence[Chapter]) -> dict[str, float]:
    """SPEAKERS.TXT with the minutes that are on disk; returns the hours of each split."""
    hours = dict.fromkeys(SPLITS, 0.0)
    seconds: dict[Speaker, float] = {}
    for chapter in chapters:
        files = sorted(chapter.folder(corpus).glob("*.flac"))
        spoken = sum(soundfile.info(file).duration for file in files)
        seconds[chapter.speaker] = seconds.get(chapter.speaker, 0.0) + spoken
        hours[chapter.speaker.split] += spoken / 3600
    lines = ["; Synthetic speech by espeak-ng, in the layout of LibriSpeech\n", ";ID  |SEX| SUBSET | MINUTES | NAME\n"]
    for speaker, length in seconds.items():
        name = f"{speaker.voice.accent}+{speaker.voice.variant}"
        lines.append(f"{speaker.number:<5}| {speaker.sex} | {speaker.split:<6} | {length / 60:.2f} | {name}\n")
    write_whole(corpus / "SPEAKERS.TXT", "".join(lines))
    return hours


def work(chapters: Sequence[Chapter], corpus: Path, num_processes: int) -> Iterator[int]:
    """Make the chapters, in processes of their own: speaking forks, and this one may have threads."""
    context = get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        futures = [pool.submit(make_chapter, chapter, corpus) for chapter in chapters]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise SpeechError("a process that speaks ended unexpectedly; run the same command again.") from error
        finally:
            pool.shutdown(cancel_futures=True)


def make_corpus(
    output_folder: Path, settings: Settings, *, num_processes: int | None = None, quiet: bool = False
) -> Path:
    """Make, or complete, the corpus.

    Arguments
    ---------
    output_folder : gets ``LibriSpeech/`` and, when all is there, ``corpus.json``.
    num_processes : None takes as many as this process may use cores.

    Returns
    -------
    The folder ``LibriSpeech``, with one folder for each split.

    Raises
    ------
    SpeechError : no synthesiser here, or the folder holds a corpus of other settings.
    """
    corpus, mark = output_folder / "LibriSpeech", output_folder / "corpus.json"
    intent = output_folder / "settings.json"
    corpus.mkdir(parents=True, exist_ok=True)
    if intent.exists() and json.loads(intent.read_text()) != asdict(settings):
        raise SpeechError(
            f"{output_folder} holds a corpus made with other settings ({intent.read_text().strip()}); "
            "remove that folder, or choose another."
        )
    write_whole(intent, json.dumps(asdict(settings)) + "\n")
    if mark.exists():
        return corpus
    chapters = plan(settings)
    missing = [chapter for chapter in chapters if not chapter.transcript(corpus).exists()]
    total = sum(len(chapter.texts) for chapter in chapters)
    left = sum(len(chapter.texts) for chapter in missing)
    if missing:
        Espeak()  # a missing package is said here in one sentence, not by every worker
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tqdm(
        total=total, initial=total - left, desc="speaking", unit="utt", disable=quiet, dynamic_ncols=True
    ) as progress:
        if missing:
            for count in work(missing, corpus, min(num_processes or cores, len(missing))):
                progress.update(count)
    hours = write_speakers(corpus, chapters)
    write_whole(mark, json.dumps({"settings": asdict(settings), "hours": hours, "utterances": total}, indent=2) + "\n")
    return corpus


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_folder", type=Path, required=True, help="gets LibriSpeech/ with one folder a split")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, default=getattr(defaults, split), help=f"sentences in {split}")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="another seed, another corpus")
    parser.add_argument("--num_processes", type=int, default=None, help="processes that speak; default: one a core")
    arguments = parser.parse_args(argv)
    settings = Settings(train=arguments.train, dev=arguments.dev, test=arguments.test, seed=arguments.seed)
    try:
        corpus = make_corpus(arguments.output_folder, settings, num_processes=arguments.num_processes)
    except (SpeechError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    hours = json.loads((arguments.output_folder / "corpus.json").read_text())["hours"]
    print(f"{corpus}: " + ", ".join(f"{split} {60 * hours[split]:.1f} minutes" for split in SPLITS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
