"""fairseq's checkpoints (.pt)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.models.convert.common import Converted


def is_fairseq(contents: object) -> bool:
    """Whether an unpickled object is a checkpoint of fairseq's."""
    return isinstance(contents, Mapping) and "model" in contents and ("args" in contents or "cfg" in contents)


def read_fairseq(contents: Mapping[str, Any], path: Path) -> Converted:
    """A checkpoint in the toolkit's terms."""
    raise CheckpointError(f"{path}: fairseq's checkpoints cannot be read yet.")


def write_fairseq(converted: Converted, path: Path) -> None:
    """Write a checkpoint that fairseq opens."""
    raise CheckpointError(f"{path}: fairseq's checkpoints cannot be written yet.")
