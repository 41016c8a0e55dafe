"""A folder that was prepared for fairseq (``train.tsv``, ``valid.tsv``, labels, ``dict.ltr.txt``), used as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

from toolkit.data.fairseq_format import WORD_GAP
from toolkit.data.formats import read_text
from toolkit.data.manifest import Manifest, name_some
from toolkit.data.tokens import LetterTokenizer, Tokenizer
from toolkit.errors import ManifestError

DICTIONARY = "dict.ltr.txt"

STANDARD_NAMES = {"train": ("train",), "dev": ("valid", "dev"), "valid": ("valid", "dev"), "test": ("test",)}
"""By the first word of a corpus' split: what fairseq's users call that part."""


def is_fairseq_manifest(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a tsv of fairseq's: a folder in the first line, then path and samples."""
    path = Path(path)
    if path.suffix.lower() != ".tsv" or not path.is_file():
        return False
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first, second = file.readline(), file.readline()
    return bool(first.strip()) and "\t" not in first and second.count("\t") == 1


def fairseq_manifests(
    folder: str | os.PathLike[str],
    splits: Sequence[str],
    *,
    known: Collection[str] = (),
    say: Callable[[str], object] = print,
) -> dict[str, Path] | None:
    """The manifest of each split in a folder of fairseq's; None where ``folder`` is no such folder.

    A split is the tsv of its name (``dev_other`` for ``dev-other`` too). Splits that a recipe's YAML names by the
    corpus it is for stand for the usual ones: train-clean-100 for ``train``, dev-clean for ``valid``, test-other for
    ``test``.

    Arguments
    ---------
    folder : the data folder.
    splits : names of splits.
    known : names of the corpus' own, for which the usual ones may stand.
    say : is told which file was taken for which name.

    Raises
    ------
    ManifestError : it is a folder of fairseq's that lacks a split.

    Example
    -------
    >>> fairseq_manifests("/nowhere", ["train"]) is None
    True
    """
    folder = Path(folder)
    there = {path.stem: path for path in sorted(folder.glob("*.tsv")) if is_fairseq_manifest(path)}
    if not there or any((root / name).is_dir() for root in (folder, folder / "LibriSpeech") for name in splits):
        return None
    found: dict[str, Path] = {}
    for name in splits:
        names = [name, name.replace("-", "_")]
        if name in known:
            names += STANDARD_NAMES.get(name.split("-")[0], ())
        stem = next((stem for stem in names if stem in there), None)
        if stem is None:
            raise ManifestError(
                f"{folder} holds manifests of fairseq's, but none for the split {name!r}; there are "
                f"{', '.join(there)}: name some of them in train_splits, valid_splits and test_splits."
            )
        if name not in found and stem != name:
            say(f"{name}: {there[stem]}, a manifest of fairseq's")
        found[name] = there[stem]
    return found


def check_fairseq_manifest(
    path: str | os.PathLike[str], *, texts: bool, audio_folder: str | os.PathLike[str] | None = None
) -> None:
    """Refuse a tsv of fairseq's that cannot be trained on here; another kind of manifest passes.

    Arguments
    ---------
    path : the manifest.
    texts : whether transcripts are needed.
    audio_folder : where the audio is if not in the tsv's first line.

    Raises
    ------
    ManifestError : the audio's folder is not on this machine, there are no labels, or they are no letters.
    """
    path = Path(path)
    if not is_fairseq_manifest(path):
        return
    if audio_folder is not None:
        if not Path(audio_folder).is_dir():
            raise ManifestError(f"audio_folder {str(audio_folder)!r} is no folder; give the one that {path} is about.")
    else:
        with open(path, encoding="utf-8-sig") as file:
            root = file.readline().strip()
        if not (path.parent / root).is_dir():
            raise ManifestError(
                f"{path}, line 1: the audio's folder {root} is not on this machine; say where it is with "
                "--audio_folder FOLDER."
            )
    if not texts or path.with_suffix(".wrd").is_file():
        return
    letters = path.with_suffix(".ltr")
    if not letters.is_file():
        raise ManifestError(
            f"{path} has no transcripts: neither {letters.name} nor {path.stem}.wrd is beside it; copy them there, or "
            "write them as fairseq's libri_labels.py does."
        )
    for number, line in enumerate(read_text(letters).split("\n"), start=1):
        if long := next((symbol for symbol in line.split() if len(symbol) > 1), None):
            raise ManifestError(
                f"{letters}, line {number}: {long!r} is no letter; write single letters with spaces between, and "
                f"{WORD_GAP} after each word."
            )


def dictionary_beside(paths: Iterable[str | os.PathLike[str]]) -> Path | None:
    """The ``dict.ltr.txt`` that belongs to manifests, if all are fairseq's and the first has one beside it."""
    paths = [Path(path) for path in paths]
    if not paths or not all(is_fairseq_manifest(path) for path in paths):
        return None
    file = paths[0].parent / DICTIONARY
    return file if file.is_file() else None


def tokenizer_of(
    make: Callable[[Iterable[str]], Tokenizer],
    train: Manifest,
    dictionary: Path | None,
    say: Callable[[str], object] = print,
) -> Tokenizer:
    """The tokens of a training set: those of its dictionary, or made from its transcripts.

    Arguments
    ---------
    make : the settings' way from transcripts to tokens. Only letters can come from a dictionary.
    train : training utterances, with the column wrd.
    dictionary : a ``dict.ltr.txt`` whose symbols, order and made up words are kept; None makes the tokens.
    say : is told what was taken, and which characters the dictionary lacks.

    Raises
    ------
    TokenError : the dictionary or a transcript cannot be used.
    """
    texts = train.column("wrd")
    settings = dict(make.keywords) if isinstance(make, partial) else {}
    if dictionary is None or getattr(make, "func", make) != LetterTokenizer.from_texts:
        if dictionary is not None:
            say(f"tokens: made from the transcripts as the settings say, not those of {dictionary}")
        return make(texts)
    settings.pop("padding_factor", None)
    settings = {name: value for name, value in settings.items() if value is not None}
    tokenizer = LetterTokenizer.from_file(dictionary, **settings)
    say(f"tokens: {dictionary}")
    # With unknown "error", encoding is what refuses, in its own words.
    letters = set(tokenizer.symbols) - {tokenizer.word_boundary}
    lacking: set[str] = set()
    rows = []
    for row, text in enumerate(texts):
        strange = set(tokenizer.normalize(text)) - letters - {" "}
        if strange:
            tokenizer.encode(text)
            lacking |= strange
            rows.append(row)
    if rows:
        fate = "are left out" if tokenizer.unknown == "drop" else "become <unk>"
        say(
            f"warning: {dictionary} lacks {' '.join(sorted(lacking)[:20])}, which {fate} in {len(rows)} of "
            f"{len(train)} training transcripts ({name_some(train, rows)}); set the tokenizer's case to upper or lower "
            "where only the case differs."
        )
    return tokenizer
