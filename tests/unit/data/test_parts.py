"""A corpus in its three parts."""

import numpy as np
import pytest

from toolkit.data.manifest import Manifest, write_manifest
from toolkit.data.parts import hold_out, read_parts
from toolkit.errors import ConfigError

ROWS = [{"ID": f"u{n}", "duration": 1.0 + n, "wav": f"/{n}.wav", "wrd": "A" if n else ""} for n in range(20)]


def settings(folder, **changes):
    path = folder / "all.csv"
    write_manifest(path, ROWS)
    values = {"train_splits": [path], "valid_splits": [None], "test_splits": [None], "valid_share": 0.2, "seed": 1,
              "data_folder": None, "audio_folder": None, "min_duration": 2.0, "max_duration": 18.0}  # fmt: skip
    return values | changes


def test_a_share_is_held_out_and_the_limits_are_of_training_only(tmp_path):
    said = []
    train, valid, test = read_parts(settings(tmp_path), say=said.append, texts=True)
    assert len(valid) == 4 and test is None
    left = {row["ID"] for row in ROWS} - set(valid.ids)
    assert set(train.ids) == {name for name in left if name not in ("u0", "u18", "u19")}
    assert "1 of 20 utterances has an empty transcript (u0)" in said[0] and said[0].startswith("warning: ")
    assert f"kept {len(train)} of 16 utterances" in said[1] and said[1].endswith("validation: 4 utterances")


def test_given_parts_are_taken_as_they_are(tmp_path):
    said = []
    values = settings(tmp_path)
    values |= {"valid_splits": values["train_splits"], "test_splits": values["train_splits"]}
    train, valid, test = read_parts(values, say=said.append, texts=False)
    assert (len(train), len(valid), len(test), len(said)) == (17, 20, 20, 1)


def test_the_share_is_a_function_of_the_seed():
    manifest = Manifest.from_rows(ROWS)
    (train, held), (_, again), (_, other) = (hold_out(manifest, 0.25, seed=seed) for seed in (1, 1, 2))
    assert list(held.ids) == list(again.ids) != list(other.ids)
    assert sorted([*train.ids, *held.ids]) == sorted(manifest.ids) and np.all(np.diff(held.durations) > 0)
    train, held = hold_out(manifest, 0.001, seed=1)
    assert (len(train), len(held)) == (19, 1)


def test_nothing_to_hold_out():
    with pytest.raises(ConfigError, match=r"valid_share is 1\.5; expected a share above 0 and below 1"):
        hold_out(Manifest.from_rows(ROWS), 1.5, seed=1)
    with pytest.raises(ConfigError, match="has one utterance, too few to hold some out; give --valid_manifest"):
        hold_out(Manifest.from_rows(ROWS[:1]), 0.5, seed=1)
