"""What every foreign format shares: the neutral form that readers make and writers take, and tables of names.

A table is a list of rows, one for each pattern of tensor names; read from left to right it exports, from right to
left it imports. So the two ways can never disagree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.data.tokens import Tokenizer
from toolkit.errors import CheckpointError
from toolkit.models.build import build_model
from toolkit.models.model_files import ModelConfig


@dataclass(frozen=True)
class PretrainedInfo:
    """What a file of a model was found to be.

    kind : of the toolkit's model, see :data:`toolkit.models.model_files.KINDS`.
    source : the program and form that the file is of, in words ("fairseq, args").
    sample_rate : Hz.
    normalize : whether each waveform is brought to zero mean and unit variance first.
    labels : the symbol of each output in order, for a CTC model whose file (or a neighbour of it) says so; the label of
        each for a classifier.
    unused : tensors of the file that the model has no place for and that were left out on purpose (a teacher, a
        decoder's cache).
    fresh : tensors of the model that such files never hold (a mask vector in a fine-tuned encoder); they keep the
        values that the model was built with.
    notes : anything else worth a line.
    """

    kind: str
    source: str
    sample_rate: int
    normalize: bool
    labels: tuple[str, ...] | None = None
    unused: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Converted:
    """A model in the toolkit's own terms, whatever file it came from.

    config : as in a model folder; its architecture builds the model.
    tensors : by the toolkit's names.
    info : what the file was.
    tokenizer : of a CTC model, if its tokens were found.
    missing : tensors of the model that the file should hold and does not.
    unexpected : tensors of the file, by its own names, that nothing asks for.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    info: PretrainedInfo
    tokenizer: Tokenizer | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of the part ``name``, their names without it; all tensors if there is no such part."""
        prefix = name + "."
        chosen = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        return chosen or dict(self.tensors)


@dataclass(frozen=True)
class Row:
    """One line of a table of names.

    ours : the toolkit's name, with ``{}`` where a number stands (the same number in all names).
    theirs : the foreign name, or several, whose tensors lie one after the other in ours (q, k, v).
    also : other spellings that are read but not written.
    flat : theirs is (1, all rows, channels) where ours is (groups, rows, channels): a code book.
    """

    ours: str
    theirs: tuple[str, ...]
    also: tuple[tuple[str, ...], ...] = field(default=())
    flat: bool = False

    def foreign(self, name: str) -> list[tuple[str, ...]] | None:
        """All spellings of the toolkit's name ``name`` in the foreign file, the written one first; None if it is not
        this row's."""
        pattern = re.escape(self.ours).replace(r"\{\}", r"(\d+)")
        match = re.fullmatch(pattern, name)
        if match is None:
            return None
        return [tuple(part.format(*match.groups()) for part in parts) for parts in (self.theirs, *self.also)]


def import_tensors(
    table: Sequence[Row], source: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Foreign tensors under the toolkit's names.

    Arguments
    ---------
    table : the format's names.
    source : tensors by foreign names.
    expected : shape of each tensor that the model has, by our names.

    Returns
    -------
    tensors by our names; names of ours that were not found; foreign names that nothing asked for.

    Raises
    ------
    RuntimeError : tensors that lie one after the other in ours are of different shapes; the caller names the file.
    """
    found: dict[str, Tensor] = {}
    missing: list[str] = []
    used: set[str] = set()
    for name, shape in expected.items():
        row, spellings = _row_of(table, name)
        parts = next((names for names in spellings if all(part in source for part in names)), None)
        if parts is None:
            missing.append(name)
            continue
        used.update(parts)
        value = source[parts[0]] if len(parts) == 1 else _on_top(source, parts)
        found[name] = value.reshape(tuple(shape)) if row.flat and value.numel() == torch.Size(shape).numel() else value
    return found, tuple(missing), tuple(sorted(source.keys() - used))


def _on_top(source: Mapping[str, Tensor], parts: Sequence[str]) -> Tensor:
    """The tensors ``parts``, one after the other."""
    if len({tuple(source[part].shape) for part in parts}) > 1:
        shapes = ", ".join(f"{part} {tuple(source[part].shape)}" for part in parts)
        raise RuntimeError(f"these must have one shape: {shapes}")
    return torch.cat([source[part] for part in parts])


def export_tensors(table: Sequence[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The toolkit's tensors under foreign names, bit for bit; the inverse of :func:`import_tensors`.

    Raises
    ------
    CheckpointError : the format has no name for a tensor.
    """
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        row, spellings = _row_of(table, name)
        names = spellings[0]
        pieces = (value.flatten(0, 1)[None],) if row.flat else value.chunk(len(names))
        for part, piece in zip(names, pieces, strict=True):
            out[part] = piece.contiguous().clone()
    return out


def _row_of(table: Sequence[Row], name: str) -> tuple[Row, list[tuple[str, ...]]]:
    for row in table:
        spellings = row.foreign(name)
        if spellings is not None:
            return row, spellings
    raise CheckpointError(f"the format has no name for the tensor {name}; this model cannot be written in it.")


ENCODER_KINDS = {"data2vec_audio": "wav2vec2_encoder", "data2vec_text": "text_encoder"}
"""The kind that is left of a data2vec model without its teacher and head."""


def encoder_alone(converted: Converted) -> Converted:
    """A data2vec model's encoder, the other tensors named as left out; any other model as it is."""
    config, info = converted.config, converted.info
    if config.kind not in ENCODER_KINDS:
        return converted
    kind, prefix = ENCODER_KINDS[config.kind], "encoder."

    def inner(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    left = tuple(name for name in converted.tensors if not name.startswith(prefix))
    return replace(
        converted,
        config=replace(config, kind=kind, architecture=dict(config.architecture["encoder"])),
        tensors=converted.part("encoder"),
        info=replace(info, kind=kind, unused=(*info.unused, *left), fresh=inner(info.fresh)),
        missing=inner(converted.missing),
    )


def split_unused(names: Iterable[str], patterns: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that match one of the ``patterns`` (``_ema.*``), and the others."""
    names = tuple(names)
    unused = tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
    return unused, tuple(name for name in names if name not in unused)


def describe_difference(converted: Converted, *, most: int = 20) -> str:
    """A table of what is missing, unexpected, left out and fresh; an empty text if the names match exactly."""
    info = converted.info
    parts = (
        ("missing in the file", converted.missing),
        ("unexpected in the file", converted.unexpected),
        ("left out", info.unused),
        ("not in such files, fresh", info.fresh),
    )
    lines = []
    for words, names in parts:
        if names:
            lines.append(f"  {words} ({len(names)}):")
            lines += [f"    {name}" for name in names[:most]]
            lines += [f"    ... and {len(names) - most} more"] if len(names) > most else []
    return "\n".join(lines)


def empty_model(kind: str, architecture: Mapping[str, Any], *, source: str | os.PathLike[str]) -> nn.Module:
    """The model without memory for its weights: names, shapes and complete settings; see
    :func:`toolkit.models.build.build_model`."""
    with torch.device("meta"):
        return build_model(kind, architecture, source=source)
