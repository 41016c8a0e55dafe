"""The short form of ``make faults``: a few kills, every other kind of fault once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults import suite
from tests.faults.injections import FAULTS, Data2Vec, Digits, Injected, Recipe, Wrong, kills, same_bits

KINDS = {
    "told to stop": 4, "told to stop elsewhere": 3, "ranks told": 2, "ranks killed": 2, "defects": 2, "not finite": 2,
    "damaged checkpoints": 6, "changed data": 4, "bad audio": 12,
}  # fmt: skip
"""How many faults each part injects, where it is not one."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize(("kind", "seed"), [(Digits, 1), (Data2Vec, 2)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path, kind: type[Recipe], seed: int) -> None:
    injected = list(kills(kind(tmp_path, updates=8), number=3, seed=seed))
    # the update that is being written beside training, and the one made meanwhile
    assert injected and all(one.lost <= 2 for one in injected), injected


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_nothing_and_is_told(digits: Digits, name: str) -> None:
    injected = list(FAULTS[name](digits, 0))
    if not injected and name == "full disk":
        pytest.skip("no disk of its own can be mounted here")
    assert len(injected) == KINDS.get(name, 1)
    # what is saved before the end is all that was trained; of a killed run, or a damaged checkpoint, one update is not
    most = {"ranks killed": 2, "damaged checkpoints": 2, "full disk": 2, "not finite": 3}.get(name, 0)
    assert all((one.lost or 0) <= most for one in injected), injected


def test_what_went_wrong_is_counted_and_told(tmp_path: Path, monkeypatch, capsys) -> None:
    def wrong(recipe: Recipe, seed: int) -> Iterator[Injected]:
        yield Injected("flood", 3)
        raise Wrong("all is wet")

    def nothing(recipe: Recipe, seed: int) -> Iterator[Injected]:
        yield from ()

    def fine(recipe: Recipe, seed: int) -> Iterator[Injected]:
        yield Injected("flood", 0)
        yield Injected("storm")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(suite, "FAULTS", {"wrong": wrong, "nothing": nothing, "fine": fine})
    assert suite.main(["--kills", "0", "--json", str(tmp_path / "report.json")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kinds"]["flood"] == {"injected": 2, "lost_updates": {"mean": 1.5, "largest": 3}}
    assert report["kinds"]["storm"] == {"injected": 1, "lost_updates": None}
    assert report["total"]["wrong"] == 1 and report["wrong"] == {"wrong": "all is wet"}
    assert report["could_not_be_injected_here"] == ["nothing"]
    told = capsys.readouterr().out
    assert "\nWRONG: wrong: all is wet\nwrong results: 1\nthe runs are in " in told
    assert suite.main(["--kills", "0", "--only", "fine"]) == 0


def test_weights_that_differ_are_noticed(tmp_path: Path) -> None:
    recipe = partial(Digits, updates=2)
    first, second = recipe(tmp_path / "a"), recipe(tmp_path / "b")
    second.keys = {**second.keys, "seed": 5}
    with pytest.raises(Wrong, match=r"^model/model.safetensors differs from that of the undisturbed run$"):
        same_bits(first.whole(), second.whole())
