"""The command line and the run options."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

from toolkit.errors import ConfigError
from toolkit.training.options import IGNORED, RETIRED, RunOptions, options_help, parse_arguments
from toolkit.training.values import CommandLineText, WrongType, coerce, did_you_mean, nearest, parse_value


def test_both_spellings_and_nested_names():
    file, options, overrides = parse_arguments(
        ["train.yaml", "--lr", "1e-4", "--encoder.num_layers=4", "--device=cpu", "--max_updates", "100"]
    )
    assert file == Path("train.yaml")
    assert options == {"device": "cpu", "max_updates": 100}
    assert overrides == {"lr": "1e-4", "encoder.num_layers": "4"}


def test_equals_signs_and_colons_inside_a_value_survive():
    overrides = parse_arguments(["x.yaml", "--url=http://a?b=c:d", "--other", "k=v: w"]).overrides
    assert overrides == {"url": "http://a?b=c:d", "other": "k=v: w"}


def test_flags_and_negative_values():
    arguments = parse_arguments(["--debug", "x.yaml", "--test_only", "False", "--shift", "-1", "--plain"])
    assert arguments.hparams_file == Path("x.yaml")
    assert arguments.options == {"debug": True, "test_only": False}
    assert arguments.overrides == {"shift": "-1", "plain": True}


def test_what_stands_behind_a_flag(tmp_path):
    """The YAML file, under any name that is one; else it was meant as a value."""
    (tmp_path / "settings").touch()
    for file in ("gone.yaml", "gone.YML", str(tmp_path / "settings")):
        arguments = parse_arguments(["--debug", file, "--tensorboard"])
        assert arguments.hparams_file == Path(file) and arguments.options == {"debug": True, "tensorboard": True}
    with pytest.raises(ConfigError, match=r"^--async_save must be True or False, but is the text 'maybe'\.$"):
        parse_arguments(["x.yaml", "--async_save", "maybe"])


def test_the_last_of_a_repeated_name_counts():
    assert parse_arguments(["x.yaml", "--lr", "1", "--lr", "2"]).overrides == {"lr": "2"}


@pytest.mark.parametrize("words", [["--local-rank=3"], ["--local_rank", "3"], ["--local-rank", "3"]])
def test_launchers_local_rank_is_an_option(words):
    assert parse_arguments(["x.yaml", *words]).options == {"local_rank": 3}


@pytest.mark.parametrize("flag", IGNORED)
def test_flags_of_other_toolkits_are_accepted(flag):
    arguments = parse_arguments([f"--{flag}", "x.yaml"])
    assert (arguments.options, arguments.overrides, arguments.hparams_file) == ({}, {}, Path("x.yaml"))


def test_help_is_asked_for():
    assert parse_arguments(["x.yaml", "--help"]).help
    assert parse_arguments(["-h"]) .hparams_file is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a.yaml", "b.yaml"], "the command line has 'b.yaml' after the YAML file 'a.yaml'; write values as "
         "--key value."),
        (["-lr", "3"], "the command line has '-lr', but names begin with two dashes: --key value."),
        (["--=3"], "the command line has '--=3', where a name is missing: write --key value."),
        (["--max_updates", "many"], "--max_updates must be a whole number or null, but is the text 'many'."),
        (["--max_minutes", ".inf"], "--max_minutes must be a finite number, but is inf; write another value."),
        (["--max_grad_norm", ".nan"], "--max_grad_norm must be a finite number, but is nan; write another value."),
        (["--max_updates", "2.5"], "--max_updates must be a whole number or null, but is 2.5."),
        (["--precision", "fp8"], "--precision must be one of auto, fp32, bf16, fp16, but is the text 'fp8'."),
        (["--debug=yes"], "--debug must be True or False, but is the text 'yes' (write True or False)."),
        (["--device"], "--device must be text, but is True."),
    ],
)
def test_wrong_command_lines_in_words(words, sentence):
    with pytest.raises(ConfigError) as caught:
        parse_arguments(words)
    assert str(caught.value) == sentence


def test_options_are_typed():
    options = parse_arguments(["--max_updates", "1e5", "--max_grad_norm", "null", "--max_minutes", "3"]).options
    assert options == {"max_updates": 100000, "max_grad_norm": None, "max_minutes": 3.0}
    assert isinstance(options["max_updates"], int) and isinstance(options["max_minutes"], float)


def test_command_line_wins_over_yaml_over_default():
    options = RunOptions.from_values({"seed": 7, "log_interval": 3, "lr": 1.0}, {"seed": 8})
    assert (options.seed, options.log_interval, options.keep_last) == (8, 3, 2)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_grad_norm": 0}, "--max_grad_norm must be above 0, but is 0.0; write null to switch it off."),
        ({"max_grad_norm": -1}, "--max_grad_norm must be above 0, but is -1.0; write null to switch it off."),
        ({"max_grad_norm": float("nan")}, "--max_grad_norm must be a finite number, but is nan; write another value."),
        ({"keep_last": 0}, "--keep_last must be 1 or more, but is 0."),
        ({"max_bad_share": 2}, "--max_bad_share is a share between 0 and 1, but is 2.0."),
        ({"max_updates": "None"}, "--max_updates must be a whole number or null, but is the text 'None' "
         "(YAML writes null for nothing; None is text there)."),
    ],
)
def test_values_outside_their_range(values, sentence):
    with pytest.raises(ConfigError) as caught:
        RunOptions.from_values(values)
    assert str(caught.value) == sentence


def test_every_option_has_help_a_type_and_a_fitting_default():
    hints = typing.get_type_hints(RunOptions)
    for name, default, words in options_help():
        assert words.endswith("."), name
        assert coerce(default, hints[name]) == default, name
    assert [item.name for item in dataclasses.fields(RunOptions)] == [name for name, _, _ in options_help()]
    assert not set(RETIRED) & set(hints)


def test_the_list_of_options_is_a_decision():
    """Changing the command line is a decision: change this list with it, and the README."""
    assert [name for name, _, _ in options_help()] == (
        "device precision seed max_updates max_minutes num_workers compile compile_blocks compile_backend "
        "compile_mode threads fast_allocator fast_products max_grad_norm nonfinite_patience max_bad_share log_interval "
        "valid_interval_updates ckpt_interval_minutes ckpt_interval_updates async_save keep_last keep_best debug "
        "debug_updates debug_batches test_only noprogressbar tensorboard profile parallel distributed_backend "
        "distributed_timeout_minutes local_rank"
    ).split()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-3", -3), ("010", 10), ("1e-4", 1e-4), (".5", 0.5), ("1.", 1.0), (".inf", float("inf")),
        ("true", True), ("False", False), ("yes", "yes"), ("None", None), ("null", None), ("~", None),
        ("a: b", "a: b"), ("a=b", "a=b"), ("1:30", "1:30"), ("!apply:os.system [ls]", "!apply:os.system [ls]"),
        ("[1, two, None]", [1, "two", None]), ("{a: 1}", {"a": 1}), ("(1, 2)", (1, 2)), ("'5'", "5"),
        ("10m", "10m"), ("1_000", 1000), ("<x>", "<x>"),
    ],
)  # fmt: skip
def test_values_are_typed_like_yaml(text, value):
    typed = parse_value(text)
    assert typed == value and type(typed) is type(value)


def test_a_tag_inside_a_list_is_refused_not_run(tmp_path):
    with pytest.raises(WrongType, match="cannot be read"):
        parse_value(f"[!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']]")
    assert not (tmp_path / "made").exists()


def test_text_keeps_its_digits_where_text_is_expected():
    assert coerce(CommandLineText("0012"), str) == "0012"
    assert coerce(CommandLineText("null"), str | None) is None
    assert coerce(CommandLineText("3"), int | str) == 3


@pytest.mark.parametrize(
    ("value", "annotation"),
    [(True, int), (2.5, int), ("3", int), (None, float), ([1], str), ("a", list), (1, bool), ({"a": 1}, list)],
)
def test_values_that_do_not_fit(value, annotation):
    with pytest.raises(WrongType):
        coerce(value, annotation)


def test_nothing_is_checked_against_types_that_are_not_plain():
    assert coerce("x", Path | complex) == "x"
    assert coerce(3, typing.Any) == 3


def test_nearest_names():
    assert nearest("num_layer", ["num_layers", "lr"]) == "num_layers"
    assert nearest("layers", ["encoder.layers", "lr"]) == "encoder.layers"
    assert nearest("qqq", ["num_layers", "lr"]) is None
    assert did_you_mean("qqq", ["b", "a"]) == "known: a, b"
