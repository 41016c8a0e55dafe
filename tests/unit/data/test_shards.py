"""Packed audio: the same as the loose files by every way of reading, and harmless when it lies."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from toolkit.__main__ import main
from toolkit.data import audio
from toolkit.data.audio import AudioFile, audio_info, read_audio
from toolkit.data.dataset import DynamicItemDataset, speech_items
from toolkit.data.loader import Loader
from toolkit.data.manifest import Manifest, read_manifest, write_manifest
from toolkit.data.pcm import encode_wav
from toolkit.data.sampler import BucketSampler
from toolkit.data.shard_index import entry_name, file_digest
from toolkit.data.shards import LARGEST_ROW, LONGEST_KEY, iterate, pack, verify
from toolkit.data.tar_format import tar_entries, tar_header
from toolkit.errors import AudioError, ConfigError, ManifestError, run_main

ROOT = Path(__file__).resolve().parents[3]
LIBRI = ROOT / "tests" / "fixtures" / "librispeech_tiny"
DIGITS = ROOT / "tests" / "fixtures" / "fsdd_tiny" / "train.csv"
GOOD_ODD = ("clipped_16000.flac", "mono_16000_24bit.wav", "mono_16000_float32.wav", "mono_8000.mp3",
            "mono_8000_ulaw.wav", "opus_16000.opus", "silence_1s.wav", "stereo_44100.wav")  # fmt: skip


def manifest_of(paths, **columns) -> Manifest:
    rows = [{"ID": path.stem, "duration": audio_info(path).duration, "wav": str(path)} for path in paths]
    return Manifest.from_rows([row | {"wrd": f"WORD {index}"} | columns for index, row in enumerate(rows)])


@pytest.fixture
def speech() -> Manifest:
    """Real utterances, FLAC of 16 bits and 16 kHz."""
    return manifest_of(sorted(LIBRI.glob("dev-clean/*/*/*.flac")))


@pytest.fixture
def packed(speech, tmp_path) -> Path:
    """The same in shards of few utterances each."""
    pack(speech, tmp_path / "packed", shard_mb=0.4)
    return tmp_path / "packed"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------- the same as the loose files


def test_rows_and_bytes_are_those_of_the_loose_files(speech, packed):
    shards = read_manifest(packed / "manifest.csv")
    assert shards.columns == ("ID", "duration", "wav", "wrd")
    assert shards.fingerprint() == speech.fingerprint()
    assert len(list(packed.glob("*.tar"))) > 1
    for row, loose, wav in zip(rows_of(packed), speech.column("wav"), shards.column("wav"), strict=True):
        window = (packed / row["shard"]).read_bytes()[int(row["offset"]) :][: int(row["size"])]
        assert window == Path(loose).read_bytes()
        assert np.array_equal(read_audio(wav), read_audio(loose))
        assert np.array_equal(read_audio(wav, start=5000, num_samples=7000), read_audio(loose)[5000:12000])


@pytest.mark.parametrize("pcm", [None, 16000])
def test_all_kinds_of_audio(odd_audio, tmp_path, pcm):
    loose = manifest_of([odd_audio / name for name in GOOD_ODD])
    pack(loose, tmp_path / "packed", pcm=pcm)
    shards = read_manifest(tmp_path / "packed" / "manifest.csv")
    names = [entry.name for entry in tar_entries(tmp_path / "packed" / "shard-000000.tar")]
    assert [name for name in names if not name.endswith(".json")] == [
        f"{Path(name).stem}.{'wav' if pcm else {'.opus': 'ogg'}.get(Path(name).suffix, Path(name).suffix[1:])}"
        for name in GOOD_ODD
    ]
    for name, ours, theirs in zip(GOOD_ODD, shards.column("wav"), loose.column("wav"), strict=True):
        packed, waveform = (read_audio(path, sample_rate=16000) for path in (ours, theirs))
        if pcm and name not in ("clipped_16000.flac", "silence_1s.wav"):  # 16 bits, mono and of this rate already
            assert np.abs(packed - np.clip(waveform, -1, 1)).max() <= 0.5001 / 32768 + 1 / 32768 * (waveform.max() >= 1)
        else:
            assert np.array_equal(packed, waveform)


def batches(manifest, *, workers=0, normalize=False, crop=True, epochs=(0, 1), first=0):
    dataset = DynamicItemDataset(manifest, speech_items(16000, normalize), ["id", "waveform"])
    options = {"mode": "crop", "max_seconds": 2.0} if crop else {"mode": "pad"}
    sampler = BucketSampler(manifest.durations, batch_seconds=8, seed=3, num_buckets=2, **options)
    loader = Loader(dataset, sampler, num_workers=workers, seed=5)
    return [(micro.batch.ids, micro.batch.waveforms) for epoch in epochs for micro in loader.epoch(epoch, first)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crop", [True, False])
def test_batches_are_bit_identical(speech, packed, tmp_path, workers, crop):
    pack(speech, tmp_path / "pcm", pcm=16000, shuffle=1, shard_mb=0.5)
    expected = batches(speech, crop=crop)
    for folder in (packed, tmp_path / "pcm"):
        made = batches(read_manifest(folder / "manifest.csv"), workers=workers, crop=crop)
        assert [ids for ids, _ in made] == [ids for ids, _ in expected]
        assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(made, expected, strict=True))


def test_an_epoch_goes_on_from_shards_where_loose_files_stopped(speech, packed):
    whole = batches(speech, epochs=(1,), normalize=True)
    rest = batches(read_manifest(packed / "manifest.csv"), epochs=(1,), first=2, normalize=True)
    assert len(rest) == len(whole) - 2 > 0
    for (ids, waveforms), (other_ids, others) in zip(whole[2:], rest, strict=True):
        assert ids == other_ids and np.array_equal(waveforms, others)


def test_a_crop_of_pcm_reads_only_its_part(speech, tmp_path, monkeypatch):
    pack(speech, tmp_path / "pcm", pcm=16000)
    wav = read_manifest(tmp_path / "pcm" / "manifest.csv").column("wav")[0]
    read = []

    class Counting(audio.FileWindow):
        def readinto(self, buffer):
            read.append(super().readinto(buffer))
            return read[-1]

    monkeypatch.setattr(audio, "FileWindow", Counting)
    part = read_audio(wav, start=8000, num_samples=4000)
    assert sum(read) == 44 + 2 * 4000
    assert np.array_equal(part, read_audio(speech.column("wav")[0], start=8000, num_samples=4000))


def test_pcm_is_what_libsndfile_reads_and_writes():
    waveform = np.array([0, 1, -1, 0.999, -0.999, 1.7, -1.7, 0.5 / 32768, 1.5 / 32768], dtype=np.float32)
    content = encode_wav(waveform, 16000)
    samples, rate = soundfile.read(io.BytesIO(content), dtype="int16")
    assert rate == 16000 and samples.tolist() == [0, 32767, -32768, 32735, -32735, 32767, -32768, 0, 2]
    other = io.BytesIO()
    soundfile.write(other, samples, 16000, subtype="PCM_16", format="WAV")
    assert other.getvalue() == content


def test_shards_can_be_packed_again_and_so_can_zip_entries(packed, speech, fairseq_manifests, tmp_path):
    pack(read_manifest(packed / "manifest.csv"), tmp_path / "again", shard_mb=0.4)
    assert files_of(tmp_path / "again").keys() == files_of(packed).keys()
    for name, content in files_of(packed).items():
        if name.endswith(".tar"):
            assert content == (tmp_path / "again" / name).read_bytes()
    zipped = read_manifest(fairseq_manifests / "zip" / "train.tsv", root=fairseq_manifests / "zip")
    pack(zipped, tmp_path / "zipped")
    ours = read_manifest(tmp_path / "zipped" / "manifest.csv")
    for one, other in zip(ours.column("wav"), zipped.column("wav"), strict=True):
        assert np.array_equal(read_audio(one), read_audio(other))


def test_other_kinds_of_manifest_can_name_shards(packed, tmp_path, capsys):
    expected = read_manifest(packed / "manifest.csv")
    rows = [row | {"offset": int(row["offset"]), "duration": float(row["duration"])} for row in rows_of(packed)]
    (packed / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (packed / "m.json").write_text(json.dumps({row.pop("ID"): row for row in rows}))
    for kind in ("m.jsonl", "m.json"):
        assert read_manifest(packed / kind) == expected
    write_manifest(tmp_path / "elsewhere" / "w.csv", expected, data_root=packed)
    assert read_manifest(tmp_path / "elsewhere" / "w.csv", replacements={"data_root": str(packed)}) == expected
    with pytest.raises(ManifestError, match="an entry of a tar, which fairseq does not read"):
        write_manifest(tmp_path / "w.tsv", expected)
    # A folder of shards may be moved as a whole.
    shutil.move(packed, tmp_path / "moved")
    moved = read_manifest(tmp_path / "moved" / "manifest.csv")
    assert moved.fingerprint() == expected.fingerprint() and len(read_audio(moved.column("wav")[0]))


# -------------------------------------------------------------------- what is written


def test_bytes_do_not_depend_on_workers_or_time(speech, packed, tmp_path):
    os.utime(speech.column("wav")[0])
    pack(speech, tmp_path / "two", shard_mb=0.4, num_workers=2)
    assert files_of(tmp_path / "two") == files_of(packed)


def test_shuffling_moves_the_audio_and_not_the_rows(speech, packed, tmp_path):
    orders = []
    for seed in (1, 1, 2):
        folder = tmp_path / f"shuffled{len(orders)}"
        pack(speech, folder, shard_mb=0.4, shuffle=seed)
        assert read_manifest(folder / "manifest.csv").fingerprint() == speech.fingerprint()
        orders.append([row["ID"] for shard in sorted(folder.glob("*.tar")) for row, _ in iterate(shard)])
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) == sorted(speech.ids)
    assert [row["ID"] for shard in sorted(packed.glob("*.tar")) for row, _ in iterate(shard)] == list(speech.ids)


def test_shards_stay_below_their_size_where_utterances_are(speech, packed):
    sizes = [path.stat().st_size for path in sorted(packed.glob("*.tar"))]
    assert max(sizes) < 0.4e6 + 1024 and min(sizes[:-1]) > 0.1e6


def test_sequential_reading_gives_rows_and_bytes_and_holds_one_at_a_time(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"noise{index}.wav" for index in range(40)]
    for path in paths:
        soundfile.write(path, 0.1 * rng.standard_normal(100_000), 16000)
    pack(manifest_of(paths, spk_id="s"), tmp_path / "packed")
    shard = tmp_path / "packed" / "shard-000000.tar"
    tracemalloc.start()
    for path, (row, content) in zip(paths, iterate(shard), strict=True):
        assert row["ID"] == path.stem and row["duration"] == 6.25 and row["spk_id"] == "s"
        assert len(content) == path.stat().st_size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 200_044 < shard.stat().st_size / 5
    assert content == paths[-1].read_bytes() and np.array_equal(read_audio(row["wav"]), read_audio(paths[-1]))


def test_webdataset_and_tarfile_read_the_same_shards(speech, packed):
    shards = sorted(str(path) for path in packed.glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb")
    seen = {}
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        assert set(sample) >= {"__key__", "flac", "json"}
        seen[sample["__key__"]] = (json.loads(sample["json"]), sample["flac"])
    assert list(seen) == list(speech.ids)
    for index, (row, content) in enumerate(seen.values()):
        expected = speech.row(index)
        assert content == Path(expected.pop("wav")).read_bytes() and row == expected
    assert [sample["json"]["wrd"] for sample in dataset] == list(speech.column("wrd"))
    with tarfile.open(shards[0]) as tar:
        assert all(member.isreg() and member.mtime == member.uid == 0 for member in tar)


ODD_IDS = ["a/b/c", "../../up", "/root", "a.b.c", "a", "ä ö 字", "x" * 300, "a%2Eb", ".", "..", "-rf", 'q"u,o\'te']


def test_odd_ids_come_through_and_name_nothing_outside(speech, tmp_path):
    rows = [speech.row(0) | {"ID": identity, "wrd": f"{index}\t“é”"} for index, identity in enumerate(ODD_IDS)]
    loose = Manifest.from_rows(rows)
    pack(loose, tmp_path / "packed")
    assert read_manifest(tmp_path / "packed" / "manifest.csv").fingerprint() == loose.fingerprint()
    shard = tmp_path / "packed" / "shard-000000.tar"
    assert [row["ID"] for row, _ in iterate(shard)] == ODD_IDS
    with tarfile.open(shard) as tar:
        names = tar.getnames()
    assert len(set(names)) == 2 * len(ODD_IDS)
    assert all(name.isascii() and "/" not in name and name.count(".") == 1 for name in names)
    samples = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
    assert [json.loads(sample["json"])["ID"] for sample in samples] == ODD_IDS
    assert verify(tmp_path / "packed").utterances == len(ODD_IDS)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


# -------------------------------------------------------------------- bad audio, resuming, changes


def test_bad_audio_is_left_out_and_named_up_to_a_share(speech, odd_audio, tmp_path):
    bad = ["empty_file.wav", "text_renamed.flac", "truncated.flac", "zero_samples.wav", "gone.wav"]
    rows = [speech.row(index) for index in range(len(speech))]
    rows[2:2] = [{"ID": name, "duration": 3.0, "wav": str(odd_audio / name), "wrd": "X"} for name in bad]
    loose = Manifest.from_rows(rows)
    with pytest.raises(AudioError, match=r"bad audio so far, .*raise --max_bad_share .* utterance empty_file\.wav: "):
        pack(loose, tmp_path / "packed")
    assert not (tmp_path / "packed" / "manifest.csv").exists()
    said = []
    report = pack(loose, tmp_path / "packed", max_bad_share=0.9, say=said.append)
    assert [identity for identity, _ in report.left_out] == bad and report.utterances == len(speech)
    assert [f"utterance {name}" in sentence for name, sentence in zip(bad, said, strict=True)] == [True] * 5
    assert "truncated" in said[2] and "does not exist" in said[4]
    assert list(read_manifest(tmp_path / "packed" / "manifest.csv").ids) == list(speech.ids)
    assert [row["ID"] for row, _ in iterate(tmp_path / "packed" / "shard-000000.tar")] == list(speech.ids)
    # Headers alone do not show what is truncated.
    report = pack(loose, tmp_path / "headers", max_bad_share=0.9, check="header", say=said.append)
    assert "truncated.flac" not in dict(report.left_out)
    with pytest.raises(ManifestError, match="no utterance could be packed"):
        pack(loose.select([2, 3]), tmp_path / "none", max_bad_share=1.0, say=said.append)


def test_what_was_left_out_counts_where_nothing_is_left_to_pack(speech, odd_audio, tmp_path):
    rows = [speech.row(0), {"ID": "bad", "duration": 3.0, "wav": str(odd_audio / "empty_file.wav"), "wrd": "X"}]
    loose, folder = Manifest.from_rows(rows), tmp_path / "packed"
    pack(loose, folder, max_bad_share=0.5, say=lambda sentence: None)
    before = files_of(folder)
    with pytest.raises(AudioError, match=r"1 of 2 utterances have bad audio so far, more than max_bad_share"):
        pack(loose, folder, max_bad_share=0)
    assert files_of(folder) == before


@pytest.mark.parametrize("letter", ["x", "."])  # a dot becomes three bytes of the name
def test_an_id_that_no_reader_takes_is_refused_before_anything_is_written(speech, tmp_path, letter):
    longest = letter * (LONGEST_KEY // len(entry_name(letter)))
    pack(Manifest.from_rows([speech.row(0) | {"ID": longest}]), tmp_path / "packed")
    assert verify(tmp_path / "packed").utterances == 1
    assert [row["ID"] for row, _ in iterate(tmp_path / "packed" / "shard-000000.tar")] == [longest]
    longer = Manifest.from_rows([speech.row(0), speech.row(1) | {"ID": longest + letter * 3}])
    with pytest.raises(ManifestError, match=rf"^the rows, row 2: the ID .* may have {LONGEST_KEY:,}; give") as error:
        pack(longer, tmp_path / "longer")
    assert len(str(error.value)) < 300 and not (tmp_path / "longer").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_that_no_reader_takes_is_refused(speech, tmp_path, workers):
    rows = [speech.row(0), speech.row(1) | {"ID": "long", "wrd": "W" * LARGEST_ROW}]
    with pytest.raises(ManifestError, match=r"row 2 of the manifest \(utterance long\) has 16,777,\d+ bytes of text"):
        pack(Manifest.from_rows(rows), tmp_path / "packed", shard_mb=0.1, num_workers=workers)


def test_finished_shards_are_kept_and_damaged_ones_written_again(speech, packed, capsys):
    before, shards = files_of(packed), sorted(packed.glob("*.tar"))
    inodes = {path.name: path.stat().st_ino for path in shards}
    assert pack(speech, packed, shard_mb=0.4).kept == len(shards)
    flip(shards[0], 5000)
    shards[1].unlink()
    (packed / "manifest.csv").unlink()
    (packed / f".{shards[1].name}.77.tmp").write_bytes(b"left by a killed process")
    assert pack(speech, packed, shard_mb=0.4).kept == len(shards) - 2
    assert f"{shards[0]} has changed since it was written" in capsys.readouterr().out
    assert files_of(packed) == before
    assert all(inodes[path.name] == path.stat().st_ino for path in shards[2:])


def test_a_half_written_record_counts_for_nothing(speech, packed):
    before = files_of(packed)
    index = json.loads((packed / "index.json").read_text())
    (packed / "index.json").unlink()
    lines = [{"plan": index["plan"]}, index["shards"][0], {"name": "../../x.tar"}, 7, "x"]
    text = "".join(json.dumps(line) + "\n" for line in lines) + json.dumps(index["shards"][1])[:40]
    (packed / "progress.jsonl").write_text(text)
    assert pack(speech, packed, shard_mb=0.4).kept == 1
    assert files_of(packed) == before


def test_what_has_changed_since_it_was_begun_is_refused(speech, packed, tmp_path):
    before = files_of(packed)
    rows = [speech.row(index) for index in range(len(speech))]
    longer = shutil.copy(rows[0]["wav"], tmp_path / "longer.flac")
    with open(longer, "ab") as file:
        file.write(bytes(100))
    changes = {
        "another number of utterances": rows[1:],
        "IDs, durations or transcripts have changed": [rows[0] | {"wrd": "OTHER"}, *rows[1:]],
        "audio files have another size, or have gone": [rows[0] | {"wav": longer}, *rows[1:]],
    }
    for what, changed in changes.items():
        with pytest.raises(ManifestError, match=f"packed was begun with another state of the rows: .*{what}; name a"):
            pack(Manifest.from_rows(changed), packed, shard_mb=0.4)
    for options in ({"shard_mb": 0.3}, {"pcm": 16000}, {"shuffle": 1}, {"check": "header"}):
        with pytest.raises(ManifestError, match="the options differ"):
            pack(speech, packed, **{"shard_mb": 0.4} | options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"mine holds other files \(thesis.txt\)"):
        pack(speech, tmp_path / "mine")
    assert files_of(packed) == before and files_of(tmp_path / "mine") == {"thesis.txt": b"x"}


def test_a_second_packing_into_one_folder_is_refused(speech, packed):
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code, str(packed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(ConfigError, match="another process is packing into"):
            pack(speech, packed, shard_mb=0.4)
    finally:
        holder.communicate(b"\n")
    pack(speech, packed, shard_mb=0.4)


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


def test_verify_names_what_is_wrong(speech, packed):
    report = verify(packed)
    assert (report.utterances, report.shards) == (len(speech), len(list(packed.glob("*.tar"))))
    before = files_of(packed)
    flip(packed / "shard-000001.tar", 3000)
    (packed / "shard-000000.tar").unlink()
    with pytest.raises(ManifestError, match=r"shard-000000.tar is missing; shard-000001.tar has changed since"):
        verify(packed)
    pack(speech, packed, shard_mb=0.4, say=lambda sentence: None)
    text = (packed / "manifest.csv").read_text()
    (packed / "manifest.csv").write_text(text.replace("WORD 0", "WORD 9"))
    with pytest.raises(ManifestError, match=r"manifest.csv has changed since"):
        verify(packed)
    pack(speech, packed, shard_mb=0.4)
    assert files_of(packed) == before
    (packed / "index.json").unlink()
    with pytest.raises(ManifestError, match=r"packed has no index.json; name a folder of shards"):
        verify(packed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "it is no JSON object"),
        ([], "it is no JSON object"),
        ({"plan": 1}, "'plan' is missing"),
        ({"shards": None}, "'shards' is missing or no list"),
        ({"manifest": None}, "'manifest' does not give"),
        ({"manifest": "x"}, "'manifest' does not give"),
        ({"manifest": {"name": "../packed/manifest.csv", "sha256": ""}}, "'manifest' does not give"),
        ({"manifest": {"name": "manifest.csv"}}, "'manifest' does not give"),
        ({"shards": [{"name": "shard-000000.tar"}]}, "entry 0 of 'shards' does not give"),
        ({"left_out": [[1, 2]]}, "entry 1 of 'shards' does not give"),
        ({"name": "../shard-000001.tar"}, "entry 1 of 'shards' does not give"),
        ({"bytes": "many"}, "entry 1 of 'shards' does not give"),
    ],
)
def test_a_damaged_index_is_one_sentence_to_verify_and_to_pack(speech, packed, capsys, change, said):
    path = packed / "index.json"
    index = json.loads(path.read_text())
    if change is None:
        path.write_text("{")
    elif isinstance(change, dict):
        (index if change.keys() <= index.keys() else index["shards"][1]).update(change)
        path.write_text(json.dumps({key: value for key, value in index.items() if value is not None}))
    else:
        path.write_text(json.dumps(change))
    before = files_of(packed)
    assert run_main(main, ["shards", str(packed), "--verify"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path} is damaged ({said}")
    with pytest.raises(ManifestError, match=r"is damaged .* or pack the shards into a new folder"):
        pack(speech, packed, shard_mb=0.4)
    assert files_of(packed) == before


def test_a_shard_of_other_utterances_is_written_again(speech, packed, tmp_path, capsys):
    rows = [speech.row(number) | {"ID": f"other{number}"} for number in range(3)]
    pack(Manifest.from_rows(rows), tmp_path / "other", shard_mb=0.4)
    before, index = files_of(packed), json.loads((packed / "index.json").read_text())
    path = packed / "shard-000000.tar"
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    index["shards"][0].update(bytes=path.stat().st_size, sha256=file_digest(path))
    (packed / "index.json").write_text(json.dumps(index))
    pack(speech, packed, shard_mb=0.4)
    assert f"{path} holds other0.flac, of which the manifest knows nothing" in capsys.readouterr().out
    assert files_of(packed) == before


# -------------------------------------------------------------------- rows that lie


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"shard": "../shard-000000.tar"}, "is outside the manifest's folder"),
        ({"shard": "/etc/passwd.tar"}, "is outside the manifest's folder"),
        ({"shard": "sub/../../x.tar"}, "is outside the manifest's folder"),
        ({"shard": "linked/../shard-000000.tar"}, "is outside the manifest's folder"),
        ({"shard": "folder.tar/../shard-000000.tar"}, "is outside the manifest's folder"),
        ({"shard": "link.tar"}, "is outside the manifest's folder"),
        ({"shard": "linked/out.tar"}, "is outside the manifest's folder"),
        ({"shard": "/etc/passwd"}, "expected the name of a .tar file"),
        ({"shard": ""}, "expected the name of a .tar file"),
        ({"shard": "a\0.tar"}, "expected the name of a .tar file"),
        ({"shard": "a\ud800.tar"}, "expected the name of a .tar file"),
        ({"shard": "gone.tar"}, "does not exist; copy the shards to"),
        ({"shard": "folder.tar"}, "does not exist; copy the shards to"),
        ({"shard": "x" * 5000 + ".tar"}, "does not exist"),
        ({"offset": -512}, "the offset is '-512', expected a whole number"),
        ({"offset": 1.5}, "the offset is '1.5', expected a whole number"),
        ({"offset": None}, "the offset is '', expected a whole number"),
        ({"offset": "9" * 400}, "the offset is .*, expected a whole number"),
        ({"offset": "٣٣"}, "the offset is .*, expected a whole number"),
        ({"offset": 0}, "begins at a multiple of 512, behind its header"),
        ({"offset": 700}, "begins at a multiple of 512, behind its header"),
        ({"offset": 512 * 10**9}, "are asked for, which has"),
        ({"size": 0}, "are asked for, which has"),
        ({"size": 10**17}, "are asked for, which has"),
        ({"size": "-1"}, "the size is '-1', expected a whole number"),
    ],
)
def test_rows_that_lie_are_told_by_line_and_utterance(packed, tmp_path, change, sentence):
    shutil.copy(packed / "shard-000000.tar", tmp_path / "out.tar")
    (packed / "link.tar").symlink_to(tmp_path / "out.tar")
    (packed / "linked").symlink_to(tmp_path)
    (packed / "folder.tar").mkdir()
    rows = rows_of(packed)
    rows[1] = rows[1] | change
    (packed / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ManifestError, match=sentence) as error:
        read_manifest(packed / "m.jsonl")
    assert str(error.value).startswith(f"{packed / 'm.jsonl'}, line 2 (utterance {rows[1]['ID']}): ")
    assert len(str(error.value)) < 700


def test_links_inside_the_folder_and_a_linked_folder_are_good(packed, tmp_path):
    (tmp_path / "alias").symlink_to(packed)
    (packed / "sub").mkdir()
    (packed / "shard-000000.tar").rename(packed / "sub" / "first.tar")
    (packed / "shard-000000.tar").symlink_to("sub/first.tar")
    assert len(read_audio(read_manifest(tmp_path / "alias" / "manifest.csv").column("wav")[0]))


def test_a_window_that_is_no_entry_is_bad_audio_and_named(packed, speech):
    rows = rows_of(packed)
    first, size = rows[0], int(rows[0]["size"])
    lies = [
        {"offset": 512 + 512},  # behind its beginning
        {"size": size - 1},  # all but the end
        {"size": size + 1024},  # over the next header
        {"offset": 512 + -(-size // 512) * 512, "size": 512},  # the header of the row
    ]
    for change in lies:
        changed = [first | change, *rows[1:]]
        with open(packed / "lie.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, changed[0])
            writer.writeheader()
            writer.writerows(changed)
        manifest = read_manifest(packed / "lie.csv")
        dataset = DynamicItemDataset(manifest, speech_items(16000), ["id", "waveform"])
        with pytest.raises(AudioError, match=rf"utterance {first['ID']}: .*000000\.tar.* is no entry of the shard"):
            dataset.load(0)
        loader = Loader(dataset, BucketSampler(manifest.durations, batch_seconds=30), max_bad_share=0.5)
        assert sum(micro.weight for micro in loader.epoch(0)) == len(speech) - 1
        assert list(loader.bad) == [first["ID"]]


def test_damaged_shards_are_bad_audio(packed):
    wav = read_manifest(packed / "manifest.csv").column("wav")[0]
    shard = packed / "shard-000000.tar"
    flip(shard, 124)  # the size in the header
    with pytest.raises(AudioError, match="is no entry of the shard"):
        AudioFile(wav)
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(AudioError, match="is no entry of the shard"):
        AudioFile(wav)
    shard.unlink()
    with pytest.raises(AudioError, match=r"shard-000000.tar does not exist"):
        AudioFile(wav)


def test_a_table_with_its_own_column_size_keeps_it(tmp_path, speech):
    rows = [speech.row(0) | {"size": "small", "shard": "x", "offset": "1"}]
    manifest = Manifest.from_rows(rows)
    write_manifest(tmp_path / "m.csv", manifest)
    assert read_manifest(tmp_path / "m.csv").row(0) == rows[0]
    with pytest.raises(ManifestError, match="has a column 'shard', which shards need"):
        pack(manifest, tmp_path / "packed")


# -------------------------------------------------------------------- tars that lie


def entry(name: str, content: bytes) -> bytes:
    return tar_header(name, len(content)) + content + bytes(-len(content) % 512)


def special(name: str, kind: bytes, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info.tobuf(tarfile.USTAR_FORMAT)


def pax(records: bytes) -> bytes:
    """A pax header of these records."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = b"x", len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


