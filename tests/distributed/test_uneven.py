"""Ranks that have less to do than others, or nothing: nobody waits for ever, and nothing is lost."""

from __future__ import annotations

import json

import pytest

from tests.distributed.matrix import Kind, largest_difference, largest_relative_difference, run
from tests.faults.real_runs import TEMPLATE, digits, digits_words, write_rows

LAYERDROP = {"encoder_training.layerdrop": 0.3, "encoder_training.dropout": 0.1}
ONE_A_BATCH = {"batch_seconds": 0.9, "max_bad_share": 1.0, "valid_interval_updates": 2, **LAYERDROP}
"""Digits last 0.3 to 0.8 s."""


@pytest.mark.parametrize(("parallel", "processes"), [("ddp", 4), ("fsdp2", 4)])
def test_fewer_utterances_than_ranks(tmp_path, parallel, processes):
    """Three to train on and one to validate on, for four ranks."""
    train = write_rows(tmp_path / "train.csv", digits()[:3])
    valid = write_rows(tmp_path / "valid.csv", digits()[3:4])
    kind = Kind(TEMPLATE, digits_words, train_manifest=train, valid_manifest=valid, test_manifest=valid,
                effective_batch=3.6, evaluate="last", **ONE_A_BATCH)  # fmt: skip
    run(kind, tmp_path / "one")
    run(kind, tmp_path / "many", processes=processes, parallel=parallel)
    weights, tensor = largest_difference(tmp_path / "many", tmp_path / "one")
    assert weights <= 1e-6, tensor
    assert largest_relative_difference(tmp_path / "many", tmp_path / "one") <= 1e-5
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("many", "one")]
    assert summaries[0]["test_loss"] == pytest.approx(summaries[1]["test_loss"], rel=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_micro_batches_of_one_rank_that_cannot_be_read(tmp_path, parallel):
    """Every other utterance is no audio: now one rank has a batch, now the other, now none."""
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"this is no audio")

    def spoil(rows):
        del rows[8:]
        for row in rows[::2]:
            row["wav"] = str(broken)

    train = write_rows(tmp_path / "train.csv", digits(spoil))
    kind = Kind(TEMPLATE, digits_words, train_manifest=train, effective_batch=1.8, evaluate="last", **ONE_A_BATCH)
    run(kind, tmp_path / "one")
    ended = run(kind, tmp_path / "two", processes=2, parallel=parallel)
    assert "left out" in ended.stderr
    weights, tensor = largest_difference(tmp_path / "two", tmp_path / "one")
    assert weights <= 1e-6, tensor
    assert largest_relative_difference(tmp_path / "two", tmp_path / "one") <= 1e-5
