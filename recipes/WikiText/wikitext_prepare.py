"""Turn text files into fairseq's binary form: dict.txt and {train,valid,test}.{bin,idx}, byte for byte.

    python wikitext_prepare.py --data_folder wikitext-103-raw --bpe_folder gpt2_bpe --output_folder prepared
    python wikitext_prepare.py --data_folder D --bpe_folder B --output_folder O --dict gpt2_bpe/dict.txt

``--data_folder`` holds files in whose names a word begins with train, valid or test (``wiki.train.raw``,
``my_valid.txt``, not ``mytrain.txt``; .raw goes before .tokens where both are there), or is one such file. Every line
is turned into GPT-2's byte pairs (``encoder.json`` and ``vocab.bpe`` in ``--bpe_folder``), with ``--words`` into its
words. dict.txt is built from the training text, or taken from ``--dict``: give a pretrained model's to go on with it,
and GPT-2's whole one where the training text is small, for what does not occur in it is ``<unk>`` in the other parts.

The text is taken as it is, as fairseq's RoBERTa recipe does: white space at the ends of a line goes, headings
(`` = Title = ``) are lines like others, and an empty line stays an empty line, which parts documents in the break
mode complete_doc. WikiText has one after every heading and paragraph, so that its documents are paragraphs; "complete"
packs blocks across them. A data_folder that holds fairseq's own files is used as it is, and nothing is written.

Work is shared out over processes; what is there and unchanged is used again.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the script runs from a clone, installed or not

from toolkit.data.corpus_scan import digest, file_digest, read_summary
from toolkit.data.text_binarize import PartReport, binarize
from toolkit.data.text_bpe import ENCODER_FILE, MERGES_FILE, Gpt2Bpe, check_gpt2_dictionary, holds_gpt2_numbers
from toolkit.data.text_dictionary import DICT_FILE, TextDictionary
from toolkit.errors import ConfigError, ManifestError, run_main
from toolkit.training.folders import write_json

PARTS = ("train", "valid", "test")
SUFFIXES = (".raw", ".tokens", ".txt")
"""Text files, the better one first: .raw has the words that .tokens replaces by <unk>."""

SUMMARY = "wikitext_prepare.json"

BOTH = "both bpe_folder and words are given; byte pairs or words, choose one."

MOST_UNKNOWN = 0.01
"""Share of a part's tokens that a dictionary built from train may lack before there is a warning."""

WORK_FOLDER = ".preparing"
"""Holds what is not complete yet."""


def prepare_text(
    data_folder: str | Path,
    output_folder: str | Path,
    *,
    bpe_folder: str | Path | None = None,
    words: bool = False,
    dictionary: str | Path | None = None,
    num_workers: int | None = None,
    say: Callable[[str], object] = print,
) -> Path:
    """Write the binary form of the texts in ``data_folder``, or find that it is there.

    Arguments
    ---------
    data_folder : a folder of text files, one text file, or a folder that is prepared already.
    output_folder : where dict.txt, the .bin, the .idx and the summary go; created when missing.
    bpe_folder : GPT-2's encoder.json and vocab.bpe.
    words : take the words between white space instead of byte pairs.
    dictionary : a fairseq dict.txt to use; None builds one from the training text.
    num_workers : processes; None takes up to 8.
    say : is told what was found and written.

    Returns
    -------
    The folder with the binary form: ``output_folder``, or ``data_folder`` where that is prepared.

    Raises
    ------
    ManifestError : a text is missing or empty. ConfigError : an argument makes no sense. TokenError : the BPE files,
    the dictionary or a text cannot be read.
    """
    source, output = Path(data_folder).expanduser(), Path(output_folder).expanduser()
    if is_prepared(source) and not is_own(source, output):
        check_prepared(source, bpe_folder, words, dictionary)
        say(f"{source} holds fairseq's binary files, taken as they are")
        return source
    if is_without_dictionary(source):
        if dictionary is None:
            raise ManifestError(
                f"{source} holds {binary_names(source)}, but no {DICT_FILE} beside it; copy the one that was written "
                "with it there, or name it with --dict."
            )
        check_symbols(TextDictionary.from_file(Path(dictionary).expanduser()), dictionary, bpe_folder, words)
        say(f"{source} holds fairseq's binary files, taken as they are with the dictionary {dictionary}")
        return source
    dictionary = None if dictionary is None else Path(dictionary).expanduser()
    files = find_texts(source, say)
    check_arguments(files, bpe_folder, words, dictionary, num_workers)
    bpe = None if words or bpe_folder is None else Path(bpe_folder).expanduser()
    given = None if dictionary is None else TextDictionary.from_file(dictionary)
    if bpe is not None:
        Gpt2Bpe.from_folder(bpe)  # what is wrong with it is told now, by this process
        if given is not None and dictionary is not None:
            check_gpt2_dictionary(given, dictionary)
    key = digest([{part: stamp(path) for part, path in files.items()},
                  None if bpe is None else [file_digest(path) for path in bpe_files(bpe)],
                  None if dictionary is None else file_digest(dictionary)])
    make_folder(output)
    summary = read_summary(output / SUMMARY)
    if is_unchanged(output, summary, key):
        say(f"{output}: {', '.join(files)} are there and unchanged, reused")
        return output
    if is_prepared(output) and "prepared" not in summary:
        raise ConfigError(
            f"the output folder {output} holds prepared text that this script did not write; use it as --data_folder, "
            "empty it, or choose another."
        )
    target = output / WORK_FOLDER
    shutil.rmtree(target, ignore_errors=True)  # a killed run's
    target.mkdir()
    try:
        reports = binarize(files, target, bpe_folder=bpe, dictionary=given, num_workers=num_workers)
        names = [DICT_FILE, *(f"{part}.{end}" for part in files for end in ("bin", "idx"))]
        move_in(target, output, names, summary.get("prepared", {}).get("files"))
    finally:
        shutil.rmtree(target, ignore_errors=True)
    written = {name: stamp(output / name) for name in names}
    parts = {part: {**vars(report), "file": str(files[part])} for part, report in reports.items()}
    write_json(output / SUMMARY, {"prepared": {"key": key, "files": written, "parts": parts}})
    tell(output, reports, say, is_built=bpe is not None and given is None)
    return output


