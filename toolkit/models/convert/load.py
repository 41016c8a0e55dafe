"""A model of any known kind of file, built and filled."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from toolkit.errors import CheckpointError, ModelError, ToolkitError
from toolkit.models.build import build_model
from toolkit.models.convert.common import Converted, PretrainedInfo, describe_difference, encoder_alone, split_unused
from toolkit.models.convert.read import read_pretrained
from toolkit.models.encoder import ENCODER_ARGUMENTS, Wav2Vec2Encoder, encoder_settings
from toolkit.models.model_files import TEXT_KINDS, load_tensors
from toolkit.models.text_encoder import TextEncoder

EncoderT = TypeVar("EncoderT", bound=nn.Module)


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # tensors that the file lacks are the same in every process
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
            f"{path}: the tensors do not match, {len(missing)} of the model are missing and {len(unexpected)} of the "
            "file unexpected; allow them by name if they may differ, or give a whole file.\n"
            + describe_difference(converted)
        )


def accepted(
    converted: Converted,
    path: str | os.PathLike[str],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Converted:
    """The same, where what is missing by leave counts as fresh, and what is too many by leave as left out.

    Raises
    ------
    CheckpointError : see :func:`check_difference`.
    """
    check_difference(converted, path, allow_missing, allow_unexpected)
    fresh, unused = converted.info.fresh + converted.missing, converted.info.unused + converted.unexpected
    return replace(converted, info=replace(converted.info, fresh=fresh, unused=unused), missing=(), unexpected=())


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
    return build_encoder(read_pretrained(path), path, **overrides)


def build_encoder(converted: Converted, path: str | os.PathLike[str], **overrides: Any) -> Wav2Vec2Encoder:
    """The encoder of what was read from ``path``; see :func:`load_encoder`."""
    if unknown := sorted(overrides.keys() - ENCODER_ARGUMENTS):
        nearest = difflib.get_close_matches(unknown[0], ENCODER_ARGUMENTS, 1, 0.0)[0]
        raise ModelError(f"the encoder has no argument {unknown[0]!r}; did you mean {nearest!r}?")
    check_difference(encoder_alone(converted), path)  # a teacher that is not whole stands in nobody's way
    if converted.config.kind in TEXT_KINDS:
        kind = converted.config.kind
        raise CheckpointError(f"{path}: this is a model of text, of kind {kind!r}; give one of speech.")
    settings = encoder_settings(converted.config.architecture, source=path)
    return _with_weights(Wav2Vec2Encoder, settings | overrides, converted, path, whole="wav2vec2_encoder")


def build_text_encoder(converted: Converted, path: str | os.PathLike[str], **overrides: Any) -> TextEncoder:
    """The encoder of a model of text, with its weights.

    Arguments
    ---------
    converted : what was read from ``path``.
    overrides : constructor arguments of the encoder to replace, such as dropouts.

    Raises
    ------
    CheckpointError : the model is of speech, its settings make no encoder, or an override changes a weight's shape.
    """
    check_difference(converted, path)
    config = converted.config
    if config.kind not in TEXT_KINDS:
        raise CheckpointError(f"{path}: this is a model of speech, of kind {config.kind!r}; give one of text.")
    settings = config.architecture.get("encoder", config.architecture)
    return _with_weights(TextEncoder, settings | overrides, converted, path, whole="text_encoder")


def norms_without_padding(converted: Converted) -> Converted:
    """The same model with ``norm_over_padding`` off: an utterance in a padded batch gets what it gets alone.

    The originals take group norm over padding too, so that a BASE model's output depends on its neighbours in the
    batch; one utterance at a time they agree with this.
    """
    config = converted.config
    encoder = config.architecture.get("encoder")
    settings = config.architecture if encoder is None else encoder
    if not settings.get("norm_over_padding"):
        return converted
    settings = settings | {"norm_over_padding": False}
    architecture = settings if encoder is None else config.architecture | {"encoder": settings}
    return replace(converted, config=replace(config, architecture=architecture))


def _with_weights(
    build: Callable[..., EncoderT],
    settings: Mapping[str, Any],
    converted: Converted,
    path: str | os.PathLike[str],
    *,
    whole: str,
) -> EncoderT:
    """The encoder by its settings, with its weights; ``whole`` is the kind of a file that holds nothing else."""
    try:
        encoder = build(**settings)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ToolkitError):
            raise
        raise CheckpointError(
            f"{path}: its settings make no encoder ({error}); was the folder written by another program?"
        ) from error
    is_whole = converted.config.kind == whole
    fresh = frozenset(name if is_whole else name.removeprefix("encoder.") for name in converted.info.fresh)
    load_tensors(encoder, converted.tensors if is_whole else converted.part("encoder"), source=path, allowed=fresh)
    return encoder
