"""A model of any known kind of file, built and filled."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from toolkit.errors import CheckpointError, ModelError, ToolkitError
from toolkit.models.convert.common import Converted, PretrainedInfo, describe_difference, split_unused
from toolkit.models.convert.read import read_pretrained
from toolkit.models.encoder import ENCODER_ARGUMENTS, Wav2Vec2Encoder, encoder_settings
from toolkit.models.folder import build_model
from toolkit.models.model_files import TEXT_KINDS, load_tensors


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> tuple[nn.Module, PretrainedInfo]:
    """The model in a file or folder of any known kind, with its weights, in evaluation mode.

    Arguments
    ---------
    path : see :func:`toolkit.models.convert.read.read_pretrained`.
    device : where to.
    allow_missing : patterns (``mask_embedding``) of the model's tensors that may be missing in the file.
    allow_unexpected : patterns of tensors in the file, by its own names, that the model may lack.

    Raises
    ------
    CheckpointError : the file cannot be read, or tensors are missing, too many or of other shapes.
    """
    converted = read_pretrained(path)
    return build_converted(converted, path, allow_missing, allow_unexpected).to(device), converted.info


def build_converted(
    converted: Converted,
    path: str | os.PathLike[str],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> nn.Module:
    """The model that was read from ``path``, in evaluation mode; arguments as for :func:`load_pretrained`."""
    check_difference(converted, path, allow_missing, allow_unexpected)
    model = build_model(converted.config.kind, converted.config.architecture, source=path)
    fresh = frozenset(converted.missing) | frozenset(converted.info.fresh)
    load_tensors(model, converted.tensors, source=path, allowed=fresh)
    return model.eval()


def check_difference(
    converted: Converted,
    path: str | os.PathLike[str],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    """Raise CheckpointError, with a table, where tensors are missing or too many without leave."""
    missing = split_unused(converted.missing, allow_missing)[1]
    unexpected = split_unused(converted.unexpected, allow_unexpected)[1]
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors of the model are missing and {len(unexpected)} of the file are "
            "unexpected; allow them by name if they may differ, or give a whole file.\n"
            + describe_difference(converted)
        )


def load_encoder(path: str | os.PathLike[str], **overrides: Any) -> Wav2Vec2Encoder:
    """The encoder of a model of any known kind, with its weights.

    Arguments
    ---------
    path : see :func:`toolkit.models.convert.read.read_pretrained`.
    overrides : constructor arguments of the encoder to replace, such as dropouts, masks and feature_grad_mult.

    Raises
    ------
    CheckpointError : the file cannot be used, or an override changes a weight's shape.
    ModelError : an override is no argument of the encoder.
    """
    if unknown := sorted(overrides.keys() - ENCODER_ARGUMENTS):
        nearest = difflib.get_close_matches(unknown[0], ENCODER_ARGUMENTS, 1, 0.0)[0]
        raise ModelError(f"the encoder has no argument {unknown[0]!r}; did you mean {nearest!r}?")
    converted = read_pretrained(path)
    check_difference(converted, path)
    if converted.config.kind in TEXT_KINDS:
        kind = converted.config.kind
        raise CheckpointError(f"{path}: this is a model of text, of kind {kind!r}; give one of speech.")
    settings = encoder_settings(converted.config.architecture, source=path)
    try:
        encoder = Wav2Vec2Encoder(**settings | overrides)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ToolkitError):
            raise
        raise CheckpointError(
            f"{path}: the settings in config.json make no encoder ({error}); was the folder written by another program?"
        ) from error
    whole = converted.config.kind == "wav2vec2_encoder"
    fresh = frozenset(name if whole else name.removeprefix("encoder.") for name in converted.info.fresh)
    load_tensors(encoder, converted.tensors if whole else converted.part("encoder"), source=path, allowed=fresh)
    return encoder
