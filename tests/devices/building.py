"""Builds the stand-in: ``python building.py FOLDER`` prints the path of the library.

In a process of its own: torch loads what it builds, and the tests' own process is to stay without that device.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from torch.utils.cpp_extension import load

STANDIN = Path(__file__).with_name("standin")


def build(folder: Path) -> Path:
    """The library, built in ``folder``; unoptimized, as most of the time goes into the compiler."""
    try:
        ninja = importlib.import_module("ninja").BIN_DIR  # the package's own; it is on no PATH
        os.environ["PATH"] = f"{ninja}{os.pathsep}{os.environ['PATH']}"
    except ImportError:
        pass  # then the system's, or torch says that there is none
    os.environ.setdefault("MAX_JOBS", "1")
    folder.mkdir(parents=True, exist_ok=True)
    options = {"extra_cflags": ["-O0"], "is_python_module": False, "build_directory": str(folder)}
    return Path(load("npu_standin", [str(STANDIN / "npu_standin.cpp")], **options))


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
