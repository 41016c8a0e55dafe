"""torchaudio's Wav2Vec2Model state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.models.convert.common import Converted


def is_torchaudio(contents: object) -> bool:
    """Whether an unpickled object is a state dict of torchaudio's Wav2Vec2Model."""
    return isinstance(contents, Mapping) and any("encoder.feature_projection." in str(name) for name in contents)


def read_torchaudio(contents: Mapping[str, Any], path: Path) -> Converted:
    """A state dict in the toolkit's terms."""
    raise CheckpointError(f"{path}: torchaudio's state dicts cannot be read yet.")