PAX_SIZE = pax(b"18 size=1000000000\n")
ROW = entry("a.json", b'{"ID": "a", "duration": 1.0}')
END = bytes(1024)
LYING = {
    "outside": (entry("../a.wav", b"x") + ROW + END, "the name '../a.wav' leads outside"),
    "absolute": (entry("/etc/a.wav", b"x") + ROW + END, "the name '/etc/a.wav' leads outside"),
    "backslash": (entry("..\\a.wav", b"x") + ROW + END, "leads outside"),
    "long outside": (entry("a/" * 200 + "../../x", b"x") + ROW + END, "leads outside"),
    "symlink": (special("a.wav", tarfile.SYMTYPE, "/etc/passwd") + END, "no regular file .symbolic link."),
    "hard link": (special("a.wav", tarfile.LNKTYPE, "/etc/passwd") + END, "no regular file .hard link."),
    "device": (special("a.wav", tarfile.CHRTYPE) + END, "no regular file .device."),
    "pipe": (special("a.wav", tarfile.FIFOTYPE) + END, "no regular file .pipe."),
    "folder": (special("a", tarfile.DIRTYPE) + END, "no regular file .folder."),
    "sparse": (special("a", b"S") + END, "of the unknown kind b'S'"),
    "size": (tar_header("a.wav", 10**7) + b"x" * 512 + END, "claims 10000000 bytes, more than there are left"),
    "no end": (entry("a.wav", b"x") + ROW, "truncated or no tar: at byte 2048"),
    "half a header": (entry("a.wav", b"x") + ROW[:100], "truncated or no tar: at byte 1024"),
    "garbage": (b"x" * 4096, "truncated or no tar: at byte 0"),
    "nothing": (b"", "truncated or no tar: at byte 0"),
    "zip": (b"PK\3\4" + bytes(2000), "truncated or no tar: at byte 0"),
    "no row": (entry("a.wav", b"x") + END, "no a.json follows 'a.wav'"),
    "other row": (entry("b.wav", b"x") + ROW + END, "no b.json follows 'b.wav'"),
    "foreign row": (entry("b.wav", b"x") + entry("b.json", b'{"ID": "a"}') + END, "the row of another utterance"),
    "no json": (entry("a.wav", b"x") + entry("a.json", b"\xff{") + END, "is no utterance's row"),
    "list": (entry("a.wav", b"x") + entry("a.json", b"[1]") + END, "is no utterance's row"),
    "deep": (entry("a.wav", b"x") + entry("a.json", b"[" * 10**6) + END, "is no utterance's row"),
    "number": (entry("a.wav", b"x") + entry("a.json", b'{"ID": 1}') + END, "the row of another utterance"),
    "large row": (entry("a.wav", b"x") + entry("a.json", bytes((1 << 24) + 1)) + END, "too large"),
    "pax size": (PAX_SIZE + ROW + END, "pax header at byte 512 is broken or of a kind"),
    "pax length": (pax(b"999 path=a.wav\n") + ROW + END, "pax header at byte 512 is broken"),
    "pax words": (pax(b"no records\n") + ROW + END, "pax header at byte 512 is broken"),
    "pax bomb": (pax(b"70000 path=" + b"a" * 69988 + b"\n") + ROW + END, "pax header at byte 512 is broken"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LYING)
def test_a_lying_tar_is_refused_in_a_sentence(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, sentence = LYING[kind]
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(AudioError, match=sentence) as error:
        list(iterate("s.tar"))
    assert str(error.value).startswith(f"{tmp_path / 's.tar'}") and len(str(error.value)) < 900
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]  # nothing was extracted


def test_any_damage_ends_in_a_sentence_or_in_rows(packed):
    shard = packed / "shard-000000.tar"
    content, rng = shard.read_bytes(), random.Random(7)
    headers = [place.offset - 512 for place in tar_entries(shard)]
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 8])):
            damaged[rng.choice(headers) + rng.randrange(512)] = rng.randrange(256)
        shard.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        try:
            assert all(isinstance(row["ID"], str) for row, _ in iterate(shard))
        except AudioError:
            refused += 1
    assert refused > 200


