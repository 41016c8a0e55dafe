"""Injects faults into real runs, many of them, and counts what came out: ``make faults``.

    python -m tests.faults.suite --kills 50 --json report.json

Half of the kills meet a CTC run, half a pretraining with a teacher; every other kind of fault comes once. The exit
code is 0 where nothing was wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.faults.injections import FAULTS, Data2Vec, Digits, Injected, Wrong, kills

WEIGHT = 5
"""Kills that the faults of another kind take about as long as, for the bar."""


def main(argv: Sequence[str]) -> int:
    """Run the suite; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how often a run is killed at a random moment")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--only", default="", help="only faults whose name has this in it (kills: 'kill -9')")
    parser.add_argument("--json", type=Path, help="where to write the counts as well")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="faults"))
    outcomes = run_all(folder, number=options.kills, seed=options.seed, only=options.only)
    report = summarize(outcomes)
    print(as_table(report))
    if report["wrong"]:
        print(f"the runs are in {folder}")
    else:
        shutil.rmtree(folder)
    if options.json is not None:
        about = {"kills": options.kills, "seed": options.seed, "torch": torch.__version__, "on": platform.platform()}
        options.json.write_text(json.dumps({**about, **report}, indent=1) + "\n", encoding="utf-8")
    return 1 if report["total"]["wrong"] else 0


def run_all(folder: Path, *, number: int, seed: int, only: str) -> dict[str, tuple[list[Injected], str]]:
    """What came out of each part: the faults that were injected, and what was wrong (empty where nothing was)."""
    digits, halves = Digits(folder / "digits", updates=16), (number - number // 2, number // 2)
    parts: dict[str, tuple[int, Callable[[], Iterator[Injected]]]] = {}
    for recipe, count in zip((Digits, Data2Vec), halves, strict=True):
        # long enough that the kills do not all fall on the same updates
        made = recipe(folder / f"kills_{recipe.__name__}", updates=max(16, count))
        parts[f"kill -9, {recipe.__name__}"] = (count, partial(kills, made, number=count, seed=seed))
    parts |= {name: (WEIGHT, partial(fault, digits, seed)) for name, fault in FAULTS.items()}
    parts = {name: part for name, part in parts.items() if only in name and part[0]}
    outcomes = {}
    with tqdm(total=sum(weight for weight, _ in parts.values()), unit="kill", dynamic_ncols=True) as bar:
        for name, (weight, inject) in parts.items():
            bar.set_description(name)
            before = bar.n
            outcomes[name] = run_one(inject, tick=bar.update if name.startswith("kill -9") else lambda: None)
            bar.update(weight - (bar.n - before))
            if outcomes[name][1]:
                bar.write(f"WRONG: {name}: {outcomes[name][1]}")
    return outcomes


def run_one(inject: Callable[[], Iterator[Injected]], tick: Callable[[], Any]) -> tuple[list[Injected], str]:
    """The faults of one part, and what was wrong."""
    done: list[Injected] = []
    try:
        for injected in inject():
            done.append(injected)
            tick()
    except Wrong as wrong:
        return done, str(wrong)
    return done, ""


def summarize(outcomes: dict[str, tuple[list[Injected], str]]) -> dict[str, Any]:
    """Counts by kind and in all; updates that had to be made again where a run went on."""
    by_kind: dict[str, list[Injected]] = {}
    for injected, _ in outcomes.values():
        for one in injected:
            by_kind.setdefault(one.kind, []).append(one)
    everything = [one for ones in by_kind.values() for one in ones]
    wrong = {name: words for name, (_, words) in outcomes.items() if words}
    empty = [name for name, (injected, words) in outcomes.items() if not injected and not words]
    return {
        "kinds": {kind: count(ones) for kind, ones in by_kind.items()},
        "total": {**count(everything), "wrong": len(wrong)},
        "wrong": wrong,
        "could_not_be_injected_here": empty,
    }


def count(injected: Sequence[Injected]) -> dict[str, Any]:
    """How many, and the updates lost."""
    lost = [one.lost for one in injected if one.lost is not None]
    values = {"mean": round(statistics.fmean(lost), 3), "largest": max(lost)} if lost else None
    return {"injected": len(injected), "lost_updates": values}


def as_table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{'fault':<42}{'injected':>9}{'updates lost: mean':>20}{'largest':>9}"]
    for name, row in [*report["kinds"].items(), ("all", report["total"])]:
        lost = row["lost_updates"] or {"mean": "-", "largest": "-"}
        lines.append(f"{name:<42}{row['injected']:>9}{lost['mean']:>20}{lost['largest']:>9}")
    lines += [f"could not be injected here: {name}" for name in report["could_not_be_injected_here"]]
    lines += [f"WRONG: {name}: {words}" for name, words in report["wrong"].items()]
    return "\n".join([*lines, f"wrong results: {report['total']['wrong']}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
