"""fairseq's manifests, labels, dictionaries and zip entries: read as fairseq reads them, written byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from toolkit.data.audio import audio_info, normalize_waveform, read_audio
from toolkit.data.dataset import DynamicItemDataset, text_items
from toolkit.data.manifest import read_manifest, write_manifest
from toolkit.data.tokens import LetterTokenizer

CASES = [
    ("seed42_valid25", "train"),
    ("seed42_valid25", "valid"),
    ("seed7_valid50", "train"),
    ("seed7_valid50", "valid"),
    ("clean_only_seed3", "train"),
    ("clean_only_seed3", "valid"),
    ("valid0", "train"),
]
DICTS = {
    "standard": "dict.ltr.txt",
    "from_data_pad8": "dict.ltr.from_data_pad8.txt",
    "from_data_pad1": "dict.ltr.from_data_pad1.txt",
}


@pytest.mark.parametrize(("case", "split"), CASES)
def test_rewritten_byte_for_byte(fairseq_manifests, tmp_path, case, split):
    source = fairseq_manifests / "manifests" / case / f"{split}.tsv"
    manifest = read_manifest(source)
    assert manifest.root == "/data/LibriTiny"
    write_manifest(tmp_path / f"{split}.tsv", manifest)
    for suffix in (".tsv", ".ltr", ".wrd"):
        assert (tmp_path / f"{split}{suffix}").read_bytes() == source.with_suffix(suffix).read_bytes(), suffix


def test_letters_alone_give_the_words(fairseq_manifests, tmp_path):
    source = fairseq_manifests / "manifests" / "valid0"
    for suffix in (".tsv", ".ltr"):
        (tmp_path / f"train{suffix}").write_bytes((source / f"train{suffix}").read_bytes())
    assert read_manifest(tmp_path / "train.tsv") == read_manifest(source / "train.tsv")


def test_frames_and_names(fairseq_manifests):
    facts = json.loads((fairseq_manifests / "audio.json").read_text())
    manifest = read_manifest(fairseq_manifests / "manifests" / "valid0" / "train.tsv")
    assert [round(duration * 16000) for duration in manifest.durations] == [row["frames"] for row in facts["audio"]]
    assert list(manifest.ids) == [Path(row["path"]).stem for row in facts["audio"]]
    assert manifest.row(0)["wav"] == f"/data/LibriTiny/{facts['audio'][0]['path']}"


def test_equal_stems_are_told_apart_by_their_folders(tmp_path):
    (tmp_path / "a.tsv").write_text("/root\nx/1.flac\t100\ny/1.flac\t100\n")
    assert list(read_manifest(tmp_path / "a.tsv").ids) == ["x/1", "y/1"]


def test_rate_comes_from_the_audio_or_the_caller(odd_audio, tmp_path):
    (tmp_path / "a.tsv").write_text(f"{odd_audio}\nmono_8000_ulaw.wav\t12000\n")
    assert read_manifest(tmp_path / "a.tsv").durations.tolist() == [1.5]
    assert read_manifest(tmp_path / "a.tsv", sample_rate=12000).durations.tolist() == [1.0]


@pytest.mark.parametrize("kind", ["file", "zip"])
def test_audio_samples(fairseq_manifests, kind):
    facts = json.loads((fairseq_manifests / "audio.json").read_text())
    for row in facts["audio"]:
        path = fairseq_manifests / "audio" / "LibriTiny" / row["path"]
        path = path if kind == "file" else fairseq_manifests / "zip" / row["zip_entry"]
        samples = read_audio(path, sample_rate=16000)
        assert audio_info(path).num_samples == row["frames"]
        pcm = (samples * 32768).astype("<i2")
        assert hashlib.sha256(pcm.tobytes()).hexdigest() == row["pcm_int16_le_sha256"]
        assert samples[1000:1006].tolist() == row["source_at_1000"]
        np.testing.assert_allclose(normalize_waveform(samples)[1000:1006], row["normalized_at_1000"], rtol=0, atol=1e-5)
        part = read_audio(path, sample_rate=16000, start=1000, num_samples=6)
        assert part.tolist() == row["source_at_1000"]


def test_zip_manifest(fairseq_manifests, tmp_path):
    text = (fairseq_manifests / "zip" / "train.tsv").read_text()
    root = fairseq_manifests / "zip"
    (tmp_path / "train.tsv").write_text(text.replace(text.splitlines()[0], str(root), 1))
    manifest = read_manifest(tmp_path / "train.tsv")
    plain = read_manifest(fairseq_manifests / "manifests" / "valid0" / "train.tsv")
    assert np.array_equal(manifest.durations, plain.durations)
    for zipped, wav in zip(manifest.column("wav"), plain.column("wav"), strict=True):
        file = fairseq_manifests / "audio" / "LibriTiny" / Path(wav).relative_to("/data/LibriTiny")
        assert np.array_equal(read_audio(zipped), read_audio(file))
    write_manifest(tmp_path / "again.tsv", manifest)
    assert (tmp_path / "again.tsv").read_bytes() == (tmp_path / "train.tsv").read_bytes()


def targets() -> dict:
    path = Path(__file__).resolve().parents[2] / "fixtures" / "fairseq_manifests" / "targets.json"
    cases = json.loads(path.read_text())
    return {name: case for name, case in cases.items() if "autoregressive=False" in name}


@pytest.mark.parametrize("name", targets())
def test_ctc_targets(fairseq_manifests, name):
    wanted = targets()[name]
    case, split, dictionary, _, size = name.split("|")
    manifest = read_manifest(fairseq_manifests / "manifests" / case / f"{split}.tsv")
    tokenizer = LetterTokenizer.from_file(fairseq_manifests / DICTS[dictionary.removeprefix("dict=")])
    assert tokenizer.vocab_size == wanted["dict_len"]
    minimum = size.removeprefix("min_sample_size=")
    if minimum != "None":
        kept, report = manifest.filter(min_duration=int(minimum) / 16000)
        assert report.too_short == len(wanted["skipped_indices"])
    else:
        kept = manifest
    dataset = DynamicItemDataset(kept, text_items(tokenizer), ["id", "tokens", "wrd", "text"])
    assert len(dataset) == wanted["n"]
    for row, label in enumerate(wanted["labels"]):
        item = dataset[row]
        assert item["id"] == Path(label["audio"]).stem
        assert item["tokens"].tolist() == label["ids"]
        assert tokenizer.decode(label["ids"]) == item["wrd"] == item["text"]


@pytest.mark.parametrize("factor", [1, 8])
def test_dictionaries_are_built_byte_for_byte(fairseq_manifests, tmp_path, factor):
    manifest = read_manifest(fairseq_manifests / "manifests" / "valid0" / "train.tsv")
    tokenizer = LetterTokenizer.from_texts(manifest.column("wrd"), padding_factor=factor)
    tokenizer.save(tmp_path)
    wanted = (fairseq_manifests / f"dict.ltr.from_data_pad{factor}.txt").read_bytes()
    assert (tmp_path / "dict.ltr.txt").read_bytes() == wanted


@pytest.mark.parametrize("name", DICTS.values())
def test_dictionaries_are_saved_byte_for_byte(fairseq_manifests, tmp_path, name):
    LetterTokenizer.from_file(fairseq_manifests / name).save(tmp_path)
    assert (tmp_path / "dict.ltr.txt").read_bytes() == (fairseq_manifests / name).read_bytes()
