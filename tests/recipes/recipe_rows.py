"""Rows of ``tests/recipes/*.csv``: what to run, with which flags, and what must be there afterwards.

Columns: ``Name`` (unique), ``Task``, ``Dataset``, ``Script_file``, ``Hparam_file``, ``Data_prep_file``, ``Readme_file``
(paths from the repository's root), ``Needs`` (the name of a row whose output folder the flags mention),
``test_debug_flags`` and ``test_debug_checks``. In the flags ``{fixtures}`` is tests/fixtures, ``{output}`` the row's
own output folder and ``{needs}`` that of the row it needs. Checks stand between semicolons:

    exists PATH                     a file or folder in the output folder
    same PATH FIXTURE               a file in the output folder, byte for byte that of tests/fixtures
    summary KEY OP NUMBER           a number of summary.json (dotted keys)
    log KEY OP NUMBER               the last row of metrics.jsonl that has KEY
    stage STAGE KEY OP NUMBER       the same, among the rows with "stage": STAGE
"""

from __future__ import annotations

import csv
import json
import math
import operator
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
OPERATORS = {"<": operator.lt, "<=": operator.le, "==": operator.eq, ">=": operator.ge, ">": operator.gt}


@dataclass(frozen=True)
class Row:
    """One recipe run: paths are absolute, ``flags`` as written, ``checks`` already split."""

    name: str
    script: Path
    hparams: Path
    prepare: Path | None
    readme: Path
    needs: str
    flags: str
    checks: tuple[str, ...]

    def command_line(self, output: Path, needs: Path | None) -> list[str]:
        """What follows ``python``."""
        places = {"fixtures": FIXTURES, "output": output, "needs": needs}
        return [str(self.script), str(self.hparams), *shlex.split(self.flags.format(**places))]


def read_rows() -> list[Row]:
    """All rows of all files, in order."""
    rows = []
    for path in sorted(Path(__file__).parent.glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as stream:
            for line in csv.DictReader(stream):
                prepare = ROOT / line["Data_prep_file"] if line["Data_prep_file"] else None
                checks = tuple(check.strip() for check in line["test_debug_checks"].split(";") if check.strip())
                rows.append(Row(line["Name"], ROOT / line["Script_file"], ROOT / line["Hparam_file"], prepare,
                                ROOT / line["Readme_file"], line["Needs"], line["test_debug_flags"], checks))
    return rows


def failed_checks(row: Row, output: Path) -> list[str]:
    """The checks of a row that do not hold, each with what was found."""
    failures = []
    for check in row.checks:
        kind, *rest = check.split()
        if kind == "exists":
            if not (output / rest[0]).exists():
                failures.append(f"{check}: not there; there are {sorted(p.name for p in output.iterdir())}")
            continue
        if kind == "same":
            made, wanted = output / rest[0], FIXTURES / rest[1]
            if not made.is_file() or made.read_bytes() != wanted.read_bytes():
                failures.append(f"{check}: not there, or other bytes")
            continue
        *where, sign, bound = rest
        found = find_value(output, kind, where)
        # a number that is missing, None or NaN fulfils nothing
        if not isinstance(found, (int, float)) or math.isnan(found) or not OPERATORS[sign](found, float(bound)):
            failures.append(f"{check}: found {found!r}")
    return failures


def find_value(output: Path, kind: str, where: list[str]) -> Any:
    """The value that a check speaks of, None where there is none."""
    if kind == "summary":
        value = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        for key in where[0].split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    if kind == "stage":
        logged = [entry for entry in logged if entry.get("stage") == where[0]]
    elif kind != "log":
        raise ValueError(f"unknown check {kind!r}")
    return next((entry[where[-1]] for entry in reversed(logged) if where[-1] in entry), None)
