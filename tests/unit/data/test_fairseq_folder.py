"""Folders prepared for fairseq, trained on as they are; manifests written for it; entries of zip archives."""

from __future__ import annotations

import argparse
import shutil
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from toolkit.data import audio
from toolkit.data.audio import AudioFile, read_audio
from toolkit.data.dataset import DynamicItemDataset, speech_items
from toolkit.data.fairseq_folder import (
    check_fairseq_manifest,
    dictionary_beside,
    fairseq_manifests,
    is_fairseq_manifest,
    tokenizer_of,
)
from toolkit.data.manifest import read_manifest, read_manifests, write_manifest
from toolkit.data.manifest_command import add_arguments, run_command, write_fairseq_manifest
from toolkit.data.tokens import LetterTokenizer, SentencePieceTokenizer
from toolkit.errors import AudioError, ManifestError, TokenError

KNOWN = ("train-clean-100", "train-960h", "dev-clean", "dev-other", "test-clean")


@pytest.fixture
def folder(fairseq_manifests: Path, tmp_path: Path) -> Path:
    """train and valid with letters and a dictionary, their root on this machine."""
    made = tmp_path / "prepared"
    made.mkdir()
    source = fairseq_manifests / "manifests" / "seed7_valid50"
    for split in ("train", "valid"):
        shutil.copyfile(source / f"{split}.ltr", made / f"{split}.ltr")
        text = (source / f"{split}.tsv").read_text()
        (made / f"{split}.tsv").write_text(
            text.replace("/data/LibriTiny", str(fairseq_manifests / "audio" / "LibriTiny"), 1)
        )
    made_up = "".join(f"madeupword{number:04d} 0\n" for number in range(8))
    (made / "dict.ltr.txt").write_text((fairseq_manifests / "dict.ltr.txt").read_text() + made_up)
    return made


def test_splits_are_found_by_name_and_by_part(folder):
    said: list[str] = []
    wanted = {name: folder / f"{stem}.tsv" for name, stem in
              {"train-clean-100": "train", "train-960h": "train", "dev-clean": "valid", "valid": "valid"}.items()}
    assert fairseq_manifests(folder, list(wanted), known=KNOWN, say=said.append) == wanted
    assert len(said) == 3 and said[0] == f"train-clean-100: {folder / 'train.tsv'}, a manifest of fairseq's"
    shutil.copyfile(folder / "valid.tsv", folder / "dev_other.tsv")
    found = fairseq_manifests(folder, ["dev-clean", "dev-other"], known=KNOWN, say=said.append)
    assert [path.name for path in found.values()] == ["valid.tsv", "dev_other.tsv"]


def test_a_split_that_is_not_there(folder):
    sentence = "holds manifests of fairseq's, but none for the split 'test-clean'; there are train, valid: name some"
    with pytest.raises(ManifestError, match=sentence):
        fairseq_manifests(folder, ["train", "test-clean"], known=KNOWN)
    with pytest.raises(ManifestError, match="none for the split 'train-mine'"):  # not the corpus' own: no stand-in
        fairseq_manifests(folder, ["train-mine"], known=KNOWN)


def test_other_folders_are_none(folder, tmp_path):
    assert fairseq_manifests(tmp_path / "nowhere", ["train"]) is None
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.tsv").write_text("ID\tduration\twav\na\t1.0\t/a.wav\n")
    assert not is_fairseq_manifest(tmp_path / "table" / "train.tsv")
    assert fairseq_manifests(tmp_path / "table", ["train"]) is None
    (folder / "LibriSpeech" / "dev-clean").mkdir(parents=True)  # the corpus itself, manifests beside it
    assert fairseq_manifests(folder, ["dev-clean"], known=KNOWN) is None


def test_the_audio_may_be_elsewhere(fairseq_manifests, tmp_path):
    source = fairseq_manifests / "manifests" / "valid0" / "train.tsv"
    with pytest.raises(ManifestError) as error:
        check_fairseq_manifest(source, texts=True)
    assert str(error.value) == (
        f"{source}, line 1: the audio's folder /data/LibriTiny is not on this machine; say where it is with "
        "--audio_folder FOLDER."
    )
    with pytest.raises(ManifestError, match="audio_folder '/no/where' is no folder; give the one that"):
        check_fairseq_manifest(source, texts=True, audio_folder="/no/where")
    audio = fairseq_manifests / "audio" / "LibriTiny"
    check_fairseq_manifest(source, texts=True, audio_folder=audio)
    manifest = read_manifests([source], root=audio)
    assert manifest.root == str(audio)
    item = DynamicItemDataset(manifest, speech_items(16000), ["id", "waveform"])[0]
    assert len(item["waveform"]) == round(manifest.durations[0] * 16000)
    assert manifest.fingerprint() == read_manifest(source).fingerprint()


