"""librispeech_prepare.py on the small real tree, and on trees broken in every way that a corpus breaks."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from recipes.LibriSpeech import librispeech_prepare as prepare
from toolkit.data import corpus_scan
from toolkit.errors import ConfigError, ManifestError

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "recipes" / "LibriSpeech" / "librispeech_prepare.py"
TINY = ROOT / "tests" / "fixtures" / "librispeech_tiny"
TRAIN, DEV = "train-clean-100", "dev-clean"


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def run(tree: Path, output: Path, **options) -> dict[str, Path]:
    return prepare.prepare_librispeech(tree, output, num_workers=0, **options)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the small tree that a test may break."""
    return Path(shutil.copytree(TINY, tmp_path / "LibriSpeech"))


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """A made tree for subsets: 30 speakers, one of them with half of all speech, 24 minutes of noise in all."""
    noise = np.random.default_rng(0)
    root = tmp_path / "spoken"
    for speaker in range(1, 31):
        folder = root / TRAIN / str(speaker) / "7"
        folder.mkdir(parents=True)
        count = 60 if speaker == 1 else 2
        for utterance in range(count):
            sound = (noise.standard_normal(12 * 1000) * 0.1).astype(np.float32)
            sf.write(folder / f"{speaker}-7-{utterance:04}.wav", sound, 1000)
        text = "".join(f"{speaker}-7-{utterance:04} WORD\n" for utterance in range(count))
        (folder / f"{speaker}-7.trans.txt").write_text(text)
    return root


def test_real_tree_gives_every_utterance_with_its_true_length(tmp_path: Path) -> None:
    manifests = run(TINY, tmp_path)
    assert sorted(manifests) == [DEV, TRAIN]
    dev, train = rows(manifests[DEV]), rows(manifests[TRAIN])
    assert (len(dev), len(train)) == (13, 26)
    assert list(dev[0]) == ["ID", "duration", "wav", "spk_id", "wrd"]
    assert sum(float(row["duration"]) for row in dev) == pytest.approx(127.255)
    first = next(row for row in dev if row["ID"] == "1272-128104-0000")
    assert first["wrd"].startswith("MISTER QUILTER IS THE APOSTLE")
    assert first["spk_id"] == "1272"
    for row in dev + train:
        assert round(float(row["duration"]) * 16000) == sf.info(row["wav"]).frames
    assert {Path(row["wav"]).suffix for row in train} == {".flac", ".ogg"}
    summary = json.loads((tmp_path / "librispeech_prepare.json").read_text())
    assert summary["folders"][DEV]["utterances"] == 13
    assert summary[DEV]["hours"] == pytest.approx(127.255 / 3600, abs=1e-4)


def test_command_line_from_another_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--data_folder", str(TINY), "--output_folder", "out", "--splits", DEV,
               "--check", "header"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(rows(tmp_path / "out" / "dev-clean.csv")) == 13
    assert "dev-clean: 13 of the corpus' 2,703 utterances, 0.04 h, 4 speakers" in done.stdout


def test_folder_around_the_corpus_is_understood(tmp_path: Path, tree: Path) -> None:
    assert DEV in run(tree.parent, tmp_path / "out")


def test_another_corpus_of_the_same_layout(tmp_path: Path, tree: Path) -> None:
    (tree / TRAIN).rename(tree / "train")
    (tree / DEV).rename(tree / "test")
    assert sorted(run(tree, tmp_path / "all")) == ["test", "train"]
    assert list(run(tree.parent, tmp_path / "one", splits=["test"])) == ["test"]


def test_entries_may_be_manifests(tmp_path: Path) -> None:
    mine = str(tmp_path / "mine.jsonl")
    found = prepare.librispeech_manifests([mine, DEV], data_folder=TINY, manifest_folder=tmp_path, check="header")
    assert found == {mine: Path(mine), DEV: tmp_path / "dev-clean.csv"}
    assert prepare.librispeech_manifests([mine], data_folder="nowhere", manifest_folder=tmp_path) == {mine: Path(mine)}


