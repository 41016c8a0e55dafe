"""Curves: what is read from metrics.jsonl, what is drawn, what the table says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from toolkit.curves import RunCurves, chosen_metrics, draw_picture, main, markdown_table, read_curves, running_mean
from toolkit.errors import ConfigError


def write_run(folder: Path, num_rows: int, scale: float = 1.0) -> Path:
    folder.mkdir()
    rows = [
        {"stage": "train", "update": 20 * k, "epoch": 0, "loss": scale * 5 / k, "grad_norm": 1.0, "lr": 1e-3}
        for k in range(1, num_rows + 1)
    ]
    rows += [{"stage": "valid", "update": 20 * num_rows, "loss": scale, "wer": 12.5, "by": {"a": 1}, "flag": True}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_series_hold_what_was_logged(tmp_path: Path) -> None:
    run = read_curves(write_run(tmp_path / "a", 5))
    updates, values = run.series["train", "loss"]
    assert updates.tolist() == [20, 40, 60, 80, 100]
    assert values.tolist() == pytest.approx([5, 2.5, 5 / 3, 1.25, 1])
    assert run.metrics == ("loss", "wer", "grad_norm", "lr")  # no bookkeeping, no nested values, no truth values
    assert run.stages == ("train", "valid") and run.name == "a"


def test_nothing_that_is_not_finite_and_the_later_row_of_an_update(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"update": 1, "loss": null}\n{"update": 2, "loss": NaN}\n{"update": 3, "loss": 9}\n{"update": 3, "loss": 4}\n'
        '{"update": 4, "lo'
    )
    updates, values = read_curves(file).series["train", "loss"]
    assert (updates.tolist(), values.tolist()) == ([3], [4.0])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "has no metrics.jsonl"),
        ("", "holds no numbers yet"),
        ('{"update": 1, "loss": 1}\nbroken\n{"update": 2, "loss": 1}\n', "line 2 is no JSON object"),
        ('{"step": 1, "loss": 1}\n', "line 1 has no whole number 'update'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_curves(tmp_path)


def test_an_unknown_metric_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run logged nothing; there is loss, wer, grad_norm, lr\."):
        chosen_metrics([read_curves(write_run(tmp_path / "a", 3))], ["nothing"])


def test_the_table_has_the_first_and_the_last_update(tmp_path: Path) -> None:
    run = read_curves(write_run(tmp_path / "a", 100))
    lines = markdown_table(run, "train", metrics=["loss", "lr"], num_rows=5).splitlines()
    assert lines[0] == "| update | loss | lr |"
    assert lines[2] == "| 20 | 5 | 0.001 |" and lines[-1] == "| 2000 | 0.05 | 0.001 |" and len(lines) == 7


def test_the_running_mean_keeps_a_straight_line() -> None:
    updates, means = running_mean(np.arange(1000), 3.0 * np.arange(1000))
    assert np.abs(means - 3.0 * updates).max() <= 3.0 and len(means) > 950  # at most half an update beside the line


def pixels(file: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(file)[..., :3]


def test_the_picture_shows_every_run_in_its_color(tmp_path: Path) -> None:
    runs = [read_curves(write_run(tmp_path / "a", 300)), read_curves(write_run(tmp_path / "b", 30, 2.0))]
    both = pixels(draw_picture(runs, tmp_path / "deep" / "both.png", references={"loss": 4.6}))
    one = pixels(draw_picture(runs[:1], tmp_path / "one.png"))
    orange = np.array([1.0, 0.498, 0.055])  # matplotlib's second color
    assert (np.abs(both - orange).max(-1) < 0.02).sum() > 200
    assert (np.abs(one - orange).max(-1) < 0.02).sum() == 0


def test_the_command_writes_picture_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_run(tmp_path / "a", 3), write_run(tmp_path / "b", 4)
    output = tmp_path / "curves.png"
    assert main([f"pretrained={first}", str(second), "--output", str(output), "--reference", "loss=4.6"]) == 0
    table = output.with_suffix(".md").read_text()
    assert "## pretrained: train" in table and "## b: valid" in table and "12.5" in table
    assert output.stat().st_size > 5000
    assert capsys.readouterr().out.split() == [str(output), str(output.with_suffix(".md"))]
    with pytest.raises(ConfigError, match="write METRIC=NUMBER"):
        main([str(first), "--reference", "loss"])


def test_a_file_that_is_no_text_and_a_picture_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\x80\x02binary\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is no text \(invalid start byte\); is this the metrics of"):
        read_curves(tmp_path)
    run = read_curves(write_run(tmp_path / "a", 5))
    with pytest.raises(ConfigError, match=r"c\.xyz cannot be drawn; end its name with one of \..*\.png"):
        draw_picture([run], tmp_path / "c.xyz")
    assert not (tmp_path / "c.xyz").exists()


def test_the_penalty_has_its_place_among_the_first() -> None:
    point = (np.array([1]), np.array([1.0]))
    run = RunCurves("a", {("train", name): point for name in ("wer", "a", "feature_penalty")})
    assert run.metrics == ("feature_penalty", "wer", "a")
