"""``python -m toolkit manifest IN OUT``: a manifest of one kind written as another, fairseq's folders among them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from toolkit.data.audio import audio_info
from toolkit.data.fairseq_format import FAIRSEQ_RATE
from toolkit.data.manifest import Manifest, read_manifest, write_manifest
from toolkit.data.tokens import LETTERS_FILE, LetterTokenizer
from toolkit.errors import AudioError, ManifestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand."""
    parser.add_argument("input", help="a manifest of any kind: .csv, .json, .jsonl, .tsv")
    parser.add_argument("output", help="what to write, its kind by its suffix; .tsv is fairseq's, with .wrd and .ltr")
    parser.add_argument("--data_root", help="folder that paths are written relative to (the first line of a .tsv)")
    parser.add_argument("--audio_folder", help="where the audio of a fairseq .tsv is, if not in its first line")
    parser.add_argument("--sample_rate", type=int, help="Hz at which a .tsv counts samples, if not the first file's")
    parser.add_argument("--dictionary", action="store_true", help="write dict.ltr.txt beside a .tsv, of its letters")


def run_command(arguments: argparse.Namespace) -> int:
    """Read, write and say what was written."""
    manifest = read_manifest(arguments.input, sample_rate=arguments.sample_rate, root=arguments.audio_folder)
    output = Path(arguments.output)
    names = [output, *(output.with_suffix(end) for end in (".wrd", ".ltr") if output.suffix.lower() == ".tsv")]
    names += [output.with_name(LETTERS_FILE)] if arguments.dictionary else []
    if there := [name for name in names if name.exists()]:
        raise ManifestError(f"{there[0]} is there already; name a new path, nothing is overwritten.")
    if output.suffix.lower() == ".tsv":
        files = write_fairseq_manifest(
            output,
            manifest,
            data_root=arguments.data_root,
            sample_rate=arguments.sample_rate,
            dictionary=arguments.dictionary,
        )
    else:
        files = [write_manifest(output, manifest, data_root=arguments.data_root)]
    print(f"{len(manifest)} utterances, {manifest.hours:.2f} hours: {', '.join(map(str, files))}")
    return 0


def write_fairseq_manifest(
    path: str | os.PathLike[str],
    manifest: Manifest,
    *,
    data_root: str | os.PathLike[str] | None = None,
    sample_rate: int | None = None,
    dictionary: bool = False,
) -> list[Path]:
    """Write a manifest as fairseq's scripts do: ``.tsv``, and ``.wrd`` and ``.ltr`` where there are transcripts.

    Arguments
    ---------
    path : the ``.tsv``.
    manifest : any; for fairseq, its audio has to be of the rate that the model is for.
    data_root : first line, the folder of the audio; None takes the manifest's own or the deepest common one.
    sample_rate : Hz at which samples are counted; None takes the manifest's, else that of its first file (16,000 if
        that is not here).
    dictionary : also write ``dict.ltr.txt`` of the transcripts' letters, as fairseq-preprocess does without padding.

    Returns
    -------
    The files written.

    Raises
    ------
    ManifestError : a file is outside the root, or there are no transcripts to make a dictionary of.
    """
    path = Path(path)
    rate = sample_rate or manifest.sample_rate
    if rate is None:
        try:
            rate = audio_info(manifest.row(0)["wav"]).sample_rate
        except AudioError:
            rate = FAIRSEQ_RATE
    texts = manifest.column("wrd") if dictionary else ()
    files = [write_manifest(path, manifest, data_root=data_root, sample_rate=rate)]
    if "wrd" in manifest.columns:
        files += [path.with_suffix(".wrd"), path.with_suffix(".ltr")]
    if dictionary:
        files.append(path.parent / LetterTokenizer.from_texts(texts, word_boundary="|").save(path.parent))
    return files
