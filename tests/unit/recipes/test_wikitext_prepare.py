"""wikitext_prepare.py: fairseq's files byte for byte, reuse, and folders broken in every way that texts are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.WikiText import wikitext_prepare as prepare
from toolkit.data.text import TextBlocks, open_text
from toolkit.data.text_dictionary import TextDictionary
from toolkit.errors import ConfigError, ManifestError, TokenError

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "recipes" / "WikiText" / "wikitext_prepare.py"
TEXT, BPE = ROOT / "tests" / "fixtures" / "fairseq_text", ROOT / "tests" / "fixtures" / "gpt2_bpe"
FILES = ["dict.txt", *(f"{part}.{end}" for part in ("test", "train", "valid") for end in ("bin", "idx"))]


def run(data: Path, output: Path, **options) -> tuple[Path, list[str]]:
    said: list[str] = []
    options = {"bpe_folder": None if options.get("words") else BPE, "num_workers": 0, **options}
    return prepare.prepare_text(data, output, say=said.append, **options), said


def is_as_by_fairseq(folder: Path, wanted: Path) -> bool:
    return all((folder / name).read_bytes() == (wanted / name).read_bytes() for name in FILES)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A copy of the texts that a test may change."""
    return Path(shutil.copytree(TEXT / "raw", tmp_path / "raw"))


def test_the_command_writes_what_fairseq_writes(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--data_folder", str(TEXT / "raw"), "--bpe_folder", str(BPE),
               "--output_folder", str(tmp_path / "out"), "--workers", "2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert is_as_by_fairseq(tmp_path / "out", TEXT / "bin_own")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*FILES, "wikitext_prepare.json"])
    assert done.stdout.splitlines() == [
        f"wrote {tmp_path / 'out'}: dict.txt of 4,048 entries (with 4 special ones)",
        "  train: 316 lines (105 empty), 23,671 tokens with line ends, 0 % not in the dictionary",
        "  valid: 45 lines (17 empty), 3,278 tokens with line ends, 19.2 % not in the dictionary",
        "  test: 34 lines (7 empty), 2,066 tokens with line ends, 20.9 % not in the dictionary",
        "warning: 20.9 % of the tokens of test are <unk>, for dict.txt has only the pieces that occur in train; give "
        "GPT-2's whole dictionary (the dict.txt beside fairseq's encoder.json and vocab.bpe) with --dict.",
    ]


def test_help_is_there() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "--bpe_folder" in done.stdout and "wiki.train.raw" in done.stdout


def test_errors_are_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--data_folder", str(tmp_path / "none"), "--bpe_folder", str(BPE),
               "--output_folder", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        f"error: data_folder '{tmp_path / 'none'}' does not exist; give a folder of text files, or one file.\n"
    )


def test_words_as_by_fairseq(tmp_path: Path) -> None:
    folder, _ = run(TEXT / "raw", tmp_path, words=True)
    assert is_as_by_fairseq(folder, TEXT / "bin_word")


def test_a_given_dictionary_is_taken_and_needs_no_training_text(texts: Path, tmp_path: Path) -> None:
    (texts / "train.raw").unlink()
    folder, _ = run(texts, tmp_path / "out", dictionary=TEXT / "bin_own" / "dict.txt")
    for name in ("dict.txt", "valid.bin", "valid.idx", "test.bin", "test.idx"):
        assert (folder / name).read_bytes() == (TEXT / "bin_own" / name).read_bytes()
    assert not (folder / "train.bin").exists()


def test_what_is_there_and_unchanged_is_used_again(texts: Path, tmp_path: Path) -> None:
    folder, _ = run(texts, tmp_path / "out")
    before = {name: (folder / name).stat().st_mtime_ns for name in FILES}
    again, said = run(texts, tmp_path / "out")
    assert again == folder and said == [f"{folder}: train, valid, test are there and unchanged, reused"]
    assert {name: (folder / name).stat().st_mtime_ns for name in FILES} == before


@pytest.mark.parametrize("change", ["text", "dictionary", "result", "missing", "summary"])
def test_what_changed_is_made_anew(texts: Path, tmp_path: Path, change: str) -> None:
    folder, _ = run(texts, tmp_path / "out")
    options = {}
    if change == "text":
        (texts / "train.raw").write_bytes((texts / "train.raw").read_bytes() + b"more\n")
    elif change == "dictionary":
        options["dictionary"] = TEXT / "bin_own" / "dict.txt"
    elif change == "result":
        (folder / "train.bin").write_bytes(b"")
    elif change == "missing":
        (folder / "valid.idx").unlink()
    else:  # a run that was killed between two files
        (folder / "wikitext_prepare.json").write_text(json.dumps({"prepared": {}}))
    _, said = run(texts, tmp_path / "out", **options)
    assert said[0].startswith("wrote ")
    assert is_as_by_fairseq(folder, TEXT / "bin_own") == (change != "text")


