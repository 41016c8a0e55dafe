"""`python -m toolkit devices`: the shape of what it prints; its figures are nobody's promise."""

from __future__ import annotations

import re

import pytest
import torch

from toolkit.__main__ import main
from toolkit.errors import DeviceError
from toolkit.training import device_report, devices
from toolkit.training.device_report import device_table, speed_lines
from toolkit.training.devices import DEVICE_KINDS, device_count, device_kind, resolve_device

ABSENT = [kind.name for kind in DEVICE_KINDS if not device_count(kind)[0]]


@pytest.fixture(autouse=True)
def settings_stay(monkeypatch):
    """The report makes the settings of a run; this process is to keep its own."""
    monkeypatch.setattr(devices, "_keep_memory", lambda: "Allocator: kept.")
    monkeypatch.setattr(devices, "_exact_fast_products", lambda: "Products: kept.")


def test_the_table_lists_every_kind():
    lines = device_table().splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == [kind.name for kind in DEVICE_KINDS]
    assert lines[1].split()[1] == "1" and lines[-1].startswith("auto means ")
    for name in ABSENT:
        line = next(line for line in lines if line.startswith(name))
        assert line.split()[1] == "no" and "needs " in line


def test_without_figures(capsys):
    assert main(["devices", "cpu", "--no_measurement"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu (") and lines[0].endswith("): the processor")
    assert lines[1].startswith("  Python 3.") and lines[1].endswith(f", torch {torch.__version__}")
    assert lines[2:] == ["  Allocator: kept.", "  Products: kept."]


def test_auto_is_the_device_that_a_run_would_take(capsys):
    expected = resolve_device("auto")
    assert main(["devices", "auto", "--no_measurement"]) == 0
    assert capsys.readouterr().out.startswith(f"{expected.name}: {expected.kind.title}\n")


def test_a_line_of_figures_for_each_format():
    lines = speed_lines(resolve_device("cpu"), seconds=0.001, largest=16, copied_bytes=4096)
    assert len(lines) == 2
    for line, name in zip(lines, ("float32", "bfloat16"), strict=True):
        figures = re.fullmatch(rf"  {name} +product +([\d.,]+) GFLOP/s   copy +([\d.,]+) GB/s", line)
        assert figures is not None, line


def test_what_cannot_be_measured_says_why(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(device_report, "product_rate", refuse)
    assert speed_lines(resolve_device("cpu"), seconds=0.001, largest=16) == [
        f"  {name:8}  not to be measured (out of memory)" for name in ("float32", "bfloat16")
    ]


@pytest.mark.parametrize("name", ABSENT)
def test_a_named_but_absent_device(name, capsys, monkeypatch):
    advised = device_kind(name).environment
    for setting in advised:
        monkeypatch.delenv(setting.partition("=")[0], raising=False)
    assert main(["devices", name]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{name} (") and ") is not here, because " in lines[0]
    assert lines[1].startswith("It needs ") and lines[2].startswith("  Python 3.")
    assert lines[3:] == ([f"  Environment: {' '.join(advised)} is advised for {name}."] if advised else [])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gpu"], r"--device 'gpu' is no device known here; choose auto or one of cpu, cuda, npu, hpu, xpu, mps\."),
        (["cuda:x"], r"--device 'cuda:x' ends in no number; write cuda or cuda:0\."),
        (["cpu:7"], r"--device cpu:7 does not exist: all cores are one device; write cpu, and see --threads\."),
        (["cpu", "--seconds", "0"], r"--seconds is 0; give a length above 0, 60 at most\."),
        (["--seconds", "nan"], r"--seconds is nan; give a length above 0, 60 at most\."),
    ],
)
def test_bad_words(words, sentence):
    with pytest.raises(DeviceError, match=f"^{sentence}$"):
        main(["devices", *words])
