"""A profile of a few updates: a table first, a trace second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from toolkit.training.folders import write_atomic


class UpdateProfiler:
    """Profiles some updates of this session and writes ``profile.txt`` (table) and ``profile.json`` (trace).

    Arguments
    ---------
    folder : where to write; None = off.
    skip : updates before (they warm everything up).
    count : updates that are profiled.
    """

    def __init__(self, folder: Path | None, *, skip: int = 2, count: int = 2) -> None:
        self.folder, self.skip, self.count = folder, skip, count
        self._seen = 0
        self._profile: Any = None

    def step(self) -> None:
        """An update is complete."""
        if self.folder is None:
            return
        self._seen += 1
        if self._seen == self.skip:
            self._profile = torch.profiler.profile(record_shapes=False)
            self._profile.__enter__()
        elif self._seen == self.skip + self.count:
            self.close()

    def close(self) -> None:
        """Write what there is."""
        if self._profile is None or self.folder is None:
            return
        self._profile.__exit__(None, None, None)
        table = self._profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        write_atomic(self.folder / "profile.txt", table)
        self._profile.export_chrome_trace(str(self.folder / "profile.json"))
        self._profile = None