def test_labels_are_asked_for_where_they_are_needed(folder):
    train = folder / "train.tsv"
    check_fairseq_manifest(train, texts=True)
    letters = (folder / "train.ltr").read_text().splitlines()
    (folder / "train.ltr").write_text("\n".join(letters[:-1]) + "\n")
    with pytest.raises(ManifestError, match=rf"train.ltr has {len(letters) - 1} lines and .*train.tsv has "):
        read_manifest(train)
    (folder / "train.ltr").write_text("\n".join([*letters[:-1], "SH E |"]) + "\n")
    with pytest.raises(ManifestError, match=rf"train.ltr, line {len(letters)}: 'SH' is no letter"):
        check_fairseq_manifest(train, texts=True)
    (folder / "train.ltr").unlink()
    check_fairseq_manifest(train, texts=False)
    with pytest.raises(ManifestError, match=r"has no transcripts: neither train\.ltr nor train\.wrd is beside it"):
        check_fairseq_manifest(train, texts=True)


def test_the_dictionary_is_kept_as_it_is(folder, tmp_path):
    train = folder / "train.tsv"
    dictionary = dictionary_beside([train])
    assert dictionary == folder / "dict.ltr.txt" and dictionary_beside([]) is None
    make, said = partial(LetterTokenizer.from_texts, unknown="unk", padding_factor=1), []
    tokenizer = tokenizer_of(make, read_manifest(train), dictionary, said.append)
    assert said == [f"tokens: {dictionary}"]
    assert tokenizer.unknown == "unk" and tokenizer.vocab_size == 40
    assert tokenizer.labels[4:8] == ("|", "E", "T", "A") and tokenizer.labels[-1] == "madeupword0007"
    tokenizer.save(tmp_path)
    assert (tmp_path / "dict.ltr.txt").read_bytes() == dictionary.read_bytes()
    write_manifest(tmp_path / "mine.csv", read_manifest(train))
    assert dictionary_beside([train, tmp_path / "mine.csv"]) is None, "not fairseq's alone"
    dictionary.unlink()
    assert dictionary_beside([train]) is None
    assert tokenizer_of(make, read_manifest(train), None).vocab_size < tokenizer.vocab_size


def test_a_dictionary_that_lacks_a_character(folder):
    train, dictionary = read_manifest(folder / "train.tsv"), folder / "dict.ltr.txt"
    dictionary.write_text("".join(line for line in dictionary.open() if not line.startswith("E ")))
    said: list[str] = []
    tokenizer_of(partial(LetterTokenizer.from_texts, unknown="unk"), train, dictionary, said.append)
    with_e = sum("E" in text for text in train.column("wrd"))
    assert len(said) == 2 and said[1].startswith(f"warning: {dictionary} lacks E, which become <unk> in {with_e} of ")
    with pytest.raises(TokenError, match=r"holds the character 'E' \(U\+0045"):
        tokenizer_of(LetterTokenizer.from_texts, train, dictionary, said.append)


def test_other_tokens_do_not_take_the_dictionary(folder):
    said: list[str] = []
    make = partial(SentencePieceTokenizer.train, vocab_size=30)
    tokenizer = tokenizer_of(make, read_manifest(folder / "train.tsv"), folder / "dict.ltr.txt", said.append)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert said == [
        f"tokens: made from the transcripts as the settings say, not those of {folder / 'dict.ltr.txt'}"
    ]


def test_any_manifest_is_written_for_fairseq(fairseq_manifests, tmp_path, capsys):
    source = fairseq_manifests / "manifests" / "valid0" / "train.tsv"
    audio = fairseq_manifests / "audio" / "LibriTiny"
    write_manifest(tmp_path / "ours.csv", read_manifest(source, root=audio))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["ours.csv", "out/train.tsv"]
    line = [str(tmp_path / name) for name in arguments] + ["--data_root", str(audio), "--dictionary"]
    assert run_command(parser.parse_args(line)) == 0
    assert "out/train.tsv" in capsys.readouterr().out
    made = tmp_path / "out"
    assert sorted(path.name for path in made.iterdir()) == ["dict.ltr.txt", "train.ltr", "train.tsv", "train.wrd"]
    for suffix in (".ltr", ".wrd"):
        assert (made / f"train{suffix}").read_bytes() == source.with_suffix(suffix).read_bytes()
    wanted = source.read_bytes().replace(b"/data/LibriTiny", str(audio).encode(), 1)
    assert (made / "train.tsv").read_bytes() == wanted
    assert (made / "dict.ltr.txt").read_bytes() == (fairseq_manifests / "dict.ltr.from_data_pad1.txt").read_bytes()
    back = [str(made / "train.tsv"), str(tmp_path / "back.csv")]
    assert run_command(parser.parse_args(back)) == 0
    assert (tmp_path / "back.csv").read_bytes() == (tmp_path / "ours.csv").read_bytes()


