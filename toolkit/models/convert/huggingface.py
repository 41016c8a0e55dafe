"""Hugging Face folders: config.json, model.safetensors or pytorch_model.bin, vocab.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.models.convert.common import Converted


def is_huggingface(config: Mapping[str, Any]) -> bool:
    """Whether the object in a config.json is Hugging Face's."""
    return "model_type" in config or "architectures" in config


def read_huggingface(folder: Path, weights: Path | None = None) -> Converted:
    """A folder in the toolkit's terms; ``weights`` names the file of weights, None: what lies there."""
    raise CheckpointError(f"{folder}: Hugging Face folders cannot be read yet.")


def write_huggingface(converted: Converted, folder: Path) -> None:
    """Write a folder that ``from_pretrained`` opens."""
    raise CheckpointError(f"{folder}: Hugging Face folders cannot be written yet.")
