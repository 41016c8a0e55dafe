"""Dynamic items: what is asked for is computed, once, in order, and wrong wiring is told before work starts."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import soundfile

from toolkit.data.audio import normalize_waveform, read_audio
from toolkit.data.dataset import (
    DynamicItemDataset,
    ItemContext,
    add_dynamic_item,
    provides,
    set_output_keys,
    speech_items,
    takes,
    text_items,
)
from toolkit.data.manifest import Manifest, write_manifest
from toolkit.data.tokens import LetterTokenizer
from toolkit.errors import AudioError, ConfigError, ManifestError, TokenError

ROWS = [
    {
        "ID": f"u{index}",
        "duration": index + 1.0,
        "wav": f"/a/{index}.wav",
        "wrd": "ab " * (index + 1),
        "level": str(9 - index),
    }
    for index in range(5)
]


def manifest() -> Manifest:
    return Manifest.from_rows(ROWS)


def test_items_run_once_in_order_and_only_when_needed():
    calls = []

    @takes("wrd")
    @provides("words", "count")
    def words(wrd):
        calls.append("words")
        found = wrd.split()
        yield found
        yield len(found)

    @provides("twice", "thrice")
    @takes("count", "duration")
    def more(count, duration):
        calls.append("more")
        return 2 * count, 3 * duration

    @takes("id")
    @provides("unused")
    def unused(identity):
        raise AssertionError("not asked for")

    dataset = DynamicItemDataset(manifest(), [more, unused, words], ["id", "words", "twice", "thrice", "level"])
    assert dataset[2] == {"id": "u2", "words": ["ab"] * 3, "twice": 6, "thrice": 9.0, "level": "7"}
    assert calls == ["words", "more"]
    dataset.set_output_keys({"name": "ID", "n": "count"})
    assert dataset[0] == {"name": "u0", "n": 1}
    assert more(1, 2) == (2, 6)


def test_speechbrain_calls(tmp_path):
    path = write_manifest(tmp_path / "m.csv", manifest())
    other = write_manifest(tmp_path / "m.json", manifest())
    datasets = [DynamicItemDataset.from_csv(path), DynamicItemDataset.from_json(other)]
    add_dynamic_item(datasets, str.upper, takes="wrd", provides="loud")
    set_output_keys(datasets, ["id", "loud"])
    for dataset in datasets:
        assert dataset[0] == {"id": "u0", "loud": "AB "}
        assert len(dataset) == 5


def test_context_holds_place_and_randomness():
    @takes("context")
    @provides("seen")
    def seen(context):
        return context, float(context.rng("noise").random())

    dataset = DynamicItemDataset(manifest(), [seen], ["seen"])
    context, number = dataset.load(3, epoch=2, crop_samples=100, seed=7)["seen"]
    assert context == ItemContext(row=3, id="u3", epoch=2, seed=7, crop_samples=100)
    assert dataset.load(3, epoch=2, seed=7)["seen"][1] == number
    places = ((2, 2, 7), (3, 1, 7), (3, 2, 8))
    others = [dataset.load(row, epoch=epoch, seed=seed)["seen"][1] for row, epoch, seed in places]
    assert number not in others


def wiring(items, keys):
    with pytest.raises(ConfigError) as caught:
        DynamicItemDataset(manifest(), items, keys)
    return str(caught.value)


def test_wrong_wiring():
    @takes("c")
    @provides("b")
    def make_b(c): ...

    @takes("b")
    @provides("c")
    def make_c(b): ...

    @takes("nothing")
    @provides("d")
    def make_d(nothing): ...

    @takes("wrd")
    @provides("level")
    def make_level(wrd): ...

    @takes("wrd")
    def silent(wrd): ...

    here = "test_wrong_wiring.<locals>."
    assert wiring([make_b, make_c], ["b"]) == "dynamic items need each other in a circle: b -> c -> b; break it."
    known = "ID, context, d, duration, id, level, wav, wrd"
    assert wiring([make_d], ["d"]) == f"{here}make_d takes 'nothing', which nothing provides; known are {known}."
    assert wiring([], ["d"]) == (
        "the output keys name 'd', which nothing provides; known are ID, context, duration, id, level, wav, wrd."
    )
    assert wiring([make_b, make_b], ["id"]) == (
        f"'b' is provided twice, by {here}make_b and by {here}make_b; rename one."
    )
    assert wiring([make_level], ["id"]) == (
        f"{here}make_level provides 'level', which is a column of the rows already; choose another name."
    )
    advice = "does not say what it provides; decorate it with @takes(...) and @provides(...)."
    assert wiring([silent], ["id"]) == f"{here}silent {advice}"
    assert wiring([len], ["id"]) == f"len {advice}"


def test_wrong_number_of_values():
    @takes("wrd")
    @provides("a", "b")
    def pair(wrd):
        return wrd, wrd, wrd

    dataset = DynamicItemDataset(manifest(), [pair], ["a"])
    with pytest.raises(ConfigError) as caught:
        dataset[0]
    assert str(caught.value) == (
        "the dynamic item test_wrong_number_of_values.<locals>.pair gives 3 values, but provides 2 keys (a, b); "
        "make the two agree."
    )


def test_filtered_sorted():
    dataset = DynamicItemDataset(manifest(), output_keys=["id"])

    def ids(**options):
        chosen = dataset.filtered_sorted(**options)
        return [chosen[index]["id"] for index in range(len(chosen))]

    assert ids(key_min_value={"duration": 2}, key_max_value={"duration": 4}) == ["u1", "u2", "u3"]
    assert ids(sort_key="duration", reverse=True) == ["u4", "u3", "u2", "u1", "u0"]
    assert ids(sort_key="level") == ["u4", "u3", "u2", "u1", "u0"]
    assert ids(key_test={"wrd": lambda text: len(text.split()) % 2 == 0}) == ["u1", "u3"]
    assert ids(select_n=2) == ["u0", "u1"]
    assert ids(key_min_value={"level": 7}, sort_key="duration", reverse=True, select_n=2) == ["u1", "u0"]
    with pytest.raises(ManifestError) as caught:
        ids(key_min_value={"wrd": 1})
    assert str(caught.value).startswith("the rows: the column wrd is not of numbers (")


def test_waveforms(make_corpus):
    table = make_corpus(4, low=0.5, high=0.9)
    whole = DynamicItemDataset(table, speech_items(16000), ["waveform"])
    slow = DynamicItemDataset(table, speech_items(8000), ["waveform"])
    normal = DynamicItemDataset(table, speech_items(16000, normalize=True), ["waveform"])
    for row in range(4):
        path = table.row(row)["wav"]
        full = read_audio(path)
        assert np.array_equal(whole[row]["waveform"], full)
        assert len(slow[row]["waveform"]) == round(len(full) / 2)
        assert np.array_equal(normal[row]["waveform"], normalize_waveform(full))


def test_crops_are_keyed_by_seed_epoch_and_id(make_corpus):
    table = make_corpus(6, low=0.5, high=0.9)
    size = 4000
    for normalize in (False, True):
        dataset = DynamicItemDataset(table, speech_items(16000, normalize), ["waveform"])
        starts = {}
        for seed in (0, 1):
            for epoch in range(8):
                crop = dataset.load(2, epoch=epoch, crop_samples=size, seed=seed)["waveform"]
                assert crop.shape == (size,)
                full = dataset.load(2)["waveform"]
                heads = range(len(full) - size + 1)
                places = [start for start in heads if np.array_equal(full[start : start + 8], crop[:8])]
                assert len(places) == 1
                assert np.array_equal(full[places[0] : places[0] + size], crop)
                starts[seed, epoch] = places[0]
        assert len(set(starts.values())) > 12
        # The row is not part of the key: the same utterance in another manifest gives the same crop.
        moved = DynamicItemDataset(table.select([5, 2]), speech_items(16000, normalize), ["waveform"])
        again = moved.load(1, epoch=3, crop_samples=size, seed=1)["waveform"]
        assert np.array_equal(again, dataset.load(2, epoch=3, crop_samples=size, seed=1)["waveform"])


def test_crop_may_start_anywhere(make_corpus):
    """Both ends are reached: 3 samples more than the crop give 4 starts."""
    table = make_corpus(1, low=0.2, high=0.2)
    dataset = DynamicItemDataset(table, speech_items(16000), ["waveform"])
    full = dataset.load(0)["waveform"]
    crops = [dataset.load(0, epoch=epoch, crop_samples=len(full) - 3)["waveform"] for epoch in range(60)]
    assert {next(start for start in range(4) if crop[0] == full[start]) for crop in crops} == {0, 1, 2, 3}
    assert len(dataset.load(0, crop_samples=len(full) + 5)["waveform"]) == len(full)


def test_text_and_tokens():
    tokenizer = LetterTokenizer.from_texts(["AB"], case="upper")
    dataset = DynamicItemDataset(manifest(), text_items(tokenizer), ["text", "tokens"])
    item = dataset[1]
    assert item["text"] == "AB AB"
    assert item["tokens"].dtype == np.int64
    assert item["tokens"].tolist() == tokenizer.encode("AB AB")


def test_errors_name_the_utterance(tmp_path):
    items = speech_items(16000) + text_items(LetterTokenizer(["|", "a"]))
    dataset = DynamicItemDataset(manifest(), items, ["waveform"])
    with pytest.raises(AudioError) as caught:
        dataset[3]
    assert str(caught.value) == (
        "utterance u3: /a/3.wav does not exist; check the paths in the manifest and the data folder."
    )
    dataset.set_output_keys(["tokens"])
    with pytest.raises(TokenError) as caught:
        dataset[3]
    start = "utterance u3: the transcript 'ab ab ab ab ' holds the character 'b' (U+0062, LATIN SMALL LETTER B), "
    assert str(caught.value).startswith(start)


def test_manifest_of_another_length_is_found(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000, dtype=np.float32), 16000)
    for duration, fits in ((1.0, True), (1.11, True), (0.92, True), (1.2, False), (0.9, False), (0.4, False)):
        table = Manifest.from_rows([{"ID": "a", "duration": duration, "wav": str(tmp_path / "a.wav")}])
        dataset = DynamicItemDataset(table, speech_items(16000), ["waveform"])
        if fits:
            assert len(dataset[0]["waveform"]) == 16000
        else:
            with pytest.raises(AudioError) as caught:
                dataset[0]
            assert str(caught.value) == (
                f"utterance a: {tmp_path / 'a.wav'} lasts 1.00 s where the manifest says {duration:.2f} s; "
                "prepare the manifest again."
            )


@pytest.mark.parametrize(
    ("lasts", "duration", "fits"),
    [
        (0.30, 0.26, True),  # an MP3's frame in a short word
        (0.30, 0.36, False),  # an eighth of it missing, though less than half a second
        (3.03, 3.0, True),
        (3.0, 3.29, True),
        (3.0, 3.4, False),
        (30.0, 30.45, True),
        (30.0, 30.6, False),  # not a tenth of a long one
    ],
)
def test_tolerated_differences_from_the_manifest(tmp_path, lasts, duration, fits):
    soundfile.write(tmp_path / "a.wav", np.zeros(round(8000 * lasts), dtype=np.float32), 8000)
    table = Manifest.from_rows([{"ID": "a", "duration": duration, "wav": str(tmp_path / "a.wav")}])
    dataset = DynamicItemDataset(table, speech_items(8000), ["waveform"])
    if fits:
        assert len(dataset[0]["waveform"]) == round(8000 * lasts)
    else:
        with pytest.raises(AudioError, match="prepare the manifest again"):
            dataset[0]


@pytest.mark.parametrize("normalize", [False, True])
def test_a_crop_holds_no_padding_to_be_predicted(tmp_path, normalize):
    """Whoever crops passes no lengths: a file that cannot fill its crop is bad audio, but for a part of a frame."""
    soundfile.write(tmp_path / "a.wav", np.ones(16000, dtype=np.float32), 16000)
    table = Manifest.from_rows([{"ID": "a", "duration": 1.08, "wav": str(tmp_path / "a.wav")}])
    dataset = DynamicItemDataset(table, speech_items(16000, normalize), ["waveform"])
    assert len(dataset.load(0, crop_samples=16400)["waveform"]) == 16000
    assert len(dataset.load(0)["waveform"]) == 16000
    with pytest.raises(AudioError) as caught:
        dataset.load(0, crop_samples=17280)
    assert str(caught.value) == (
        f"utterance a: {tmp_path / 'a.wav'} lasts 1.000 s where the manifest says 1.080 s, too short for its crop of "
        "1.080 s; prepare the manifest again."
    )


@pytest.mark.parametrize("rate", [22050.5, 0, 16, 1e6, float("nan"), float("inf"), True, "fast"])
def test_sample_rate_is_a_whole_number_of_hertz(rate):
    with pytest.raises(ConfigError) as caught:
        speech_items(rate)
    assert str(caught.value) == (
        f"sample_rate is {rate!r}, expected a whole number of Hz from 1000 to 400000, as 16000."
    )


def test_dataset_can_be_sent_to_a_process(make_corpus):
    table = make_corpus(2)
    tokenizer = LetterTokenizer.from_texts(table.column("wrd"))
    dataset = DynamicItemDataset(table, speech_items(16000) + text_items(tokenizer), ["waveform", "tokens"])
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again[1]["waveform"], dataset[1]["waveform"])
    assert again[1]["tokens"].tolist() == dataset[1]["tokens"].tolist()