def test_parts_of_an_earlier_run_do_not_stay_beside_another_dictionary(texts: Path, tmp_path: Path) -> None:
    folder, _ = run(texts, tmp_path / "out")
    (folder / "notes.txt").write_text("mine\n")
    (texts / "train.raw").unlink()
    run(texts, folder, dictionary=TEXT / "bin_word" / "dict.txt", words=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "dict.txt", "notes.txt", "test.bin", "test.idx", "valid.bin", "valid.idx", "wikitext_prepare.json",
    ]  # fmt: skip


def test_a_failed_run_leaves_what_was_there(texts: Path, tmp_path: Path) -> None:
    folder, _ = run(texts, tmp_path / "out")
    (texts / "test.raw").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenError, match=r"test\.raw is not UTF-8 text \(byte 0\); save it as UTF-8\.$"):
        run(texts, tmp_path / "out")
    assert is_as_by_fairseq(folder, TEXT / "bin_own") and not (folder / ".preparing").exists()


def test_a_prepared_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder, said = run(TEXT / "bin_own", tmp_path / "out")
    assert folder == TEXT / "bin_own" and not (tmp_path / "out").exists()
    assert said == [f"{folder} holds fairseq's binary files, taken as they are"]
    dictionary, parts = open_text(folder, ["train"])
    assert len(TextBlocks(parts["train"], dictionary)) > 0


def test_a_dictionary_or_byte_pairs_that_do_not_fit_a_prepared_folder(tmp_path: Path) -> None:
    """They would do nothing, and the run go on without a word."""
    numbers, in_words, none = TEXT / "bin_own", TEXT / "bin_word", tmp_path / "none"
    other = in_words / "dict.txt"
    cases = [
        (numbers, {"dictionary": other},
         f"{numbers} is prepared with its own dict.txt, and {other} is another: id 4 is '262' there and 'the' here; "
         "leave out --dict, or prepare the raw text with it."),
        (numbers, {"dictionary": none},
         f"the token file {none} cannot be read (No such file or directory); check the path."),
        (numbers, {"bpe_folder": none},
         f"the BPE folder {none} has no encoder.json; give the folder that holds GPT-2's encoder.json and vocab.bpe."),
        (in_words, {"bpe_folder": BPE},
         f"the symbols of {other} are no numbers of GPT-2's pieces (the first is 'the'), so bpe_folder does not fit "
         "it; leave out bpe_folder, or give the dict.txt of a text in GPT-2's byte pairs."),
        (numbers, {"words": True},
         f"the symbols of {numbers / 'dict.txt'} are the numbers of GPT-2's pieces, no words; leave out --words."),
        (numbers, {"words": True, "bpe_folder": BPE},
         "both bpe_folder and words are given; byte pairs or words, choose one."),
    ]  # fmt: skip
    for folder, options, message in cases:
        with pytest.raises((ConfigError, TokenError)) as error:
            run(folder, tmp_path / "out", **{"bpe_folder": None, **options})
        assert str(error.value) == message
    lines = (numbers / "dict.txt").read_text().splitlines()
    (tmp_path / "counts.txt").write_text("".join(f"{line.split()[0]} 7\n" for line in lines))
    assert run(numbers, tmp_path / "out", dictionary=tmp_path / "counts.txt")[0] == numbers
    assert run(in_words, tmp_path / "out", words=True)[0] == in_words


def test_words_given_as_the_dictionary_of_byte_pairs(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match=r"bpe_folder does not fit it; "):
        run(TEXT / "raw", tmp_path / "out", dictionary=TEXT / "bin_word" / "dict.txt")


def test_binary_text_whose_dictionary_lies_elsewhere(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TEXT / "bin_own", tmp_path / "bare"))
    given = (folder / "dict.txt").rename(tmp_path / "elsewhere.txt")
    with pytest.raises(ManifestError) as error:
        run(folder, tmp_path / "out")
    assert str(error.value) == (
        f"{folder} holds test.idx, train.idx, valid.idx, but no dict.txt beside it; copy the one that was written with "
        "it there, or name it with --dict."
    )
    assert run(folder, tmp_path / "out", dictionary=given)[0] == folder
    dictionary, parts = open_text(folder, ["train"], dictionary=given)
    assert len(TextBlocks(parts["train"], dictionary)) > 0


def test_a_whole_dictionary_needs_no_warning(tmp_path: Path) -> None:
    whole = tmp_path / "whole.txt"
    TextDictionary([str(number) for number in range(50257)]).save(whole)
    _, said = run(TEXT / "raw", tmp_path / "out", dictionary=whole)
    assert len(said) == 4 and said[2].endswith(" 0 % not in the dictionary")


def test_texts_and_results_may_share_a_folder(texts: Path) -> None:
    assert run(texts, texts)[1][0].startswith("wrote ")
    assert run(texts, texts)[1] == [f"{texts}: train, valid, test are there and unchanged, reused"]
    (texts / "valid.raw").write_text("changed\n")
    assert run(texts, texts)[1][0].startswith("wrote ")