def test_a_folder_of_fairseqs_is_taken_as_it_is(tmp_path: Path) -> None:
    folder, said = ROOT / "tests" / "fixtures" / "fairseq_folder", []
    places = {"data_folder": folder, "manifest_folder": tmp_path / "m", "say": said.append}
    found = prepare.librispeech_manifests([TRAIN, DEV], audio_folder=TINY, texts=True, **places)
    assert found == {TRAIN: folder / "train.tsv", DEV: folder / "valid.tsv"}
    assert len(said) == 2 and not (tmp_path / "m").exists()
    with pytest.raises(ManifestError, match="the audio's folder /data/LibriSpeech is not on this machine; say where"):
        prepare.librispeech_manifests([TRAIN, DEV], **places)
    with pytest.raises(ManifestError, match="is not on this machine"):
        prepare.librispeech_manifests([str(folder / "valid.tsv")], **places)
    with pytest.raises(ManifestError, match="none for the split 'mine'; there are train, valid"):
        prepare.librispeech_manifests(["mine"], audio_folder=TINY, **places)


def test_all_formats_alike(tmp_path: Path, tree: Path) -> None:
    chapter = tree / DEV / "1272" / "128104"
    for suffix, utterance in ((".wav", "0000"), (".ogg", "0001"), (".mp3", "0002")):
        flac = chapter / f"1272-128104-{utterance}.flac"
        sound, rate = sf.read(flac)
        sf.write(flac.with_suffix(suffix), sound, rate)
        flac.unlink()
    found = {Path(row["wav"]).suffix: float(row["duration"]) for row in rows(run(tree, tmp_path / "out")[DEV])}
    assert set(found) == {".flac", ".wav", ".ogg", ".mp3"}
    assert found[".wav"] == 93680 / 16000 and found[".mp3"] == pytest.approx(199760 / 16000, abs=0.1)


def test_what_does_not_fit_is_named_and_counted(tmp_path: Path, tree: Path) -> None:
    chapter = tree / DEV / "1272" / "128104"
    (chapter / "1272-128104-0000.flac").unlink()  # line without audio
    trans = chapter / "1272-128104.trans.txt"
    lines = trans.read_text().splitlines()
    trans.write_text("\n".join(line for line in lines if "-0001" not in line) + "\n")  # audio without line
    broken = chapter / "1272-128104-0002.flac"
    broken.write_bytes(broken.read_bytes()[:60000])  # truncated: the header still opens
    said: list[str] = []
    manifest = run(tree, tmp_path / "out", splits=[DEV], say=said.append)[DEV]
    report = "\n".join(said)
    assert len(rows(manifest)) == 10
    assert "1 transcript lines without audio: 1272-128104-0000" in report
    assert "1 audio files without transcript: 1272/128104/1272-128104-0001.flac" in report
    assert "1 corrupt audio files: 1272/128104/1272-128104-0002.flac" in report
    report = json.loads((tmp_path / "out" / "librispeech_prepare.json").read_text())["folders"][DEV]
    assert (report["transcript_lines"], report["audio_files"], report["utterances"]) == (12, 12, 10)


def test_too_much_corrupt_audio_is_refused_by_name(tmp_path: Path, tree: Path) -> None:
    for broken in sorted((tree / DEV / "1272").rglob("*.flac"))[:3]:
        broken.write_text("not audio")
    with pytest.raises(ManifestError, match=r"3 of 13 audio files cannot be read, more than") as caught:
        run(tree, tmp_path / "out", splits=[DEV])
    named = tmp_path / "out" / "dev-clean_corrupt.txt"
    assert str(named) in str(caught.value) and len(named.read_text().splitlines()) == 3
    assert len(rows(run(tree, tmp_path / "out", splits=[DEV], max_bad_share=0.5)[DEV])) == 10


def test_empty_audio_and_second_file_and_empty_transcript(tmp_path: Path, tree: Path) -> None:
    chapter = tree / DEV / "2412" / "153948"
    sound, rate = sf.read(chapter / "2412-153948-0000.flac")
    sf.write(chapter / "2412-153948-0000.wav", sound, rate)
    sf.write(chapter / "2412-153948-0002.wav", sound[:0], rate)
    trans = chapter / "2412-153948.trans.txt"
    trans.write_text(trans.read_text() + "2412-153948-0002 WORDS\n2412-153948-0003\n")
    sf.write(chapter / "2412-153948-0003.wav", sound[:16000], rate)
    manifest = run(tree, tmp_path / "out", splits=[DEV])[DEV]
    assert {Path(row["wav"]).suffix for row in rows(manifest)} == {".flac"} and len(rows(manifest)) == 13
    report = json.loads((tmp_path / "out" / "librispeech_prepare.json").read_text())["folders"][DEV]
    assert report["twice"] == ["2412/153948/2412-153948-0000.wav"]
    assert list(report["corrupt"]) == ["2412/153948/2412-153948-0002.wav"]
    assert report["empty_transcript"] == ["2412-153948-0003"]


