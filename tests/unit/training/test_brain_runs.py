"""The Brain in real processes: whole runs, interruptions, several ranks."""

import json

import numpy as np
import pytest

TIMES = {"throughput", "loader_wait_share", "elapsed_seconds"}


def rows_of(folder, stage=None):
    """The rows of metrics.jsonl without what the clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if stage is None or row["stage"] == stage]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def uninterrupted(run_tiny, whole):
    """One run from beginning to end, made once."""
    if not (whole / "summary.json").exists():
        run_tiny(whole)
    return whole


def same_bits(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name


def test_a_run_leaves_what_the_readme_promises(uninterrupted, weights):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    wanted = "updates epochs wall_seconds throughput peak_memory_gb device precision best final"
    assert set(wanted.split()) <= summary.keys()
    assert summary["updates"] == 14 and summary["epochs"] == 3.5 and summary["precision"] == "fp32"
    assert summary["throughput"]["unit"] == "audio seconds per second" and summary["throughput"]["value"] > 0
    assert summary["best"]["loss"] == min(row["loss"] for row in rows_of(uninterrupted, "valid"))
    assert summary["test_loss"] == summary["tests"]["held-out"]["loss"] == summary["final"]["valid"]["loss"]
    hypotheses = [json.loads(line) for line in (uninterrupted / "test_hypotheses.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in hypotheses) == [f"noise{index:02d}" for index in range(7)]
    assert [row["update"] for row in rows_of(uninterrupted, "train")] == [3, 6, 9, 12, 14]
    assert [row["update"] for row in rows_of(uninterrupted, "valid")] == [5, 10, 14]
    losses = [row["loss"] for row in rows_of(uninterrupted, "train")]
    assert losses[-1] < 0.2 * losses[0]
    left = {path.name for path in uninterrupted.iterdir()}
    assert {"hyperparams.yaml", "env.log", "log.txt", "tiny_recipe.py"} <= left


def test_a_run_stopped_and_killed_again_and_again_ends_with_the_same_bits(uninterrupted, run_tiny, weights, tmp_path):
    stopped = run_tiny(tmp_path, stop_after=3, stop_signal="SIGTERM", num_workers=2, check=75)
    assert "told to stop: saved at update 3; run the same command again to go on." in stopped.stderr
    # The kill comes 3 updates after the last checkpoint, at 4; rows of the log behind it come again, once.
    run_tiny(tmp_path, stop_after=7, stop_signal="SIGKILL", check=-9)
    run_tiny(tmp_path, stop_after=9, stop_signal="SIGTERM", num_workers=2, check=75)
    resumed = run_tiny(tmp_path, num_workers=2)
    assert "resumed at update 9 (epoch 2.25)." in resumed.stderr
    same_bits(weights(tmp_path), weights(uninterrupted))
    assert rows_of(tmp_path) == rows_of(uninterrupted)


def test_a_validation_that_a_stop_put_off_is_made_up_for(uninterrupted, run_tiny, weights, tmp_path):
    # In the last micro-batch of the tenth update: too late to give it up, and the validation would take long.
    run_tiny(tmp_path, stop_in="[9, 3]", check=75)
    assert [row["update"] for row in rows_of(tmp_path, "valid")] == [5]
    run_tiny(tmp_path)
    assert rows_of(tmp_path) == rows_of(uninterrupted)
    same_bits(weights(tmp_path), weights(uninterrupted))


def test_two_processes_equal_one_with_twice_the_accumulation(uninterrupted, run_tiny, weights, tmp_path):
    # The main process alone is told to stop; the other learns it in the update that both are making then.
    run_tiny(tmp_path, processes=2, stop_after=6, check=1)
    assert (tmp_path / "save" / "step_00000007").exists()
    done = run_tiny(tmp_path, processes=2)
    assert "2 processes" in done.stderr and "resumed at update 7" in done.stderr
    expected, found = weights(uninterrupted), weights(tmp_path)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)
    for ours, theirs in zip(rows_of(tmp_path), rows_of(uninterrupted), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    hypotheses = (tmp_path / "test_hypotheses.jsonl").read_text()
    assert hypotheses == (uninterrupted / "test_hypotheses.jsonl").read_text()


def test_updates_that_are_not_finite_end_the_run_with_a_report(run_tiny, tmp_path):
    done = run_tiny(tmp_path, nonfinite_updates="[2, 3, 4]", check=2)
    assert "update 2: the loss is not finite with the utterances noise" in done.stderr
    assert "(1 in a row, the run ends after 3)." in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: update 4: the loss is not finite") and "the 3rd such update in a row" in last
    report = json.loads((tmp_path / "crash_report.json").read_text())
    assert [fault["update"] for fault in report["updates"]] == [2, 3, 4] and report["in_a_row"] == 3
    assert all(fault["utterances"] for fault in report["updates"])
    assert report["options"]["nonfinite_patience"] == 3


def test_debug_covers_everything_and_leaves_no_trace_in_a_real_run(uninterrupted, run_tiny, weights, tmp_path):
    done = run_tiny(tmp_path, debug=True)
    assert "debug run complete" in done.stderr and "resumed at update 2" in done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["updates"] == 4
    run_tiny(tmp_path)
    same_bits(weights(tmp_path), weights(uninterrupted))
    assert rows_of(tmp_path) == rows_of(uninterrupted)
    refused = run_tiny(tmp_path, debug=True, check=2)
    assert "holds a run, which --debug would overwrite" in refused.stderr


def test_a_finished_run_trains_no_more_and_can_be_evaluated(uninterrupted, run_tiny, tmp_path):
    again = run_tiny(uninterrupted)
    assert "training is complete at update 14" in again.stderr
    before = json.loads((uninterrupted / "summary.json").read_text())
    evaluated = run_tiny(uninterrupted, test_only=True, evaluate="average")
    assert "the average of 2 checkpoints" in evaluated.stderr
    after = json.loads((uninterrupted / "summary.json").read_text())
    assert after["updates"] == 14 and after["test_loss"] != before["test_loss"]
    nothing = run_tiny(tmp_path, test_only=True, check=2)
    assert "there is nothing to evaluate" in nothing.stderr


def test_a_run_with_a_time_limit_finishes_its_schedule(run_tiny, tmp_path):
    run_tiny(tmp_path, max_updates="null", max_minutes=0.02)
    last = rows_of(tmp_path, "train")[-1]
    assert last["update"] == last["total_updates"] > 1
    again = run_tiny(tmp_path, max_updates="null", max_minutes=0.02)
    assert "training is complete" in again.stderr
