"""Manifests: every kind gives one table, and every bad file is told in one sentence."""

from __future__ import annotations

import json
import os
import tracemalloc

import numpy as np
import pytest

from toolkit.data.manifest import Manifest, read_manifest, read_manifests, write_manifest
from toolkit.errors import ManifestError

ROWS = [
    {"ID": "1-2-0001", "duration": 1.25, "wav": "a/1-2-0001.flac", "wrd": "HELLO, THERE"},
    {"ID": "1-2-0002", "duration": 20000 / 16000, "wav": "a/1-2-0002.flac", "wrd": 'SAY "NO"'},
    {"ID": "3-4-0003", "duration": 0.1000625, "wav": "b/3-4-0003.flac", "wrd": "مرحبا 世界"},
]


def expected(folder) -> Manifest:
    return Manifest.from_rows([row | {"wav": str(folder / row["wav"])} for row in ROWS])


def rebased(rows, prefix):
    return [row | {"wav": prefix + row["wav"]} for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".tsv"])
@pytest.mark.parametrize("data_root", [True, False])
def test_all_kinds_give_the_same_table(tmp_path, suffix, data_root):
    manifest = expected(tmp_path / "audio")
    root = tmp_path / "audio" if data_root else None
    path = write_manifest(tmp_path / "lists" / f"train{suffix}", manifest, data_root=root)
    read = read_manifest(path, replacements={"data_root": str(tmp_path / "audio")})
    assert read == manifest
    assert read.fingerprint() == manifest.fingerprint()
    assert read.row(2) == manifest.row(2)
    if data_root and suffix != ".tsv":
        assert str(tmp_path) not in path.read_text(encoding="utf-8")