def is_prepared(folder: Path) -> bool:
    """Whether ``folder`` holds a dictionary and at least one binary text."""
    return (folder / DICT_FILE).is_file() and any(folder.glob("*.idx"))


def is_without_dictionary(folder: Path) -> bool:
    """Whether ``folder`` holds binary texts and neither a dictionary nor texts to make them of."""
    if not folder.is_dir() or (folder / DICT_FILE).is_file() or not any(folder.glob("*.idx")):
        return False
    return not any(is_text(path, part) for path in folder.iterdir() for part in PARTS)


def binary_names(folder: Path) -> str:
    """The index files in ``folder``, for a message."""
    return ", ".join(sorted(path.name for path in folder.glob("*.idx")))


def check_prepared(folder: Path, bpe_folder: str | Path | None, words: bool, dictionary: str | Path | None) -> None:
    """Refuse arguments that do not fit a prepared folder, which would do nothing without a word."""
    own = TextDictionary.from_file(folder / DICT_FILE)
    if dictionary is not None:
        given = TextDictionary.from_file(Path(dictionary).expanduser())
        if difference := own.difference(given):
            raise ConfigError(
                f"{folder} is prepared with its own {DICT_FILE}, and {dictionary} is another: {difference}; leave out "
                "--dict, or prepare the raw text with it."
            )
    check_symbols(own, folder / DICT_FILE, bpe_folder, words)


def check_symbols(dictionary: TextDictionary, source: str | Path, bpe_folder: str | Path | None, words: bool) -> None:
    """Refuse byte pairs for a dictionary of words, and words for one of byte pairs."""
    if bpe_folder is not None and words:
        raise ConfigError(BOTH)
    if bpe_folder is not None:
        Gpt2Bpe.from_folder(Path(bpe_folder).expanduser())
        check_gpt2_dictionary(dictionary, source)
    if words and holds_gpt2_numbers(dictionary):
        raise ConfigError(f"the symbols of {source} are the numbers of GPT-2's pieces, no words; leave out --words.")


def is_own(source: Path, output: Path) -> bool:
    """Whether the texts and what this script made of them lie in one folder."""
    return source.resolve() == output.resolve() and (source / SUMMARY).is_file()


def find_texts(source: Path, say: Callable[[str], object]) -> dict[str, Path]:
    """Part to text file, in the order of `PARTS`."""
    if source.is_file():
        named = [part for part in PARTS if is_named(source, part)]
        if len(named) > 1:
            raise ManifestError(f"{source} has {' and '.join(named)} in its name; rename it.")
        files = {named[0] if named else "train": source}
    elif source.is_dir():
        files = {part: path for part in PARTS if (path := find_part(source, part, say)) is not None}
        if not files:
            raise ManifestError(
                f"data_folder {str(source)!r} holds no text: no file {' or '.join(f'*{end}' for end in SUFFIXES)} in "
                f"whose name a word begins with {', '.join(PARTS[:-1])} or {PARTS[-1]}, as in wiki.train.raw or "
                f"my_train.txt{unlike(source)}; give such a folder, or rename the files."
            )
    else:
        raise ManifestError(f"data_folder {str(source)!r} does not exist; give a folder of text files, or one file.")
    for path in files.values():
        if path.stat().st_size == 0:
            raise ManifestError(f"{path} is empty; unpack the corpus again, or remove the file.")
    return files


def find_part(folder: Path, part: str, say: Callable[[str], object]) -> Path | None:
    """The text of one part; the best kind where there are several."""
    found = sorted(
        path for path in folder.iterdir() if is_text(path, part)
    )
    for end in SUFFIXES:
        fitting = [path for path in found if path.suffix.lower() == end]
        if len(fitting) > 1:
            raise ManifestError(
                f"{folder} holds several texts for {part}: {', '.join(path.name for path in fitting)}; keep one "
                "of them in it."
            )
        if fitting:
            if others := [path.name for path in found if path not in fitting]:
                say(f"{part}: {fitting[0].name} (not {', '.join(others)})")
            return fitting[0]
    return None