def test_another_programs_files_are_not_written_over(texts: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(TEXT / "bin_word", tmp_path / "other"))
    with pytest.raises(ConfigError) as error:
        run(texts, other)
    assert str(error.value) == (
        f"the output folder {other} holds prepared text that this script did not write; use it as --data_folder, "
        "empty it, or choose another."
    )


def test_wikitexts_names_and_the_better_of_two_kinds(texts: Path, tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        (texts / f"{part}.raw").rename(texts / f"wiki.{part}.raw")
        (texts / f"wiki.{part}.tokens").write_text("<unk>\n")
    (texts / "README.txt").write_text("no part\n")
    (texts / "train.zip").write_text("no text\n")
    (texts / "latest.raw").write_text("no part\n")
    (texts / "._wiki.train.raw").write_text("no part\n")
    folder, said = run(texts, tmp_path / "out")
    assert said[:3] == [f"{part}: wiki.{part}.raw (not wiki.{part}.tokens)" for part in ("train", "valid", "test")]
    assert is_as_by_fairseq(folder, TEXT / "bin_own")


@pytest.mark.parametrize(
    ("name", "part"), [("wiki.train.raw", "train"), ("my_corpus.txt", "train"), ("x.valid", "valid")]
)
def test_a_single_file(tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / name).write_bytes((TEXT / "raw" / "train.raw").read_bytes())
    folder, _ = run(tmp_path / name, tmp_path / "out", dictionary=TEXT / "bin_own" / "dict.txt")
    assert (folder / f"{part}.bin").read_bytes() == (TEXT / "bin_own" / "train.bin").read_bytes()
    assert len(list(folder.glob("*.bin"))) == 1


def test_bad_folders(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "mytrain.txt").write_text("a\n")
    shutil.copy(texts / "train.raw", texts / "train2.raw")
    cases = {
        tmp_path / "empty": f"data_folder '{tmp_path / 'empty'}' holds no text: no file *.raw or *.tokens or *.txt "
        "in whose name a word begins with train, valid or test, as in wiki.train.raw or my_train.txt; give such a "
        "folder, or rename the files.",
        tmp_path / "near": f"data_folder '{tmp_path / 'near'}' holds no text: no file *.raw or *.tokens or *.txt "
        "in whose name a word begins with train, valid or test, as in wiki.train.raw or my_train.txt (not "
        "mytrain.txt); give such a folder, or rename the files.",
        texts: f"{texts} holds several texts for train: train.raw, train2.raw; keep one of them in it.",
    }
    for folder, message in cases.items():
        with pytest.raises(ManifestError) as error:
            run(folder, tmp_path / "out")
        assert str(error.value) == message
    (texts / "train2.raw").unlink()
    (texts / "valid.raw").write_bytes(b"")
    with pytest.raises(ManifestError) as error:
        run(texts, tmp_path / "out")
    assert str(error.value) == f"{texts / 'valid.raw'} is empty; unpack the corpus again, or remove the file."
    (tmp_path / "train_and_test.txt").write_text("a\n")
    with pytest.raises(ManifestError, match=r"has train and test in its name; rename it\.$"):
        run(tmp_path / "train_and_test.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_dictionary_and_nothing_to_build_it_from(texts: Path, tmp_path: Path) -> None:
    (texts / "train.raw").unlink()
    with pytest.raises(ConfigError) as error:
        run(texts, tmp_path / "out")
    assert str(error.value) == (
        "there is no training text to build a dictionary from (only valid, test); give a dict.txt with --dict, or add "
        "a file with train in its name."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bpe_folder": None}, "bpe_folder is missing; give the folder that holds GPT-2's encoder.json and vocab.bpe, "
         "or --words to take words as they are."),
        ({"bpe_folder": BPE, "words": True}, "both bpe_folder and words are given; byte pairs or words, choose one."),
        ({"num_workers": -1}, "num_workers is -1; take a whole number, 0 or more, or leave it out."),
    ],
)  # fmt: skip
def test_bad_arguments(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(TEXT / "raw", tmp_path / "out", **options)
    assert str(error.value) == message


def test_bpe_and_dictionary_are_checked_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "bpe").mkdir()
    with pytest.raises(TokenError, match=r"^the BPE folder .* has no encoder\.json; give the folder that holds "):
        run(TEXT / "raw", tmp_path / "out", bpe_folder=tmp_path / "bpe")
    with pytest.raises(TokenError, match=r"^the token file .*dict\.txt cannot be read \(No such file or directory\)"):
        run(TEXT / "raw", tmp_path / "out", dictionary=tmp_path / "dict.txt")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match=r"file/out lies at or under a file; choose another name\.$"):
        run(TEXT / "raw", tmp_path / "file" / "out")


def test_output_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as error:
        run(TEXT / "raw", tmp_path / "file" / "out")
    assert str(error.value) == (
        f"the output folder {tmp_path / 'file' / 'out'} lies at or under a file; choose another name."
    )
