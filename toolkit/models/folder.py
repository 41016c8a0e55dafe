"""Models to and from folders: what :mod:`toolkit.models.model_files` reads, built by its kind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from toolkit.errors import CheckpointError, ModelError
from toolkit.models.ctc import CTCModel
from toolkit.models.encoder import Wav2Vec2Encoder, encoder_settings
from toolkit.models.model_files import (
    ModelConfig,
    ModelFolder,
    load_tensors,
    read_model_config,
    read_model_folder,
    save_model_folder,
)
from toolkit.models.text_encoder import TextEncoder
from toolkit.models.wav2vec2 import Wav2Vec2Pretraining

__all__ = [
    "ModelConfig",
    "ModelFolder",
    "build_model",
    "load_model",
    "read_model_config",
    "read_model_folder",
    "save_model_folder",
]


def build_model(kind: str, architecture: Mapping[str, Any], *, source: str | os.PathLike[str]) -> nn.Module:
    """A fresh model of one of the known kinds; ``source`` is the folder, for the error.

    Raises
    ------
    CheckpointError : the kind is unknown, or the settings do not make a model.
    """
    settings = dict(architecture)
    try:
        if kind == "text_encoder":
            return TextEncoder(**settings)
        encoder = Wav2Vec2Encoder(**encoder_settings(architecture, source=source))
        settings.pop("encoder", None)
        if kind == "wav2vec2_encoder":
            return encoder
        if kind == "wav2vec2_pretraining":
            return Wav2Vec2Pretraining(encoder, **settings)
        if kind == "ctc":
            return CTCModel(encoder, **settings)
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).rstrip(".") if isinstance(error, ModelError) else error
        raise CheckpointError(
            f"{source}: the settings in config.json make no model of kind {kind!r} ({reason}); "
            "was the folder written by another version?"
        ) from error
    raise CheckpointError(f"{source}: there is no model of kind {kind!r}.")


def load_model(folder: str | os.PathLike[str]) -> nn.Module:
    """The model in a folder, with its weights, in evaluation mode; no code from the folder runs.

    Raises
    ------
    CheckpointError : the folder cannot be used.

    Example
    -------
    >>> import tempfile
    >>> tiny = Wav2Vec2Encoder(conv_layers=[(8, 10, 5)], dim=16, num_layers=1, ffn_dim=32, num_heads=2,
    ...     pos_kernel=4, pos_groups=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_model_folder(f"{folder}/model", tiny, kind="wav2vec2_encoder", sample_rate=16000, normalize=False)
    ...     type(load_model(f"{folder}/model")).__name__
    'Wav2Vec2Encoder'
    """
    contents = read_model_folder(folder)
    model = build_model(contents.config.kind, contents.config.architecture, source=folder)
    load_tensors(model, contents.tensors, source=folder)
    return model.eval()
