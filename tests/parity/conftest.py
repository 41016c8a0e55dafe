"""Prints the largest differences that were measured, for docs/parity.md: pytest tests/parity --differences."""


def pytest_addoption(parser):
    parser.addoption("--differences", action="store_true", help="print the largest differences that were measured")


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--differences"):
        return
    import sys

    for module in list(sys.modules.values()):
        table = getattr(module, "DIFFERENCES", None)
        if isinstance(table, dict) and "test_transformers_live" in getattr(module, "__name__", ""):
            for name, value in sorted(table.items()):
                terminalreporter.write_line(f"{value:10.2e}  {name}")
