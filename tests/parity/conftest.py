"""Prints the largest differences that were measured, for docs/parity.md: PARITY_DIFFERENCES=1 pytest tests/parity."""

import os
import sys


def pytest_terminal_summary(terminalreporter):
    if not os.environ.get("PARITY_DIFFERENCES"):
        return
    for module in list(sys.modules.values()):
        table = getattr(module, "DIFFERENCES", None)
        for name, value in sorted(table.items() if isinstance(table, dict) else ()):
            terminalreporter.write_line(f"{value:10.2e}  {name}")
