"""fairseq's speech manifests, ``.tsv`` with ``.wrd`` and ``.ltr`` beside it: read, and written byte for byte."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

import numpy as np

from toolkit.data.audio import ENTRY, ZIP_ENTRY, audio_info
from toolkit.data.formats import PathResolver, read_text
from toolkit.data.table import Manifest, ManifestBuilder, shortened
from toolkit.errors import AudioError, ManifestError

FAIRSEQ_RATE = 16000
"""Hz taken for a tsv whose audio cannot be looked at: what all of fairseq's speech models use."""

FRAME_DIGITS = 15
"""Digits of a number of samples; more would be thousands of years of audio."""

WORD_GAP = "|"
"""What ends a word in a line of letters."""


def read_fairseq(
    path: Path,
    file: TextIO,
    resolve: PathResolver,
    sample_rate: int | None,
    root: str | os.PathLike[str] | None = None,
) -> Manifest:
    """A ``.tsv`` (root, then path and frames) with ``.wrd`` or ``.ltr`` beside it.

    Lines of the label files belong to the lines of the tsv one by one. Utterances are named by the stem of their
    file, or by their relative path where two stems are equal.

    Arguments
    ---------
    path, file : the manifest and its open text.
    resolve : makes a relative root absolute.
    sample_rate : Hz at which samples were counted; None looks at the first file.
    root : the audio's folder, in place of the first line.

    Raises
    ------
    ManifestError : with file and line.
    """
    name = str(path)
    written_root = file.readline().strip()
    root = os.path.abspath(root) if root is not None else resolve(written_root, f"{name}, line 1")
    entries = _entries(name, file)
    labels = _labels(path, len(entries))
    rate = sample_rate or rate_of(root, [entry for entry, _ in entries])
    stems = [entry if ".zip:" in entry else Path(entry).stem for entry, _ in entries]
    unique = len(set(stems)) == len(stems)
    builder = ManifestBuilder(["ID", "duration", "wav"] + (["wrd"] if labels else []), name)
    sizes: dict[str, int | None] = {}
    for index, (entry, frames) in enumerate(entries):
        if not frames.isdecimal() or len(frames) > FRAME_DIGITS or int(frames) == 0:
            raise ManifestError(
                f"{name}, line {index + 2}: the number of samples is {shortened(repr(frames))}, expected a whole "
                "number greater than 0; correct or delete the line."
            )
        wav = os.path.join(root, entry)
        if ".zip:" in entry.lower():
            _check_zip_entry(wav, f"{name}, line {index + 2}", sizes)
        identity = stems[index] if unique else os.path.splitext(entry)[0]
        row = {"ID": identity, "duration": int(frames) / rate, "wav": wav}
        builder.add(row | ({"wrd": labels[index]} if labels else {}), index + 2)
    return builder.finish(root=root, sample_rate=rate)


def fairseq_lines(
    path: Path, manifest: Manifest, data_root: str | os.PathLike[str] | None, sample_rate: int | None
) -> dict[Path, list[str]]:
    """The lines of a manifest's ``.tsv``, and of ``.wrd`` and ``.ltr`` where it has transcripts, by file.

    Arguments
    ---------
    path : of the tsv.
    manifest : what to write.
    data_root : the first line; None takes the manifest's own root, or the deepest folder common to its audio.
    sample_rate : Hz at which samples are counted; None takes the manifest's (16,000 where it has none).

    Raises
    ------
    ManifestError : a file is not under the root, or stands in a tar.
    """
    rate = sample_rate or manifest.sample_rate or FAIRSEQ_RATE
    wavs = list(manifest.column("wav"))
    root = os.path.abspath(data_root) if data_root is not None else manifest.root or _common_folder(wavs)
    inside = root.rstrip(os.sep) + os.sep
    outside = next((wav for wav in wavs if not wav.startswith(inside)), None)
    if outside is not None:
        raise ManifestError(
            f"{path} cannot name {outside}, which is not under its root {root}; give another data_root."
        )
    packed = next((wav for wav in wavs if ENTRY.fullmatch(wav) and not ZIP_ENTRY.fullmatch(wav)), None)
    if packed is not None:
        raise ManifestError(
            f"{path} cannot name {packed}, an entry of a tar, which fairseq does not read; convert the manifest of the "
            "loose files."
        )
    frames = np.rint(manifest.durations * rate).astype(np.int64)
    lines = [f"{wav.removeprefix(inside)}\t{count}" for wav, count in zip(wavs, frames, strict=True)]
    texts = {path: [root, *lines]}
    if "wrd" in manifest.columns:
        words = [" ".join(text.split()) for text in manifest.column("wrd")]
        texts[path.with_suffix(".wrd")] = words
        texts[path.with_suffix(".ltr")] = [" ".join(text.replace(" ", WORD_GAP)) + f" {WORD_GAP}" for text in words]
    return texts


def rate_of(root: str, entries: list[str]) -> int:
    """The rate at which frames were counted: that of the first file, where it is there to look at."""
    try:
        return audio_info(os.path.join(root, entries[0])).sample_rate if entries else FAIRSEQ_RATE
    except AudioError:
        return FAIRSEQ_RATE


def _entries(name: str, file: TextIO) -> list[tuple[str, str]]:
    """Path and frames of each line after the first."""
    entries: list[tuple[str, str]] = []
    for number, line in enumerate(file, start=2):
        fields = line.strip().split("\t")
        if len(fields) != 2:
            if fields == [""]:
                raise ManifestError(
                    f"{name}, line {number}: the line is empty; delete it, here and in the label files."
                )
            raise ManifestError(
                f"{name}, line {number}: there are {len(fields)} fields, expected a path and a number of samples with "
                "one tab between them; correct the line."
            )
        entries.append((fields[0], fields[1]))
    return entries


def _labels(path: Path, expected: int) -> list[str] | None:
    words, letters = path.with_suffix(".wrd"), path.with_suffix(".ltr")
    file = words if words.is_file() else letters
    if not file.is_file():
        return None
    lines = read_text(file).split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    if len(lines) != expected:
        raise ManifestError(
            f"{file} has {len(lines)} lines and {path} has {expected} utterances; they must belong together line by "
            "line."
        )
    if file == letters:
        lines = [line.replace(" ", "").replace(WORD_GAP, " ") for line in lines]
    return [" ".join(line.split()) for line in lines]


def _check_zip_entry(wav: str, where: str, sizes: dict[str, int | None]) -> None:
    """Refuse an entry that is not ``archive.zip:OFFSET:LENGTH``, or whose bytes the archive (if it is here) lacks."""
    entry = ZIP_ENTRY.fullmatch(wav)
    if entry is None:
        if os.path.exists(wav):
            return
        raise ManifestError(
            f"{where}: {os.path.basename(wav)!r} is no entry of an archive; write archive.zip:OFFSET:LENGTH, in bytes."
        )
    archive = entry["archive"]
    if archive not in sizes:
        sizes[archive] = os.path.getsize(archive) if os.path.isfile(archive) else None
    size, end = sizes[archive], int(entry["offset"]) + int(entry["length"])
    if int(entry["length"]) == 0 or (size is not None and end > size):
        raise ManifestError(
            f"{where}: bytes {entry['offset']} to {shortened(str(end))} of {archive} are asked for, which has "
            f"{'unknown' if size is None else size}; write the manifest again from this archive."
        )


def _common_folder(wavs: list[str]) -> str:
    return os.path.commonpath({os.path.dirname(wav) for wav in wavs})