def test_duration_limits_thin_train_only_and_are_counted(tmp_path: Path) -> None:
    manifests = run(TINY, tmp_path, min_duration=2.5, max_duration=4.0)
    durations = [float(row["duration"]) for row in rows(manifests[TRAIN])]
    assert min(durations) >= 2.5 and max(durations) <= 4.0
    assert len(rows(manifests[DEV])) == 13
    report = json.loads((tmp_path / "librispeech_prepare.json").read_text())["folders"][TRAIN]
    assert len(report["too_short"]) + len(report["too_long"]) + len(durations) == 26
    assert len(report["too_long"]) == 3


def test_unchanged_is_reused_and_changed_is_not(tmp_path: Path, tree: Path) -> None:
    manifest = run(tree, tmp_path / "out", splits=[DEV])[DEV]
    written = manifest.stat().st_mtime_ns
    said: list[str] = []
    run(tree, tmp_path / "out", splits=[DEV], say=said.append)
    assert manifest.stat().st_mtime_ns == written and "unchanged, reused" in said[0]
    run(tree, tmp_path / "out", splits=[TRAIN])  # another split leaves this one alone
    assert manifest.stat().st_mtime_ns == written
    trans = tree / DEV / "2412" / "153948" / "2412-153948.trans.txt"
    trans.write_text(trans.read_text().replace("IF", "WHEN", 1))
    run(tree, tmp_path / "out", splits=[DEV])
    assert manifest.stat().st_mtime_ns != written
    changed = manifest.read_text()
    manifest.write_text(changed[: len(changed) // 2])  # a manifest damaged by hand is written anew
    run(tree, tmp_path / "out", splits=[DEV])
    assert manifest.read_text() == changed


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, tree: Path, monkeypatch) -> None:
    looked_at: list[str] = []
    whole = corpus_scan.inspect_file

    def stops(path: str, check: str) -> dict:
        if len(looked_at) == 7:
            raise KeyboardInterrupt
        looked_at.append(path)
        return whole(path, check)

    monkeypatch.setattr(corpus_scan, "inspect_file", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tree, tmp_path / "out", splits=[DEV])
    memory = tmp_path / "out" / "scan" / "dev-clean.jsonl"
    with open(memory, "a") as stream:
        stream.write('{"file": "1272/12')  # as a kill in the middle of a write leaves it
    first, looked_at[:] = list(looked_at), [None] * 100

    def counts(path: str, check: str) -> dict:
        looked_at.append(path)
        return whole(path, check)

    monkeypatch.setattr(corpus_scan, "inspect_file", counts)
    manifest = run(tree, tmp_path / "out", splits=[DEV])[DEV]
    assert len(rows(manifest)) == 13
    assert len(looked_at) - 100 == 6 and not set(first) & set(looked_at[100:])


def test_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run(TINY, tmp_path / "one")[TRAIN].read_text()
    monkeypatch.setattr(corpus_scan, "FEW_FILES", 1)
    together = prepare.prepare_librispeech(TINY, tmp_path / "two", splits=[TRAIN], num_workers=2)[TRAIN].read_text()
    assert alone == together


def test_headers_do_not_stand_in_for_decoding(tmp_path: Path, tree: Path) -> None:
    broken = tree / DEV / "1272" / "128104" / "1272-128104-0002.flac"
    broken.write_bytes(broken.read_bytes()[:60000])
    assert len(rows(run(tree, tmp_path / "out", splits=[DEV], check="header")[DEV])) == 13
    assert len(rows(run(tree, tmp_path / "out", splits=[DEV])[DEV])) == 12


def test_ten_minutes_are_balanced_over_speakers_and_seeded(tmp_path: Path, spoken: Path) -> None:
    chosen = rows(run(spoken, tmp_path / "a", splits=["train-10min"], check="header")["train-10min"])
    seconds = sum(float(row["duration"]) for row in chosen)
    assert 600 <= seconds < 612
    by_speaker = [sum(row["spk_id"] == str(speaker) for row in chosen) for speaker in range(1, 31)]
    assert max(by_speaker) - min(by_speaker) <= 1
    again = rows(run(spoken, tmp_path / "b", splits=["train-10min"], check="header")["train-10min"])
    other = rows(run(spoken, tmp_path / "c", splits=["train-10min"], check="header", seed=7)["train-10min"])
    assert [row["ID"] for row in chosen] == [row["ID"] for row in again] != [row["ID"] for row in other]


def test_small_subsets_lie_inside_large_ones(spoken: Path, tmp_path: Path) -> None:
    table = [prepare.Utterance(r["ID"], float(r["duration"]), r["wav"], r["spk_id"], r["wrd"])
             for r in rows(run(spoken, tmp_path, check="header")[TRAIN])]
    small = {u.id for u in prepare.choose_balanced("x", table, 120, 3)}
    large = {u.id for u in prepare.choose_balanced("x", table, 700, 3)}
    assert len(small) == 10 and small < large


def test_subset_that_the_folder_cannot_fill(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"train-1h needs 60 min of training speech and the folder holds 1.4 min"):
        run(TINY, tmp_path, splits=["train-1h"])


def test_whole_subset_says_what_is_missing(tmp_path: Path) -> None:
    said: list[str] = []
    manifests = run(TINY, tmp_path, splits=["train-960h", "train-100h"], say=said.append)
    assert said[0] == "train-960h: train-clean-360, train-other-500 not there, so it holds train-clean-100 only"
    assert manifests["train-960h"].read_text() == manifests["train-100h"].read_text()


def test_listed_subset(tmp_path: Path) -> None:
    listed = tmp_path / "ids.txt"
    listed.write_text("1737-146161-0007\n1737/146161/1737-146161-0009.flac\n\n")
    manifests = run(TINY, tmp_path / "out", splits=[DEV], subset_lists=[f"train-mine={listed}"])
    assert [row["ID"] for row in rows(manifests["train-mine"])] == ["1737-146161-0007", "1737-146161-0009"]
    listed.write_text("1737-146161-0007\n9-9-9\n")
    with pytest.raises(ManifestError, match=r"1 of the 2 utterances listed in .* the first 9-9-9"):
        run(TINY, tmp_path / "out", subset_lists=[f"train-mine={listed}"])


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"splits": ["dev-claen"]}, ManifestError, "dev-claen: not in .* which holds dev-clean, train-clean-100"),
        ({"check": "fast"}, ConfigError, "check is 'fast'; take 'decode' or 'header'"),
        ({"max_bad_share": 2}, ConfigError, "max_bad_share is 2"),
        ({"subset_lists": ["ids.txt"]}, ConfigError, "subset_lists has 'ids.txt'; write NAME=FILE"),
        ({"min_duration": 9, "max_duration": 3}, ConfigError, "min_duration 9 s is above max_duration 3 s"),
        ({"subset_lists": ["a=nowhere.txt"]}, ManifestError, "a: the file 'nowhere.txt' does not exist"),
        ({"subset_lists": ["a=/"]}, ManifestError, "a: the file '/' is a folder, not a file; check the path"),
        ({"subset_lists": [1]}, ConfigError, "subset_lists holds 1, expected names; put quotes round a name"),
        ({"splits": [100]}, ConfigError, "splits holds 100, expected names; put quotes round a name"),
        ({"splits": DEV}, ConfigError, "splits is 'dev-clean', expected a list; write .dev-clean."),
        ({"min_duration": float("nan")}, ConfigError, "min_duration is nan; take seconds, 0 or more, or leave it out"),
        ({"max_duration": -1}, ConfigError, "max_duration is -1; take seconds, 0 or more, or leave it out"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict, error: type, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        run(TINY, tmp_path, **options)


def test_wrong_number_of_processes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_workers is -1; take a whole number, 0 or more, or leave it out"):
        prepare.prepare_librispeech(TINY, tmp_path, num_workers=-1)


@pytest.mark.parametrize("entry", [100, None])
def test_entries_that_are_no_names(tmp_path: Path, entry: object) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare.librispeech_manifests([DEV, entry], data_folder=TINY, manifest_folder=tmp_path)
    assert str(caught.value) == (
        f"train_splits, valid_splits or test_splits holds {entry}, expected names; put quotes round a name that is a "
        "number, and write [] for none."
    )


@pytest.mark.parametrize(
    "damage",
    [b"[]", b'{"dev-clean": 3, "folders": 4}', b'{"dev-clean": {}}', b'{"x": {"hours": NaN}}', b"\xff\xfe\x00", b"3"],
)
def test_a_damaged_summary_is_written_anew(tmp_path: Path, damage: bytes) -> None:
    manifest = run(TINY, tmp_path, splits=[DEV], check="header")[DEV]
    written, summary = manifest.read_bytes(), tmp_path / "librispeech_prepare.json"
    summary.write_bytes(damage)
    assert run(TINY, tmp_path, splits=[DEV], check="header")[DEV].read_bytes() == written
    assert json.loads(summary.read_text())[DEV]["utterances"] == 13


@pytest.mark.parametrize("damage", [b"1\n", b"\xff\xfe\n", b"{}\n", b'{"file": 3}\n', b"[" * 200000 + b"\n"])
def test_damaged_lines_of_the_scan_are_passed_over(tmp_path: Path, damage: bytes) -> None:
    memory = tmp_path / "scan" / "dev-clean.jsonl"
    run(TINY, tmp_path, splits=[DEV], check="header")
    lines = memory.read_bytes().splitlines(keepends=True)
    fact = json.loads(lines[1]) | {"frames": "many"}
    memory.write_bytes(lines[0] + damage + json.dumps(fact).encode() + b"\n" + b"".join(lines[2:]))
    (tmp_path / "dev-clean.csv").unlink()
    assert len(rows(run(TINY, tmp_path, splits=[DEV], check="header")[DEV])) == 13
    assert memory.read_bytes().endswith(lines[1])  # looked at again, only this one
    assert len(memory.read_bytes().splitlines()) == 15


def test_list_that_is_not_text(tmp_path: Path) -> None:
    listed = tmp_path / "ids.txt"
    listed.write_bytes(b"1737-146161-0007\n\xff\xfe")
    with pytest.raises(ManifestError) as caught:
        run(TINY, tmp_path / "out", splits=[DEV], subset_lists=[f"mine={listed}"], check="header")
    assert str(caught.value) == f"{listed}: not UTF-8 at byte 17; save it as UTF-8."


def test_transcripts_with_a_byte_order_mark_and_tabs(tmp_path: Path, tree: Path) -> None:
    whole = run(tree, tmp_path / "whole", splits=[DEV], check="header")[DEV].read_text()
    for trans in (tree / DEV).rglob("*.trans.txt"):
        lines = trans.read_text().splitlines()
        trans.write_text("\r\n".join(line.replace(" ", "\t", 1) for line in lines), encoding="utf-8-sig")
    assert run(tree, tmp_path / "edited", splits=[DEV], check="header")[DEV].read_text() == whole


def test_folders_that_are_files_or_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ManifestError) as caught:
        run(file, tmp_path / "out")
    assert str(caught.value) == (
        f"data_folder {str(file)!r} is a file, not a folder; give the folder that holds dev-clean/ etc."
    )
    for below in (file, file / "out"):
        with pytest.raises(ConfigError) as caught:
            run(TINY, below)
        assert str(caught.value) == f"the output folder {below} lies at or under a file; choose another name."
    if Path("/proc/self").is_dir():
        with pytest.raises(ConfigError) as caught:
            run(TINY, Path("/proc/x"))
        assert str(caught.value) == (
            "the output folder /proc/x cannot be made (No such file or directory); choose another folder."
        )


def test_options_are_not_abbreviated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare.main(["--data_folder", str(TINY), "--output_folder", str(tmp_path), "--split", DEV])
    assert "unrecognized arguments: --split dev-clean" in capsys.readouterr().err


def test_wrong_folders_and_doubled_lines(tmp_path: Path, tree: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist; give the folder that holds dev-clean"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ManifestError, match="holds none of train-clean-100"):
        run(tree / DEV / "1272", tmp_path / "out")
    trans = tree / DEV / "2412" / "153948" / "2412-153948.trans.txt"
    trans.write_text(trans.read_text() * 2)
    with pytest.raises(ManifestError, match=r"2412-153948.trans.txt, line 3: 2412-153948-0000 has a transcript"):
        run(tree, tmp_path / "out", splits=[DEV])


def test_errors_on_the_command_line_are_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--data_folder", "nowhere", "--output_folder", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: data_folder 'nowhere' does not exist; give the folder that holds dev-clean/ etc.\n"
