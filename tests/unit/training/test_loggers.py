"""What a run writes while it goes on."""

import io
import json
import sys

import pytest

from toolkit.errors import ConfigError
from toolkit.training.loggers import Console, JsonLinesLogger, Loggers, TensorBoardLogger, TextLogger, format_row


def test_rows_are_plain_json_and_go_back_with_a_resume(tmp_path):
    logger = JsonLinesLogger(tmp_path / "metrics.jsonl")
    for update in (10, 20, 30):
        logger.log({"stage": "train", "update": update, "loss": float("nan") if update == 20 else 1.0})
    # A kill in the middle of a line leaves half of it.
    with logger.path.open("a") as file:
        file.write('{"stage": "train", "upd')
    JsonLinesLogger(logger.path).rewind(20)
    rows = [json.loads(line) for line in logger.path.read_text().splitlines()]
    assert [row["update"] for row in rows] == [10, 20] and rows[1]["loss"] is None
    logger.log({"stage": "train", "update": 30, "loss": 1.0})
    assert logger.path.read_text().count("\n") == 3


def test_damaged_lines_are_dropped_with_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"stage": "train", "update": 10, "loss": 1.0}\n'
    path.write_bytes(b"\xff\xfe\x00 no text\n" + good + b'{"update": "ten"}\n[1]\n{"update": null}\n')
    JsonLinesLogger(path).rewind(20)
    assert path.read_bytes() == good


def test_without_a_terminal_the_console_writes_lines():
    stream = io.StringIO()
    console = Console(stream=stream)
    console.progress(1, 10)
    console.log({"stage": "train", "update": 5, "total_updates": 10, "loss": 2.0, "lr": 1e-5, "throughput": 50.0,
                 "padding_share": 0.2, "loader_wait_share": 0.0})  # fmt: skip
    console.say("a sentence")
    assert stream.getvalue() == "update 5/10: loss 2, lr 1.00e-05, 50 audio s/s, padding 20 %\na sentence\n"


def test_on_a_terminal_the_bar_shows_the_row_and_sentences_stay_readable():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    console = Console(stream=stream)
    console.progress(5, 10)
    console.log({"stage": "train", "update": 5, "loss": 2.0})
    console.say("a sentence")
    console.progress(10, 10)
    console.close()
    shown = stream.getvalue()
    assert "a sentence\n" in shown and "10/10" in shown and "loss 2" in shown


def test_all_loggers_hear_everything_and_other_ranks_nothing(tmp_path):
    stream = io.StringIO()
    text = TextLogger(tmp_path / "log.txt")
    loggers = Loggers([text], Console(stream=stream))
    loggers.say("hello")
    loggers.log({"stage": "valid", "update": 3, "wer": 10.0})
    loggers.close()
    assert stream.getvalue() == "hello\nvalid at update 3: wer 10\n"
    assert [line.split(" ", 2)[2] for line in text.path.read_text().splitlines()] == stream.getvalue().splitlines()
    Loggers().say("nobody hears this")


def test_tensorboard_gets_curves(tmp_path):

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    logger.log({"stage": "train", "update": 10, "loss": 2.5, "set": "words"})
    logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.5)]


def test_a_missing_package_names_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="not installed; run `pip install tensorboard` or leave it out"):
        TensorBoardLogger(tmp_path)


def test_a_row_names_what_counts():
    row = {"stage": "train", "update": 7, "total_updates": 9, "epoch": 0.5, "accuracy": 0.51234, "loss": 3.0}
    assert format_row(row) == "update 7/9: loss 3, accuracy 0.5123"
