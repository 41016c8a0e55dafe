"""A folder of recorded numbers: checkpoint.pt, tensors.safetensors, meta.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from toolkit.errors import ToolkitError

CHECKPOINT, TENSORS, META = "checkpoint.pt", "tensors.safetensors", "meta.json"
SCALAR_GROUPS = ("scalars", "float64_reference")
"""Sections of meta.json that hold recorded results; the others describe the model, the inputs and the precision."""


class RecordingError(ToolkitError):
    """A folder cannot be compared; one sentence says why."""


@dataclass(frozen=True)
class Tolerance:
    """|ours - theirs| may be absolute + relative * |theirs| + of_largest * max |theirs|; ``text`` as it was written."""

    text: str
    absolute: float = 0.0
    relative: float = 0.0
    of_largest: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """From words such as "atol 1e-4", "rtol 2e-3, atol 2e-4 * max|grad|", "rtol 2e-3 of max".

        A relative tolerance alone is one of the largest entry where the entries of a tensor pass through zero, so
        that is what :meth:`alone_of_largest` makes of it for gradients.

        Raises
        ------
        RecordingError : other words.
        """
        amounts = {"absolute": 0.0, "relative": 0.0, "of_largest": 0.0}
        for clause in text.split(","):
            match = re.fullmatch(r"\s*(atol|rtol)\s+([0-9.eE+-]+)\s*(\*?\s*(?:of\s+)?max.*)?", clause)
            try:
                value = float(match[2]) if match else -1.0
            except ValueError:
                value = -1.0
            if match is None or not 0 <= value < 1:
                raise RecordingError(
                    f"the tolerance {text!r} is not understood; expected words such as 'atol 1e-4' or 'rtol 1e-5'."
                )
            kind = "of_largest" if match[3] else {"atol": "absolute", "rtol": "relative"}[match[1]]
            amounts[kind] += value
        return cls(text.strip(), **amounts)

    def alone_of_largest(self) -> Tolerance:
        """A tolerance that is only relative, taken of the largest entry."""
        if self.absolute or self.of_largest:
            return self
        return Tolerance(self.text, of_largest=self.relative)


RECOMMENDED = {
    "activations": "atol 1e-4",
    "logits": "atol 2e-4",
    "gradients": "rtol 1e-3 of max",
    "loss": "rtol 1e-5",
    "ema": "atol 1e-6",
    "schedule": "rtol 1e-12",
}
"""The limits that the README of the recordings recommends; they hold where a meta.json gives none."""

SYNONYMS = {
    "logits": ("logits", "log_probs"),
    "loss": ("loss", "total_loss"),
}
"""Under which names a meta.json gives a tolerance."""


@dataclass(frozen=True)
class Recording:
    """What a folder holds.

    folder : where.
    meta : meta.json.
    tensors : by recorded name.
    scalars : by dotted path, numbers and lists of words.
    tolerances : by kind of quantity, see :data:`RECOMMENDED`.
    """

    folder: Path
    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, Any]
    tolerances: Mapping[str, Tolerance]

    def tensor(self, name: str) -> Tensor:
        """A tensor without which the model cannot be run."""
        if name not in self.tensors:
            raise RecordingError(f"{self.folder / TENSORS}: {name} is missing, and the model cannot be run without it.")
        return self.tensors[name]

    def number(self, path: str) -> int:
        """A scalar without which the model cannot be run."""
        value = self.scalars.get("scalars." + path)
        if not isinstance(value, (int, float)):
            raise RecordingError(f"{self.folder / META}: scalars has no number {path}, without which nothing can run.")
        return int(value)


def read_recording(folder: str | os.PathLike[str]) -> Recording:
    """Read a folder.

    Raises
    ------
    RecordingError : the folder or a file of it is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RecordingError(f"{folder}: there is no such folder; give folders with {CHECKPOINT}, {TENSORS}, {META}.")
    for name in (CHECKPOINT, TENSORS, META):
        if not (folder / name).is_file():
            raise RecordingError(f"{folder}: {name} is missing; a recording is {CHECKPOINT}, {TENSORS} and {META}.")
    meta = _read_meta(folder / META)
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError, ValueError) as error:
        raise RecordingError(f"{folder / TENSORS}: this is no whole safetensors file ({error}).") from error
    _check_listed(folder, meta, tensors)
    scalars = {path: value for group in SCALAR_GROUPS for path, value in _leaves(meta.get(group, {}), group)}
    return Recording(folder, meta, tensors, scalars, _tolerances(folder, meta))


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecordingError(f"{path}: this is no whole JSON file ({error}).") from error
    if not isinstance(meta, dict):
        raise RecordingError(f"{path}: expected an object with scalars and tensors, found a {type(meta).__name__}.")
    for key in ("scalars", "tensors"):
        if not isinstance(meta.get(key), dict) or not meta[key]:
            raise RecordingError(f"{path}: the section {key!r} is missing or empty; copy the file again.")
    return meta


def _check_listed(folder: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Every tensor that meta.json lists is there, with its shape; what it does not list is compared all the same."""
    for name, entry in meta["tensors"].items():
        if name not in tensors:
            raise RecordingError(f"{folder / TENSORS}: {name} is missing, which {META} lists; copy the file again.")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if shape is not None and list(tensors[name].shape) != shape:
            raise RecordingError(
                f"{folder / TENSORS}: {name} has the shape {list(tensors[name].shape)}, {META} says {shape}."
            )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf): numbers, words, and lists of words as they are."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list) and not any(isinstance(item, str) for item in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{index}")
    else:
        yield path, value


def _tolerances(folder: Path, meta: Mapping[str, Any]) -> dict[str, Tolerance]:
    given = meta.get("suggested_tolerance", {})
    if not isinstance(given, dict):
        raise RecordingError(f"{folder / META}: suggested_tolerance is {given!r}, expected an object of words.")
    out = {}
    for kind, recommended in RECOMMENDED.items():
        name = next((name for name in SYNONYMS.get(kind, (kind,)) if name in given), None)
        try:
            tolerance = Tolerance.parse(str(given[name]) if name is not None else recommended)
        except RecordingError as error:
            raise RecordingError(f"{folder / META}: {error}") from error
        out[kind] = tolerance.alone_of_largest() if kind == "gradients" else tolerance
    return out