def test_samples_are_counted_at_the_rate_of_the_audio(odd_audio, tmp_path):
    rows = [{"ID": "a", "duration": 1.5, "wav": str(odd_audio / "mono_8000_ulaw.wav")}]
    write_manifest(tmp_path / "a.csv", rows)
    files = write_fairseq_manifest(tmp_path / "a.tsv", read_manifest(tmp_path / "a.csv"))
    assert [path.name for path in files] == ["a.tsv"]
    assert (tmp_path / "a.tsv").read_text() == f"{odd_audio}\nmono_8000_ulaw.wav\t12000\n"
    with pytest.raises(ManifestError, match="has no column 'wrd'"):
        write_fairseq_manifest(tmp_path / "b.tsv", read_manifest(tmp_path / "a.csv"), dictionary=True)
    assert not (tmp_path / "b.tsv").exists()


@pytest.mark.parametrize("entry", ["./x/../a.flac", "a//b.flac", "../a.flac"])
def test_odd_paths_are_written_back_as_they_were(tmp_path, entry):
    text = f"/root\n{entry}\t100\n"
    (tmp_path / "a.tsv").write_text(text)
    write_manifest(tmp_path / "b.tsv", read_manifest(tmp_path / "a.tsv"))
    assert (tmp_path / "b.tsv").read_text() == text


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, int, int]:
    """A stored zip with a minute of noise: (archive, offset, length of its entry)."""
    noise = np.random.default_rng(0).standard_normal(16000 * 60).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "a.flac", noise, 16000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as file:
        file.writestr("first", b"x" * 100)
        file.write(tmp_path / "a.flac", "a.flac")
        info = file.getinfo("a.flac")
    return tmp_path / "a.zip", info.header_offset + 30 + len(info.filename), info.file_size


def test_a_crop_of_a_zip_entry_reads_only_its_part(archive, tmp_path, monkeypatch):
    path, offset, length = archive
    read = 0
    windows = []

    class Counting(audio.FileWindow):
        def readinto(self, buffer):
            nonlocal read
            count = super().readinto(buffer)
            read += count
            windows.append(self)
            return count

    monkeypatch.setattr(audio, "FileWindow", Counting)
    with AudioFile(f"{path}:{offset}:{length}") as file:
        part = file.read(start=16000 * 30, num_samples=16000)
    assert windows[0].closed
    assert np.array_equal(part, read_audio(tmp_path / "a.flac", start=16000 * 30, num_samples=16000))
    assert 0 < read < length / 2


def test_a_dataset_crops_zip_entries_as_files(fairseq_manifests, tmp_path):
    audio, plain = fairseq_manifests / "audio" / "LibriTiny", fairseq_manifests / "manifests" / "valid0" / "train.tsv"
    files = read_manifest(plain, root=audio)
    zipped = read_manifest(fairseq_manifests / "zip" / "train.tsv", root=fairseq_manifests / "zip")
    for normalize in (False, True):
        datasets = [DynamicItemDataset(part, speech_items(16000, normalize), ["waveform"]) for part in (files, zipped)]
        for row in range(len(files)):
            one, other = (dataset.load(row)["waveform"] for dataset in datasets)
            assert np.array_equal(one, other)
            assert len(datasets[1].load(row, crop_samples=4000)["waveform"]) == 4000


def test_bad_zip_entries(archive, tmp_path):
    path, offset, length = archive
    size = path.stat().st_size
    with pytest.raises(AudioError, match=f"ends at byte {size + 10**6}, but the archive has {size}; write its"):
        read_audio(f"{path}:{size}:1000000")
    with pytest.raises(AudioError, match="but the archive has"):
        read_audio(f"{path}:{10**30}:{10**30}")
    with pytest.raises(AudioError, match=r"is no audio entry of the archive; .* stored uncompressed"):
        read_audio(f"{path}:{offset + 5000}:{length - 5000}")
    with pytest.raises(AudioError, match="is truncated or corrupt"):
        read_audio(f"{path}:{offset}:{length // 2}")
    with zipfile.ZipFile(tmp_path / "small.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(tmp_path / "a.flac", "a.flac")
    with pytest.raises(AudioError, match="is no audio entry of the archive"):
        read_audio(f"{tmp_path / 'small.zip'}:36:{(tmp_path / 'small.zip').stat().st_size - 200}")
    with pytest.raises(AudioError, match=r"gone\.zip does not exist"):
        read_audio(f"{tmp_path / 'gone.zip'}:36:100")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("a.zip:100", "line 3: 'a.zip:100' is no entry of an archive; write archive.zip:OFFSET:LENGTH, in bytes"),
        ("a.zip:10:99999999", r"line 3: bytes 10 to 100000009 of .*a\.zip are asked for, which has \d+; write the"),
        ("a.zip:10:0", r"line 3: bytes 10 to 10 of .*a\.zip are asked for"),
    ],
)
def test_bad_zip_entries_of_a_manifest_are_told_by_line(archive, tmp_path, entry, sentence):
    _, offset, length = archive
    (tmp_path / "t.tsv").write_text(f"{tmp_path}\na.zip:{offset}:{length}\t960000\n{entry}\t16000\n")
    with pytest.raises(ManifestError, match=sentence):
        read_manifest(tmp_path / "t.tsv")