def test_hand_written_kinds_with_relative_paths(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        '\ufeffID,duration,wav,wrd\r\n1-2-0001,1.25,a/1-2-0001.flac,"HELLO, THERE"\r\n\r\n'
        '1-2-0002,1.25,a/1-2-0002.flac,"SAY ""NO"""\r\n3-4-0003,0.1000625,./b/3-4-0003.flac,مرحبا 世界\r\n'.encode()
    )
    table = {row["ID"]: {"wav": row["wav"], "duration": row["duration"], "words": row["wrd"]} for row in ROWS}
    (tmp_path / "a.json").write_text(json.dumps(table), encoding="utf-8-sig")
    (tmp_path / "list.json").write_text(json.dumps(ROWS), encoding="utf-8")
    nemo = [{"audio_filepath": row["wav"], "id": row["ID"], "duration": str(row["duration"])} for row in ROWS]
    lines = [json.dumps(entry | {"text": row["wrd"]}) + "\n" for entry, row in zip(nemo, ROWS, strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "lines.json").write_text("".join(lines), encoding="utf-8")
    tabs = ["ID\tduration\twav\twrd\n"] + ["\t".join(map(str, row.values())).replace('"', "'") + "\n" for row in ROWS]
    (tmp_path / "a.tsv").write_text("".join(tabs), encoding="utf-8")
    wanted = expected(tmp_path)
    for name in ("a.csv", "a.json", "list.json", "a.jsonl", "lines.json"):
        read = read_manifest(tmp_path / name)
        assert {column: list(read.column(column)) for column in read.columns} == {
            column: list(wanted.column(column)) for column in wanted.columns
        }, name
    assert list(read_manifest(tmp_path / "a.tsv").ids) == list(wanted.ids)


def test_placeholders_of_both_kinds(tmp_path):
    for text in ("$data_root/a.wav", "{data_root}/a.wav", "${data_root}/a.wav"):
        (tmp_path / "m.csv").write_text(f"ID,duration,wav\nx,1,{text}\n")
        read = read_manifest(tmp_path / "m.csv", replacements={"data_root": str(tmp_path / "D")})
        assert read.row(0)["wav"] == str(tmp_path / "D" / "a.wav")
    (tmp_path / "m.csv").write_text("ID,duration,wav\nx,1,/abs/$data_root.wav\n")
    assert read_manifest(tmp_path / "m.csv").row(0)["wav"] == "/abs/$data_root.wav"


BAD = {
    "empty.csv": (
        "",
        "{path} has no columns ID, duration, wav; it has none, and needs ID, duration (seconds) and wav (path).",
    ),
    "header_only.csv": ("ID,duration,wav\n", "{path} holds no utterances; check how it was made."),
    "no_wav.csv": (
        "ID,duration,sound\nx,1,a.wav\n",
        "{path} has no column wav; it has ID, duration, sound, and needs ID, duration (seconds) and wav (path).",
    ),
    "twice.csv": (
        "ID,duration,wav\nx,1,a.wav\ny,1,b.wav\nx,1,c.wav\n",
        "{path}, line 4: the ID 'x' stands already in line 2; IDs must be unique.",
    ),
    "column_twice.csv": (
        "ID,duration,wav,wav\n",
        "{path}, line 1: the column 'wav' comes twice; give each column its own name.",
    ),
    "word.csv": (
        "ID,duration,wav\nx,1,a.wav\ny,long,b.wav\n",
        "{path}, line 3: the duration is 'long', expected seconds greater than 0; "
        "correct or delete the row, or prepare the manifest again.",
    ),
    "zero.csv": (
        "ID,duration,wav\nx,0,a.wav\n",
        "{path}, line 2: the duration is '0', expected seconds greater than 0; "
        "correct or delete the row, or prepare the manifest again.",
    ),
    "nan.jsonl": (
        '{"ID": "x", "duration": NaN, "wav": "a.wav"}\n',
        "{path}, line 1: the duration is nan, expected seconds greater than 0; "
        "correct or delete the row, or prepare the manifest again.",
    ),
    "short_row.csv": (
        "ID,duration,wav\nx,1\n",
        "{path}, line 2: there are 2 fields where the header names 3; "
        "put quotes round a field that holds the separator, or complete the line.",
    ),
    "no_id.csv": ("ID,duration,wav\n,1,a.wav\n", "{path}, line 2: the ID is empty; give each utterance its own."),
    "no_path.csv": (
        "ID,duration,wav\nx,1,\n",
        "{path}, line 2: the path in column wav is empty; give the path or delete the row.",
    ),
    "quotes.csv": (
        'ID,duration,wav\nx,1,"a"b.wav\n',
        "{path}, line 2: ',' expected after '\"'; correct the line.",
    ),
    "placeholder.csv": (
        "ID,duration,wav\nx,1,$data_root/a.wav\n",
        "{path}, line 2: the path '$data_root/a.wav' begins with the placeholder data_root, for which nothing "
        "was given; "
        "give the folder that it stands for (replacements, or data_root in the YAML).",
    ),
    "broken.json": (
        '{"x": {"wav": "a.wav",\n "duration" 1}}',
        "{path}, line 2: this is not JSON (Expecting ':' delimiter); correct the file.",
    ),
    "number.json": (
        "3",
        '{path} is neither a JSON object nor a list of objects; write {{ID: {{"wav": ..., "duration": ...}}}}, a list '
        "of objects with ID, wav and duration, or one such object a line.",
    ),
    "flat.json": (
        '{"x": 3}',
        "{path}, entry 'x': this is not an object with wav and duration; correct it.",
    ),
    "twice.json": (
        '{"x": {"wav": "a.wav", "duration": 1}, "x": {"wav": "b.wav", "duration": 1}}',
        "{path}: the key 'x' comes twice; IDs must be unique.",
    ),
    "nothing.json": ("{}", "{path} holds no utterances; check how it was made."),
    "line.jsonl": (
        '{"ID": "x", "duration": 1, "wav": "a.wav"}\n{"ID": "y",\n',
        "{path}, line 2: this is not a JSON object (Expecting property name enclosed in double quotes); correct "
        "the line.",
    ),
    "list.jsonl": ("[1]\n", "{path}, line 1: this is not an object with wav and duration; correct it."),
    "hole.jsonl": (
        '{"ID": "x", "duration": 1, "wav": "a.wav", "wrd": "A"}\n{"ID": "y", "duration": 1, "wav": "b.wav"}\n',
        "{path}, line 2: there is no 'wrd', which other rows have; complete the row.",
    ),
    "surrogate.jsonl": (
        '{"ID": "x", "duration": 1, "wav": "a.wav", "wrd": "\\ud800"}\n',
        "{path}, line 1: the column wrd is not valid Unicode text; correct the row.",
    ),
    "latin.csv": (
        b"ID,duration,wav,wrd\nx,1,a.wav,A\ny,1,b.wav,\xe9t\xe9\n",
        "{path}, line 3: the text is not UTF-8; save the file as UTF-8.",
    ),
    "latin.json": (b'{\n"x\xe9": 1}', "{path}, line 2: the text is not UTF-8; save the file as UTF-8."),
    "spaces.tsv": (
        "/root\na.flac 100\n",
        "{path}, line 2: there are 1 fields, expected a path and a number of samples "
        "with one tab between them; correct the line.",
    ),
    "gap.tsv": (
        "/root\na.flac\t100\n\nb.flac\t3\n",
        "{path}, line 3: the line is empty; delete it, here and in the label files.",
    ),
    "frames.tsv": (
        "/root\na.flac\t1.5\n",
        "{path}, line 2: the number of samples is '1.5', expected a whole number greater than 0; correct or "
        "delete the line.",
    ),
    "many_frames.tsv": (
        "/root\na.flac\t" + "9" * 5000 + "\n",
        "{path}, line 2: the number of samples is '" + "9" * 39 + "..." + "9" * 9 + "', expected a whole number "
        "greater than 0; correct or delete the line.",
    ),
    "semicolons.csv": (
        "ID;duration;wav\nx;1;a.wav\n",
        "{path}, line 1: the columns are separated by semicolons, expected commas; save the table with commas.",
    ),
    "tabs.csv": (
        "id\taudio\tduration\nx\ta.wav\t1\n",
        "{path}, line 1: the columns are separated by tabs, expected commas; save the table with commas, or name it "
        ".tsv.",
    ),
    "long_whole.jsonl": (
        '{"ID": "x", "duration": 1' + "0" * 400 + ', "wav": "a.wav"}\n',
        "{path}, line 1: the duration is 1" + "0" * 39 + "..." + "0" * 10 + ", expected seconds greater than 0; "
        "correct or delete the row, or prepare the manifest again.",
    ),
    "long_text.csv": (
        "ID,duration,wav\nx," + "9" * 5000 + ",a.wav\n",
        "{path}, line 2: the duration is '" + "9" * 39 + "..." + "9" * 9 + "', expected seconds greater than 0; "
        "correct or delete the row, or prepare the manifest again.",
    ),
    "digits.jsonl": (
        '{"ID": "x", "duration": ' + "9" * 5000 + ', "wav": "a.wav"}\n',
        "{path}, line 1: a number has too many digits; correct the line.",
    ),
    "digits.json": (
        '{"x": {"duration": ' + "9" * 5000 + "}}",
        "{path}: a number has too many digits; correct the file.",
    ),
    "surrogate_name.jsonl": (
        '{"ID": "x", "duration": 1, "wav": "a.wav", "\\ud800": "b"}\n',
        "{path}: the column name '\\ud800' is not valid Unicode text; rename the column.",
    ),
    "deep.jsonl": (
        '{"ID": "x", "duration": 1, "wav": ' + "[" * 200000 + "]" * 200000 + "}\n",
        "{path}, line 1: lists or objects are nested too deeply; correct the line.",
    ),
    "deep.json": (
        '{"x": ' + "[" * 200000 + "]" * 200000 + "}",
        "{path}: lists or objects are nested too deeply; correct the file.",
    ),
    "surrogate_id.jsonl": (
        '{"ID": "\\ud800", "duration": 1, "wav": "a.wav"}\n',
        "{path}, line 1: the column ID is not valid Unicode text; correct the row.",
    ),
    "null_id.jsonl": (
        '{"ID": null, "duration": 1, "wav": "a.wav"}\n',
        "{path}, line 1: the ID is empty; give each utterance its own.",
    ),
    "table.xlsx": ("", "{path} is of no known kind of manifest; name it .csv, .json, .jsonl, .tsv by its content."),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_manifests_are_told_in_one_sentence(tmp_path, name):
    content, sentence = BAD[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert str(caught.value) == sentence.format(path=path)


def test_whole_numbers_from_0_are_ids(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        "".join(json.dumps({"ID": number, "duration": 1, "wav": "a.wav"}) + "\n" for number in range(3))
    )
    assert list(read_manifest(tmp_path / "m.jsonl").ids) == ["0", "1", "2"]
    rows = [{"ID": number, "duration": 1, "wav": "a.wav"} for number in range(2)]
    assert list(Manifest.from_rows(rows).ids) == ["0", "1"]


@pytest.mark.parametrize("depth", [400, 900, 990, 3000, 9000])
def test_any_depth_is_read_or_told(tmp_path, depth):
    """Whichever of reading and writing JSON gives up first."""
    row = '{"ID": "x", "duration": 1, "wav": "a.wav", "more": ' + "[" * depth + "]" * depth + "}"
    (tmp_path / "m.jsonl").write_text(row + "\n")
    try:
        assert len(read_manifest(tmp_path / "m.jsonl")) == 1
    except ManifestError as error:
        assert "nested too deeply" in str(error)


def test_missing_manifest_and_folder(tmp_path):
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / "no.csv")
    assert str(caught.value) == (
        f"the manifest {tmp_path / 'no.csv'} does not exist; check the path, or prepare the data first."
    )
    with pytest.raises(ManifestError, match=r"is a folder; check the path, or prepare the data first\.$"):
        read_manifest(tmp_path)


def test_labels_must_belong_line_by_line(tmp_path):
    (tmp_path / "a.tsv").write_text("/root\na.flac\t100\nb.flac\t100\n")
    (tmp_path / "a.ltr").write_text("A |\n")
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path / "a.tsv")
    assert str(caught.value) == (
        f"{tmp_path / 'a.ltr'} has 1 lines and {tmp_path / 'a.tsv'} has 2 utterances; they must belong together "
        "line by line."
    )


def test_duplicates_are_found_among_many():
    rows = [{"ID": f"u{index}", "duration": 1, "wav": "/a"} for index in range(1000)]
    Manifest.from_rows(rows)
    rows[777]["ID"] = "u3"
    rows[900]["ID"] = "u2"
    with pytest.raises(ManifestError) as caught:
        Manifest.from_rows(rows, source="rows")
    assert str(caught.value) == "rows, row 777: the ID 'u3' stands already in row 3; IDs must be unique."


def test_several_manifests(tmp_path):
    manifest = expected(tmp_path)
    write_manifest(tmp_path / "a.csv", manifest.select([0, 1]))
    write_manifest(tmp_path / "b.jsonl", [manifest.row(2) | {"spk_id": "3"}])
    both = read_manifests([tmp_path / "a.csv", tmp_path / "b.jsonl"])
    assert both == manifest
    with pytest.raises(ManifestError) as caught:
        read_manifests([tmp_path / "a.csv", tmp_path / "a.csv"])
    assert str(caught.value) == (
        f"{tmp_path / 'a.csv'} + {tmp_path / 'a.csv'}: the ID '1-2-0001' stands in two manifests; IDs must be unique."
    )
    with pytest.raises(ManifestError, match=r"^there are no manifests to read; give at least one\.$"):
        read_manifests([])


def test_filter_counts_and_keeps_both_limits():
    manifest = Manifest.from_rows([{"ID": str(d), "duration": d, "wav": "/a"} for d in (0.5, 1, 2, 3, 4)])
    kept, report = manifest.filter(min_duration=1, max_duration=3)
    assert list(kept.ids) == ["1", "2", "3"]
    assert (report.kept, report.too_short, report.too_long) == (3, 1, 1)
    assert str(report) == "kept 3 of 5 utterances (0.00 h); dropped 1 too short and 1 too long (0.00 h)"
    assert kept.hours == pytest.approx(6 / 3600)
    with pytest.raises(ManifestError) as caught:
        manifest.filter(min_duration=10)
    assert str(caught.value) == (
        "the rows: no utterance lasts 10 to any number of seconds (they last 0.50 to 4.00); "
        "change min_duration or max_duration."
    )


def test_select_keeps_order_and_text():
    rows = [{"ID": f"u{i}", "duration": 1 + i, "wav": f"/{i}", "wrd": "é" * (i % 7)} for i in range(20000)]
    manifest = Manifest.from_rows(rows)
    picked = np.random.Generator(np.random.PCG64(0)).permutation(20000)[:15000]
    chosen = manifest.select(picked)
    assert [chosen.row(index) for index in range(15000)] == [manifest.row(index) for index in picked]
    with pytest.raises(ManifestError) as caught:
        manifest.select([])
    assert str(caught.value) == "the rows: none of the 20,000 utterances is selected; widen the limits."


def test_fingerprint_sees_content_and_order_but_not_folders(tmp_path):
    manifest = expected(tmp_path)
    seen = {manifest.fingerprint()}
    for row, key, value in ((0, "wrd", "OTHER"), (1, "duration", 1.5), (2, "ID", "z")):
        rows = [manifest.row(index) for index in range(3)]
        rows[row][key] = value
        seen.add(Manifest.from_rows(rows).fingerprint())
    seen.add(manifest.select([1, 0, 2]).fingerprint())
    # Text moved over the border of two rows is another text.
    for first, second in (("ab", "c"), ("a", "bc")):
        rows = [{"ID": name, "duration": 1, "wav": "/"} for name in (first, second)]
        seen.add(Manifest.from_rows(rows).fingerprint())
    assert len(seen) == 7
    assert expected(tmp_path / "elsewhere").fingerprint() == manifest.fingerprint()


def test_unknown_column_and_kind(tmp_path):
    manifest = expected(tmp_path)
    with pytest.raises(ManifestError) as caught:
        manifest.column("speaker")
    assert str(caught.value) == (
        "the rows has no column 'speaker'; it has ID, duration, wav, wrd: add the column, or correct its name in the "
        "header."
    )
    with pytest.raises(ManifestError) as caught:
        write_manifest(tmp_path / "a.txt", manifest)
    assert str(caught.value) == (
        f"{tmp_path / 'a.txt'} is of no known kind of manifest; name it .csv, .json, .jsonl, .tsv."
    )
    with pytest.raises(ManifestError) as caught:
        write_manifest(tmp_path / "a.tsv", manifest, data_root=tmp_path / "b")
    assert str(caught.value) == (
        f"{tmp_path / 'a.tsv'} cannot name {tmp_path / 'a/1-2-0001.flac'}, which is not under its root "
        f"{tmp_path / 'b'}; "
        "give another data_root."
    )


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_manifest(tmp_path / "a.jsonl", expected(tmp_path))
    before = path.read_bytes()

    class Failing(Manifest):
        def row(self, index):
            if index == 1:
                raise OSError("disk full")
            return super().row(index)

    good = expected(tmp_path)
    bad = Failing(good.ids, good.durations, {name: good.column(name) for name in ("wav", "wrd")})
    with pytest.raises(OSError, match="disk full"):
        write_manifest(path, bad)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_memory_of_many_rows(tmp_path):
    """A fortieth of LibriSpeech 960 h: rows cost their text and little else, while reading and afterwards."""
    count = 281_241 // 40
    with open(tmp_path / "m.csv", "w") as file:
        file.write("ID,duration,wav,spk_id,wrd\n")
        for index in range(count):
            text = "SOME WORDS OF A TRANSCRIPT " * 7
            path = f"/data/LibriSpeech/train/{index:06d}.flac"
            file.write(f"{index:06d}-0000,{10 + index % 7},{path},{index % 2338},{text}\n")
    tracemalloc.start()
    manifest = read_manifest(tmp_path / "m.csv")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(manifest) == count
    assert manifest.nbytes * 40 < 110e6
    assert held * 40 < 120e6
    assert peak * 40 < 200e6
