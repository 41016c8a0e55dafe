"""SpeechBrain's saved pretraining folder."""

from __future__ import annotations

from pathlib import Path

from toolkit.errors import CheckpointError
from toolkit.models.convert.common import Converted


def is_speechbrain(folder: Path) -> bool:
    """Whether a folder is a checkpoint (CKPT+...) or saved model of SpeechBrain's."""
    return (folder / "CKPT.yaml").is_file() or any(folder.glob("*.ckpt"))


def read_speechbrain(folder: Path) -> Converted:
    """A folder in the toolkit's terms, or a sentence on what differs."""
    raise CheckpointError(f"{folder}: SpeechBrain's folders cannot be read yet.")
