"""Models built by their kind and settings, as :mod:`toolkit.models.model_files` and its foreign kin read them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from toolkit.errors import CheckpointError, ModelError
from toolkit.models.ctc import CTCModel
from toolkit.models.data2vec import Data2VecAudio, Data2VecText
from toolkit.models.encoder import Wav2Vec2Encoder, encoder_settings
from toolkit.models.text_classifier import TextClassifier
from toolkit.models.text_encoder import TextEncoder
from toolkit.models.wav2vec2 import Wav2Vec2Pretraining


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
        if kind == "data2vec_text":
            return Data2VecText(TextEncoder(**settings.pop("encoder")), **settings)
        if kind == "text_classifier":
            return TextClassifier(TextEncoder(**settings.pop("encoder")), **settings)
        encoder = Wav2Vec2Encoder(**encoder_settings(architecture, source=source))
        settings.pop("encoder", None)
        if kind == "wav2vec2_encoder":
            return encoder
        if kind == "wav2vec2_pretraining":
            return Wav2Vec2Pretraining(encoder, **settings)
        if kind == "data2vec_audio":
            return Data2VecAudio(encoder, **settings)
        if kind == "ctc":
            return CTCModel(encoder, **settings)
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).rstrip(".") if isinstance(error, ModelError) else error
        raise CheckpointError(
            f"{source}: its settings make no model of kind {kind!r} ({reason}); "
            "was the folder written by another version?"
        ) from error
    raise CheckpointError(f"{source}: there is no model of kind {kind!r}.")
