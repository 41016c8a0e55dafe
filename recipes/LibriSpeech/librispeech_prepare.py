"""Turn a LibriSpeech tree into manifests: one CSV (ID,duration,wav,spk_id,wrd) for each split or subset.

    python librispeech_prepare.py --data_folder /corpora/LibriSpeech --output_folder manifests
    python librispeech_prepare.py --data_folder D --output_folder O --splits train-10min train-1h dev-clean

A split is a folder of the tree (``train-clean-100``, ``dev-clean``, ...). A subset is chosen from the train folders:
``train-10min``, ``train-1h``, ``train-10h`` (seeded, round-robin over speakers, the small ones inside the large ones),
``train-100h`` (train-clean-100) and ``train-960h`` (all three train folders); ``--subset_lists NAME=FILE`` takes the
utterances named in a file, one ID a line. Audio may be FLAC, WAV, Ogg, Opus or MP3, in any mixture.

Every audio file is decoded once to its end, in several processes. What was learned is kept in ``<output_folder>/scan``,
so an interrupted run goes on where it stopped, and a later run looks only at files that are new or changed. What does
not fit (audio without transcript, transcript without audio, corrupt files, durations out of range) is counted on the
screen and named in ``librispeech_prepare.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the script runs from a clone, installed or not

from toolkit.data.corpus_scan import (
    AUDIO_SUFFIXES,
    digest,
    file_digest,
    is_unchanged,
    list_tree,
    read_summary,
    scan,
)
from toolkit.data.fairseq_folder import check_fairseq_manifest, fairseq_manifests
from toolkit.data.manifest import write_manifest
from toolkit.errors import ConfigError, ManifestError, run_main
from toolkit.training.folders import write_atomic, write_json

OFFICIAL_UTTERANCES = {
    "train-clean-100": 28539, "train-clean-360": 104014, "train-other-500": 148688,
    "dev-clean": 2703, "dev-other": 2864, "test-clean": 2620, "test-other": 2939,
}
"""Utterances of the complete corpus, to say how much of it is here."""

TRAIN_FOLDERS = ("train-clean-100", "train-clean-360", "train-other-500")
SUBSET_HOURS = {"train-10min": 10 / 60, "train-1h": 1.0, "train-10h": 10.0}
WHOLE_SUBSETS = {"train-100h": TRAIN_FOLDERS[:1], "train-960h": TRAIN_FOLDERS}
MANIFEST_SUFFIXES = (".csv", ".json", ".jsonl", ".ndjson", ".tsv")
SUMMARY = "librispeech_prepare.json"


@dataclass
class Utterance:
    """One row to be: ``duration`` in seconds, ``wav`` an absolute path."""

    id: str
    duration: float
    wav: str
    speaker: str
    words: str

    def row(self) -> dict[str, str | float]:
        """The columns of a manifest."""
        return {"ID": self.id, "duration": self.duration, "wav": self.wav, "spk_id": self.speaker, "wrd": self.words}


@dataclass
class SplitReport:
    """What one folder of the tree holds, and what was left out and why (lists of utterance IDs or files)."""

    name: str
    transcript_lines: int = 0
    audio_files: int = 0
    utterances: int = 0
    hours: float = 0.0
    speakers: int = 0
    no_audio: list[str] = field(default_factory=list)
    no_transcript: list[str] = field(default_factory=list)
    empty_transcript: list[str] = field(default_factory=list)
    corrupt: dict[str, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    too_short: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Hold the counts against each other: every line and every file is accounted for exactly once."""
        left_out = len(self.empty_transcript) + len(self.corrupt) + len(self.too_short) + len(self.too_long)
        if self.utterances + left_out + len(self.no_audio) != self.transcript_lines or (
            self.utterances + left_out + len(self.no_transcript) + len(self.twice) != self.audio_files
        ):
            raise ManifestError(
                f"{self.name}: {self.utterances} rows do not add up with {self.transcript_lines} transcript lines and "
                f"{self.audio_files} audio files; the folder changed meanwhile: run librispeech_prepare.py again."
            )

    def lines(self) -> list[str]:
        """The report in words."""
        official = OFFICIAL_UTTERANCES.get(self.name)
        part = f" of the corpus' {official:,}" if official and official != self.utterances else ""
        text = [f"{self.name}: {self.utterances:,}{part} utterances, {self.hours:.2f} h, {self.speakers} speakers"]
        problems = (
            ("transcript lines without audio", self.no_audio), ("audio files without transcript", self.no_transcript),
            ("empty transcripts", self.empty_transcript), ("corrupt audio files", list(self.corrupt)),
            ("second files of one utterance", self.twice),
            ("shorter than min_duration", self.too_short), ("longer than max_duration", self.too_long),
        )
        for what, names in problems:
            if names:
                more = ", ..." if len(names) > 5 else ""
                text.append(f"  left out: {len(names):,} {what}: {', '.join(names[:5])}{more}")
        return text