def is_text(path: Path, part: str) -> bool:
    """Whether a file is a text of a part by its name."""
    return path.is_file() and is_named(path, part) and path.suffix.lower() in SUFFIXES


def unlike(folder: Path) -> str:
    """The files that the rule for names passes over, though a part is in their names."""
    names = (path.name for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES)
    passed = sorted(name for name in names if any(part in name.lower() for part in PARTS))
    return f" (not {', '.join(passed)})" if passed else ""


def is_named(path: Path, part: str) -> bool:
    """Whether a word in a file's name begins with a part's: in "my_test.txt" and "validation.raw", not in
    "latest.txt"."""
    return not path.name.startswith(".") and re.search(f"(?<![a-z]){part}", path.name.lower()) is not None


def check_arguments(files: Mapping[str, Path], bpe_folder: str | Path | None, words: bool,
                    dictionary: str | Path | None, num_workers: int | None) -> None:
    """Refuse what cannot be meant."""
    if words and bpe_folder is not None:
        raise ConfigError(BOTH)
    if not words and bpe_folder is None:
        raise ConfigError(
            f"bpe_folder is missing; give the folder that holds GPT-2's {ENCODER_FILE} and {MERGES_FILE}, or --words "
            "to take words as they are."
        )
    if dictionary is None and "train" not in files:
        raise ConfigError(
            f"there is no training text to build a dictionary from (only {', '.join(files)}); give a dict.txt with "
            "--dict, or add a file with train in its name."
        )
    if num_workers is not None and (not isinstance(num_workers, int) or num_workers < 0):
        raise ConfigError(f"num_workers is {num_workers!r}; take a whole number, 0 or more, or leave it out.")


def make_folder(output: Path) -> None:
    """The folder for what is written, made where it is missing."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"the output folder {output} lies at or under a file; choose another name.") from error
    except OSError as error:
        raise ConfigError(
            f"the output folder {output} cannot be made ({error.strerror}); choose another folder."
        ) from error


def move_in(target: Path, output: Path, names: Sequence[str], former: object) -> None:
    """Put the complete files in their place; parts of an earlier run, with another dictionary, go."""
    former = [name for name in former if Path(name).name == name] if isinstance(former, dict) else []
    # Until all files are in place none of them counts: there is no key.
    write_json(output / SUMMARY, {"prepared": {"files": dict.fromkeys([*former, *names])}})
    for name in former:
        if name not in names:
            (output / name).unlink(missing_ok=True)
    for name in names:
        os.replace(target / name, output / name)


def bpe_files(folder: Path) -> list[Path]:
    """The files in a BPE folder that decide the result."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".bpe", ".txt") and path.is_file())


def stamp(path: Path) -> list:
    """Name, size and time of change: what a large file is known by."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def is_unchanged(output: Path, summary: Mapping[str, dict], key: str) -> bool:
    """Whether everything is there as an earlier run with the same input left it."""
    entry = summary.get("prepared", {})
    files = entry.get("files")
    if entry.get("key") != key or not isinstance(files, dict):
        return False
    return all((output / name).is_file() and stamp(output / name) == value for name, value in files.items())


def tell(output: Path, reports: Mapping[str, PartReport], say: Callable[[str], object], *, is_built: bool) -> None:
    """What was made, and a warning where a dictionary of byte pairs that was built from train lacks much."""
    size = len(TextDictionary.from_file(output / DICT_FILE))
    say(f"wrote {output}: {DICT_FILE} of {size:,} entries (with 4 special ones)")
    for part, report in reports.items():
        say(f"  {part}: {report}")
    worst = max(reports, key=lambda part: share_unknown(reports[part]))
    if is_built and share_unknown(reports[worst]) > MOST_UNKNOWN:
        say(
            f"warning: {100 * share_unknown(reports[worst]):.3g} % of the tokens of {worst} are <unk>, for {DICT_FILE} "
            "has only the pieces that occur in train; give GPT-2's whole dictionary (the dict.txt beside fairseq's "
            f"{ENCODER_FILE} and {MERGES_FILE}) with --dict."
        )


def share_unknown(report: PartReport) -> float:
    """The share of a part's tokens that the dictionary lacks."""
    return report.unknown / max(1, report.tokens)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--data_folder", required=True, help="text files as wiki.train.raw, my_valid.txt, test.txt, or one file")
    add("--output_folder", required=True, help="where dict.txt and the binary files go")
    add("--bpe_folder", help="GPT-2's encoder.json and vocab.bpe")
    add("--words", action="store_true", help="words between white space instead of byte pairs")
    add("--dict", dest="dictionary", metavar="FILE", help="a fairseq dict.txt; default: built from the training text")
    add("--workers", dest="num_workers", type=int, metavar="N", help="processes; default: up to 8")
    prepare_text(**vars(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