def test_a_missing_shard_is_a_sentence(tmp_path):
    with pytest.raises(AudioError, match="cannot be opened: No such file"):
        list(iterate(tmp_path / "gone.tar"))


# -------------------------------------------------------------------- the command


def command(capsys, *words) -> tuple[int, str, str]:
    code = run_main(main, ["shards", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command(tmp_path, capsys):
    code, out, _ = command(capsys, DIGITS, tmp_path / "packed", "--shard_mb", "0.1", "--workers", "1")
    assert code == 0 and out.startswith("50 utterances in 3 shards, 0.3 MB: ")
    code, out, _ = command(capsys, DIGITS, tmp_path / "packed", "--shard_mb", "0.1", "--workers", "1")
    assert code == 0 and "(3 of them were there already)" in out
    assert command(capsys, tmp_path / "packed", "--verify")[1].startswith("all checksums right: 50 utterances in 3")
    assert read_manifest(tmp_path / "packed" / "manifest.csv").fingerprint() == read_manifest(DIGITS).fingerprint()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gone.csv", "out"], "error: the manifest gone.csv does not exist"),
        ([DIGITS], "error: there is no folder for the shards"),
        ([DIGITS, "file/below"], "error: file/below is a file or lies under one; name a new folder for the shards."),
        ([DIGITS, "file"], "error: file is a file or lies under one; name a new folder for the shards."),
        ([DIGITS, "out", "--shard_mb", "0"], "error: shard_mb is 0, expected megabytes"),
        ([DIGITS, "out", "--shard_mb", "nan"], "error: shard_mb is nan, expected megabytes"),
        ([DIGITS, "out", "--pcm", "16"], "error: pcm is 16, expected a sample rate"),
        ([DIGITS, "out", "--workers", "0"], "error: workers is 0, expected at least 1"),
        ([DIGITS, "out", "--max_bad_share", "2"], "error: max_bad_share is 2.0, expected a share"),
        ([DIGITS, "out", "--check", "no"], "error: python -m toolkit shards: argument --check: invalid choice"),
        (["gone", "--verify"], "error: gone has no index.json"),
        (["file", "--verify"], "error: file has no index.json"),
        (["a", "b", "--verify"], "error: --verify takes one argument"),
    ],
)
def test_mistakes_of_the_command(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    code, _, error = command(capsys, *words)
    assert code == 2 and error.startswith(sentence) and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_duplicate_ids_are_refused_before_anything_is_written(tmp_path, capsys):
    rows = DIGITS.read_text().splitlines()
    (tmp_path / "twice.csv").write_text("\n".join([*rows[:3], rows[1]]) + "\n")
    code, _, error = command(capsys, tmp_path / "twice.csv", tmp_path / "packed")
    assert code == 2 and "stands already in line 2" in error and not (tmp_path / "packed").exists()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="a process's memory stands in Linux's /proc")
def test_workers_do_not_keep_the_memory_of_their_batches(speech, tmp_path):
    """glibc would: 300 MB in each worker after 150 batches of 6 MB."""
    pack(speech, tmp_path / "pcm", pcm=16000)
    first = read_manifest(tmp_path / "pcm" / "manifest.csv")
    manifest = Manifest.from_rows([first.row(i % len(first)) | {"ID": f"{i}"} for i in range(8000)])
    dataset = DynamicItemDataset(manifest, speech_items(16000), ["id", "waveform"])
    sampler = BucketSampler(manifest.durations, batch_seconds=100, mode="crop", max_seconds=4.0)
    loader = Loader(dataset, sampler, num_workers=1)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before, batches = set(children.read_text().split()), loader.epoch(0)
    for _ in range(150):
        next(batches)
    (worker,) = set(children.read_text().split()) - before
    lines = Path(f"/proc/{worker}/smaps_rollup").read_text().splitlines()
    kept = next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1000
    loader.close()
    assert kept < 100, f"{kept} MB"