def prepare_librispeech(
    data_folder: str | Path,
    output_folder: str | Path,
    *,
    splits: Sequence[str] | None = None,
    subset_lists: Sequence[str] = (),
    min_duration: float | None = None,
    max_duration: float | None = None,
    check: str = "decode",
    max_bad_share: float = 0.1,
    seed: int = 1234,
    num_workers: int | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Path]:
    """Write ``<output_folder>/<split>.csv`` for every split or subset asked for; reuse those that are there unchanged.

    Arguments
    ---------
    data_folder : the LibriSpeech folder (it holds ``dev-clean`` and so on), or the folder around it.
    output_folder : where the manifests, ``scan/`` and the summary go; created when missing.
    splits : folders (any that have the corpus' layout) and subsets; None takes every one that is there.
    subset_lists : further subsets, each "NAME=FILE"; the file lists utterance IDs, one a line.
    min_duration, max_duration : seconds, inclusive, for train folders only (a test set is never thinned out).
    check : "decode" reads every file to its end, "header" believes the header (faster; misses truncated files).
    max_bad_share : corrupt files of a folder tolerated, as a share of its audio files.
    seed : of the choice of subsets.
    num_workers : processes; None takes up to 8.
    say : is told what was found and written.

    Returns
    -------
    The manifest of each split or subset.

    Raises
    ------
    ManifestError : a folder, a list or too much audio is missing or bad. ConfigError : an argument makes no sense.
    """
    check_names("splits", splits or ())
    root, output = corpus_root(Path(data_folder), splits or ()), Path(output_folder)
    lists = parse_lists(subset_lists)
    wanted = list(dict.fromkeys(splits)) if splits else folders_there(root)
    wanted += [name for name in lists if name not in wanted]
    check_limits(min_duration, max_duration, check, max_bad_share, num_workers)
    check_wanted(root, wanted, lists)
    make_folder(output)

    sources = {name: folders_of(root, name, lists, say) for name in wanted}
    folders = list(dict.fromkeys(folder for found in sources.values() for folder in found))
    trees = {folder: list_tree(root / folder) for folder in folders}
    options = {"min_duration": min_duration, "max_duration": max_duration, "check": check, "seed": seed,
               "lists": {name: file_digest(Path(path)) for name, path in lists.items()}}
    keys = {name: digest([str(root.resolve()), options, {f: sorted(trees[f].items()) for f in found}])
            for name, found in sources.items()}
    summary = read_summary(output / SUMMARY)
    manifests = {name: output / f"{name}.csv" for name in wanted}
    stale = [name for name in wanted if not is_unchanged(manifests[name], summary.get(name), keys[name])]
    for name in wanted:
        if name not in stale:
            say(f"{name}: {manifests[name]} is there and unchanged, reused")
    if not stale:
        return manifests

    held: dict[str, list[Utterance]] = {}
    for folder in dict.fromkeys(folder for name in stale for folder in sources[name]):
        facts = scan(root / folder, trees[folder], output / "scan" / f"{folder}.jsonl", check, num_workers)
        limits = (min_duration, max_duration) if folder.startswith("train") else (None, None)
        held[folder], report = match(root / folder, trees[folder], facts, *limits)
        finish_report(report, held[folder], max_bad_share, output, say)
        summary.setdefault("folders", {})[folder] = vars(report)
    for name in stale:
        rows = choose(name, [u for folder in sources[name] for u in held[folder]], lists, seed, root)
        write_manifest(manifests[name], [row.row() for row in rows])
        hours = sum(row.duration for row in rows) / 3600
        summary[name] = {"key": keys[name], "utterances": len(rows), "hours": round(hours, 4),
                         "bytes": manifests[name].stat().st_size, "sha256": file_digest(manifests[name])}
        say(f"wrote {manifests[name]}: {len(rows):,} utterances, {hours:.2f} h")
        write_json(output / SUMMARY, summary)
    return manifests


