"""The shapes of a model's tensors, known before any memory is taken, and a check of a file's tensors against them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import CheckpointError
from toolkit.models.convert.common import Row, empty_model, import_tensors


def expected_shapes(
    kind: str, architecture: Mapping[str, Any], *, source: str | os.PathLike[str], num_tensors: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a model by the toolkit's names; nothing is allocated.

    Arguments
    ---------
    kind, architecture : see :class:`toolkit.models.model_files.ModelConfig`.
    source : the file or folder they come from, for the error.
    num_tensors : tensors that the file holds; more layers than that are not built at all.

    Raises
    ------
    CheckpointError : the settings make no model.

    Example
    -------
    >>> shapes = expected_shapes("wav2vec2_encoder", {"num_layers": 0}, source="a folder")
    >>> shapes["projection.weight"]
    (768, 512)
    """
    inner = architecture.get("encoder", architecture)
    layers = inner.get("num_layers", 0) if isinstance(inner, Mapping) else 0
    if num_tensors is not None and isinstance(layers, int) and layers > num_tensors:
        raise CheckpointError(
            f"{source}: the settings name {layers} layers, but the file holds {num_tensors} tensors in all; copy the "
            "file and its settings from the same model again."
        )
    try:
        model = empty_model(kind, architecture, source=source)
    except RuntimeError as error:  # sizes beyond what torch can count
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source}: its settings make no model ({error}).") from error
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def import_checked(
    table: Sequence[Row],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    source: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """:func:`toolkit.models.convert.common.import_tensors`, where every tensor must have its expected shape.

    Raises
    ------
    CheckpointError : a tensor of another shape, or of no floating point numbers; ``source`` is the file.
    """
    advice = "copy the file and its settings from the same model again."
    try:
        found, missing, left = import_tensors(table, tensors, expected)
    except RuntimeError as error:
        raise CheckpointError(f"{source}: the tensors do not fit together ({error}); {advice}") from error
    for name, value in found.items():
        if value.layout != torch.strided or not value.is_floating_point():
            kind = str(value.dtype if value.layout == torch.strided else value.layout).removeprefix("torch.")
            raise CheckpointError(
                f"{source}: the tensor for {name} is of {kind}, expected floating point numbers; {advice}"
            )
        if tuple(value.shape) != tuple(expected[name]):
            raise CheckpointError(
                f"{source}: the tensor for {name} has the shape {tuple(value.shape)}, but the settings beside it make "
                f"{tuple(expected[name])}; {advice}"
            )
    return found, missing, left
