"""Every recipe and template by its real command, a few updates on small real data (rows: tests/recipes/*.csv)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.recipes.recipe_rows import Row, failed_checks, read_rows

ROWS = {row.name: row for row in read_rows()}


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs that others need are kept; one folder for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "recipe_outputs"
    folder.mkdir(exist_ok=True)
    return folder


def run_row(row: Row, outputs: Path, elsewhere: Path) -> Path:
    """Run a row once, and before it the row that it needs; returns its output folder."""
    needs = run_row(ROWS[row.needs], outputs, elsewhere) if row.needs else None
    output = outputs / row.name
    with FileLock(str(outputs / f"{row.name}.lock")):
        done = outputs / f"{row.name}.done"
        if not done.exists():
            # another working folder on purpose: a script must find its files from anywhere
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, *row.command_line(output, needs)]
            ended = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=600)
            assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout[-3000:]}\n{ended.stderr[-6000:]}"
            done.touch()
    return output


@pytest.mark.parametrize("name", ROWS)
def test_recipe(name: str, outputs: Path, tmp_path: Path) -> None:
    output = run_row(ROWS[name], outputs, tmp_path)
    assert not failed_checks(ROWS[name], output)