def librispeech_manifests(
    splits: Sequence[str],
    *,
    data_folder: str | Path,
    manifest_folder: str | Path,
    audio_folder: str | Path | None = None,
    texts: bool = False,
    say: Callable[[str], object] = print,
    **options: object,
) -> dict[str, Path]:
    """The manifest of each entry of ``train_splits`` and the like: a manifest file as it is, a split prepared.

    Where ``data_folder`` was prepared for fairseq, its own manifests are the splits.

    Arguments
    ---------
    splits : names of splits, and files.
    data_folder, manifest_folder, say, options : see :func:`prepare_librispeech`.
    audio_folder : where the audio of fairseq's manifests is, if not where their first line says.
    texts : whether transcripts are needed.

    Raises
    ------
    ManifestError, ConfigError : as :func:`prepare_librispeech`, and for a manifest of fairseq's that cannot be used.
    """
    check_names("train_splits, valid_splits or test_splits", splits)
    files = {name: Path(name) for name in splits if name.lower().endswith(MANIFEST_SUFFIXES)}
    names = [name for name in splits if name not in files]
    if names:
        known = (*OFFICIAL_UTTERANCES, *SUBSET_HOURS, *WHOLE_SUBSETS)
        found = fairseq_manifests(data_folder, names, known=known, say=say)
        if found is None:
            found = prepare_librispeech(data_folder, manifest_folder, splits=names, say=say, **options)
        files |= found
    for path in files.values():
        check_fairseq_manifest(path, texts=texts, audio_folder=audio_folder)
    return files


def corpus_root(folder: Path, splits: Sequence[str]) -> Path:
    """The folder that holds the splits: ``folder`` or ``folder/LibriSpeech``."""
    for root in (folder, folder / "LibriSpeech"):
        known = any((root / name).is_dir() for name in (*OFFICIAL_UTTERANCES, *splits))
        if known or (not splits and folders_there(root)):
            return root
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ManifestError(f"data_folder {str(folder)!r} {reason}; give the folder that holds dev-clean/ etc.")
    raise ManifestError(
        f"data_folder {str(folder)!r} holds none of {', '.join(OFFICIAL_UTTERANCES)}; give the folder that "
        "LibriSpeech's archives unpack to (SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac)."
    )


def make_folder(folder: Path) -> None:
    """The folder for what is written, made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"the output folder {folder} lies at or under a file; choose another name.") from error
    except OSError as error:
        raise ConfigError(
            f"the output folder {folder} cannot be made ({error.strerror}); choose another folder."
        ) from error


def check_names(argument: str, names: Sequence[str]) -> None:
    """Refuse numbers and nulls, which YAML makes of names without quotes, and a name where a list is expected."""
    if isinstance(names, str):
        raise ConfigError(f"{argument} is {names!r}, expected a list; write [{names}].")
    if wrong := [name for name in names if not isinstance(name, str) or not name.strip()]:
        raise ConfigError(
            f"{argument} holds {wrong[0]!r}, expected names; put quotes round a name that is a number, and write [] "
            "for none."
        )


def parse_lists(items: Sequence[str]) -> dict[str, Path]:
    """"NAME=FILE" to name and file."""
    check_names("subset_lists", items)
    pairs = [item.partition("=") for item in items]
    if wrong := [item for item, (name, _, file) in zip(items, pairs, strict=True) if not (name and file)]:
        raise ConfigError(f"subset_lists has {wrong[0]!r}; write NAME=FILE, for example train-mine=ids.txt.")
    return {name: Path(file) for name, _, file in pairs}


def folders_there(root: Path) -> list[str]:
    """The corpus' own folders in ``root``, or, in a corpus of the same layout, every folder with transcripts."""
    official = [name for name in OFFICIAL_UTTERANCES if (root / name).is_dir()]
    return official or sorted({path.parents[2].name for path in root.glob("*/*/*/*.trans.txt")})


def check_limits(low: float | None, high: float | None, check: str, share: float, num_workers: int | None) -> None:
    """Refuse numbers that cannot be meant."""
    if check not in ("decode", "header"):
        raise ConfigError(f"check is {check!r}; take 'decode' or 'header'.")
    if not 0 <= share <= 1:
        raise ConfigError(f"max_bad_share is {share}; take a share between 0 and 1.")
    for name, limit in (("min_duration", low), ("max_duration", high)):
        if limit is not None and (not isinstance(limit, (int, float)) or math.isnan(limit) or limit < 0):
            raise ConfigError(f"{name} is {limit!r}; take seconds, 0 or more, or leave it out.")
    if num_workers is not None and (not isinstance(num_workers, int) or num_workers < 0):
        raise ConfigError(f"num_workers is {num_workers!r}; take a whole number, 0 or more, or leave it out.")
    if low is not None and high is not None and low > high:
        raise ConfigError(f"min_duration {low} s is above max_duration {high} s; exchange or drop one.")


def check_wanted(root: Path, wanted: Sequence[str], lists: Mapping[str, Path]) -> None:
    """Refuse names that are neither here nor known, all at once."""
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    known = {*there, *SUBSET_HOURS, *WHOLE_SUBSETS, *lists}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ManifestError(
            f"{', '.join(unknown)}: not in {str(root)!r}, which holds {', '.join(there)}; subsets are "
            f"{', '.join((*SUBSET_HOURS, *WHOLE_SUBSETS))}."
        )
    for name, path in lists.items():
        if not Path(path).is_file():
            reason = "is a folder, not a file" if Path(path).is_dir() else "does not exist"
            raise ManifestError(f"subset_lists: {name}: the file {str(path)!r} {reason}; check the path.")


def folders_of(root: Path, name: str, lists: Mapping, say: Callable[[str], object]) -> list[str]:
    """The folders of the tree that a split or subset draws from."""
    if (root / name).is_dir() and name not in lists:
        return [name]
    candidates = WHOLE_SUBSETS.get(name, TRAIN_FOLDERS if name in SUBSET_HOURS else tuple(OFFICIAL_UTTERANCES))
    found = [folder for folder in candidates if (root / folder).is_dir()]
    missing = [folder for folder in candidates if folder not in found]
    if not found:
        raise ManifestError(f"{name} is chosen from {', '.join(candidates)}, none of which is in {str(root)!r}.")
    if missing and name in WHOLE_SUBSETS:
        say(f"{name}: {', '.join(missing)} not there, so it holds {', '.join(found)} only")
    return found


def match(folder: Path, tree: Mapping, facts: Mapping[str, dict], low: float | None,
          high: float | None) -> tuple[list[Utterance], SplitReport]:
    """Put transcripts and audio together; everything that does not fit goes to the report by name."""
    report = SplitReport(folder.name)
    words = read_transcripts(folder, (name for name in tree if name.endswith(".trans.txt")))
    audio: dict[str, str] = {}
    # FLAC first: it is the original where an utterance is there twice
    for name in sorted(facts, key=lambda n: (AUDIO_SUFFIXES.index(Path(n).suffix.lower()), n)):
        utterance = Path(name).stem
        report.twice.extend([name] if utterance in audio else [])
        audio.setdefault(utterance, name)
    report.transcript_lines, report.audio_files = len(words), len(facts)
    report.no_audio = sorted(words.keys() - audio.keys())
    report.no_transcript = sorted(audio[key] for key in audio.keys() - words.keys())
    utterances = []
    for key in sorted(words.keys() & audio.keys(), key=natural):
        fact = facts[audio[key]]
        duration = fact["frames"] / fact["rate"] if "frames" in fact else 0.0
        if "error" in fact:
            report.corrupt[audio[key]] = fact["error"]
        elif not words[key]:
            report.empty_transcript.append(key)
        elif low is not None and duration < low:
            report.too_short.append(key)
        elif high is not None and duration > high:
            report.too_long.append(key)
        else:
            path = str((folder / audio[key]).resolve())
            utterances.append(Utterance(key, duration, path, key.split("-")[0], words[key]))
    return utterances, report


def read_transcripts(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Utterance ID to transcript, from every ``*.trans.txt``."""
    words: dict[str, str] = {}
    for name in sorted(names):
        for number, line in enumerate(read_utf8(folder / name).split("\n"), start=1):
            if not line.strip():
                continue
            key, *text = line.split()
            if key in words:
                raise ManifestError(f"{folder / name}, line {number}: {key} has a transcript already; delete one.")
            words[key] = " ".join(text)
    return words


def read_utf8(path: Path) -> str:
    """A text file, without the mark that some editors put at its beginning."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8.") from error


def finish_report(report: SplitReport, utterances: Sequence[Utterance], max_bad_share: float, output: Path,
                  say: Callable[[str], object]) -> None:
    """Fill in the sums, check them, print them, and refuse a folder with too much corrupt audio or none at all."""
    report.utterances = len(utterances)
    report.hours = sum(u.duration for u in utterances) / 3600
    report.speakers = len({u.speaker for u in utterances})
    report.check()
    say("\n".join(report.lines()))
    if len(report.corrupt) > max_bad_share * report.audio_files:
        named = output / f"{report.name}_corrupt.txt"
        write_atomic(named, "".join(f"{file}: {why}\n" for file, why in report.corrupt.items()))
        raise ManifestError(
            f"{report.name}: {len(report.corrupt)} of {report.audio_files} audio files cannot be read, more than "
            f"max_bad_share {max_bad_share}, the first {next(iter(report.corrupt))}; all are named in {named}: "
            "unpack the archive again, or raise --max_bad_share."
        )
    if not utterances:
        raise ManifestError(
            f"{report.name}: no utterance is left of {report.transcript_lines} transcript lines and "
            f"{report.audio_files} audio files; check the folder and the duration limits."
        )


def choose(name: str, rows: list[Utterance], lists: Mapping[str, str | Path], seed: int, root: Path) -> list[Utterance]:
    """The rows of a split or subset, in the order of the corpus."""
    if name in lists:
        return choose_listed(name, rows, Path(lists[name]))
    if name in SUBSET_HOURS and not (root / name).is_dir():
        return choose_balanced(name, rows, SUBSET_HOURS[name] * 3600, seed)
    return rows


def choose_listed(name: str, rows: Sequence[Utterance], path: Path) -> list[Utterance]:
    """The utterances that a file names, one ID a line (a path or a suffix around the ID does no harm)."""
    ids = {Path(line.split()[0]).stem for line in read_utf8(path).splitlines() if line.strip()}
    missing = sorted(ids - {row.id for row in rows})
    if missing:
        raise ManifestError(
            f"{name}: {len(missing)} of the {len(ids)} utterances listed in {path} are not in the corpus here, the "
            f"first {missing[0]}; add the split that holds them or correct the list."
        )
    return [row for row in rows if row.id in ids]


def choose_balanced(name: str, rows: Sequence[Utterance], seconds: float, seed: int) -> list[Utterance]:
    """One utterance a speaker in turn, speakers and utterances in a seeded order, until ``seconds`` are full.

    The order does not depend on ``seconds``: with the same seed, the 10 minutes lie inside the hour.
    """
    total = sum(row.duration for row in rows)
    if total < seconds:
        raise ManifestError(
            f"{name} needs {seconds / 60:.0f} min of training speech and the folder holds {total / 60:.1f} min; "
            "add train folders or take a smaller subset."
        )

    def drawn(key: str) -> bytes:
        return hashlib.sha256(f"{seed}/{key}".encode()).digest()

    speakers: dict[str, list[Utterance]] = {}
    for row in sorted(rows, key=lambda r: drawn(r.id)):
        speakers.setdefault(row.speaker, []).append(row)
    turns = ((turn, drawn(speaker), row) for speaker, own in speakers.items() for turn, row in enumerate(own))
    chosen, length = set(), 0.0
    for _, _, row in sorted(turns, key=lambda item: item[:2]):
        if length >= seconds:
            break
        chosen.add(row.id)
        length += row.duration
    return [row for row in rows if row.id in chosen]


def natural(key: str) -> tuple:
    """Sorts 84-2-1 before 121-1-1, as a reader expects."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split("-"))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--data_folder", required=True, help="the LibriSpeech folder (it holds dev-clean/ and so on)")
    add("--output_folder", required=True, help="where the manifests go")
    add("--splits", nargs="+", help="folders and subsets; default: every LibriSpeech folder that is there")
    add("--subset_lists", nargs="+", default=[], metavar="NAME=FILE", help="subsets by lists of utterance IDs")
    add("--min_duration", type=float, help="seconds; shorter training utterances are left out and counted")
    add("--max_duration", type=float, help="seconds; longer training utterances are left out and counted")
    add("--check", choices=("decode", "header"), default="decode", help="read every file to its end, or headers only")
    add("--max_bad_share", type=float, default=0.1, help="share of corrupt files tolerated in a folder")
    add("--seed", type=int, default=1234, help="of the choice of subsets")
    add("--num_workers", type=int, help="processes; default: up to 8")
    prepare_librispeech(**vars(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
