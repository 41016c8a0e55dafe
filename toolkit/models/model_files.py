"""The folder that a finished model lives in: ``model.safetensors``, ``config.json``, and its tokens if it has any.

The weights are plain tensors and the settings plain JSON: reading them runs no code, whoever wrote the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toolkit.data.tokens import Tokenizer
from toolkit.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FORMAT = "toolkit-model-1"
KINDS = (
    "wav2vec2_encoder", "wav2vec2_pretraining", "ctc", "text_encoder", "data2vec_audio", "data2vec_text",
    "text_classifier",
)  # fmt: skip
"""What a folder can hold; the encoder's tensors are under ``encoder.`` in all but the plain encoders."""

TEXT_KINDS = ("text_encoder", "data2vec_text", "text_classifier")
"""Those whose input is text: their sample_rate is 0."""


@dataclass(frozen=True)
class ModelConfig:
    """The settings in ``config.json``.

    kind : one of KINDS.
    architecture : the constructor's arguments, plain JSON.
    sample_rate : Hz, of the waveforms that the model was trained on; 0 for a model of text.
    normalize : whether each waveform is brought to zero mean and unit variance before it enters the model.
    tokens : kind, file and options of the tokenizer beside it (``toolkit.data.tokens.load_tokenizer``), or None.
    extra : anything else that the writer wanted to keep (plain JSON).
    """

    kind: str
    architecture: dict[str, Any]
    sample_rate: int
    normalize: bool
    tokens: dict[str, Any] | None
    extra: dict[str, Any]


@dataclass(frozen=True)
class ModelFolder:
    """A model folder read into memory: where it lies, its settings and its tensors by name."""

    path: Path
    config: ModelConfig
    tensors: dict[str, Tensor]


def save_model_folder(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    kind: str,
    sample_rate: int,
    normalize: bool,
    tokenizer: Tokenizer | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder, whole or not at all; one of ours that stands there already is replaced.

    Arguments
    ---------
    folder : where to.
    model : a module with ``config``, the arguments of its constructor as plain JSON.
    kind : one of KINDS.
    sample_rate : Hz; 0 for a model of text.
    normalize : see :class:`ModelConfig`.
    tokenizer : kept beside the model if given.
    extra : plain JSON to keep in the configuration.

    Raises
    ------
    CheckpointError : the kind is unknown, the settings are no plain JSON, or the folder holds other files.
    OSError : the folder cannot be written; what stood there before is untouched.
    """
    target = Path(folder).absolute()
    if kind not in KINDS:
        raise CheckpointError(f"{target}: a model of kind {kind!r} cannot be saved, the kinds are {', '.join(KINDS)}.")
    _refuse_foreign_files(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        config = {
            "format": FORMAT,
            "kind": kind,
            "architecture": model.config,
            "sample_rate": sample_rate,
            "normalize": normalize,
            "tokens": _save_tokens(tokenizer, fresh),
            "extra": dict(extra or {}),
        }
        state = {name: value.detach().to("cpu").contiguous() for name, value in model.state_dict().items()}
        save_file(state, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        try:
            text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{target}: the model's settings are no plain JSON ({error}); keep numbers, words, lists and "
                "mappings only."
            ) from error
        (fresh / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        fresh.chmod(0o755)
        for file in fresh.iterdir():
            flush_to_disk(file)
        replace_folder(fresh, target)
    except SafetensorError as error:
        # The library reports a full disk and the like in its own words.
        raise CheckpointError(
            f"{target}: the weights could not be written ({error}); look at the space left and try again."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def read_model_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Read and check a model folder's ``config.json``.

    Raises
    ------
    CheckpointError : the folder or the file is missing, or no configuration of ours.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such model folder; give the model/ folder of a finished run.")
    if not path.is_file():
        raise CheckpointError(f"{folder}: {CONFIG_FILE} is missing; give the model/ folder of a finished run.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: this is no whole JSON file ({error}); copy the folder again.") from error
    return _checked_config(raw, path)


def read_model_folder(folder: str | os.PathLike[str]) -> ModelFolder:
    """Read and check a model folder, weights included.

    Raises
    ------
    CheckpointError : a file is missing, truncated or foreign.
    """
    config = read_model_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: {WEIGHTS_FILE} is missing; give the model/ folder of a finished run.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: the file is truncated or no safetensors file ({error}); copy the folder again."
        ) from error
    return ModelFolder(Path(folder), config, tensors)


def load_tensors(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str | os.PathLike[str],
    allowed: frozenset[str] = frozenset(),
) -> None:
    """Copy tensors into a module's parameters and buffers of the same names, all or none of them.

    Arguments
    ---------
    module : where to.
    tensors : by the module's own names.
    source : the file or folder they come from, for the error.
    allowed : names that may be missing on either side.

    Raises
    ------
    CheckpointError : names or shapes differ.
    """
    own = module.state_dict()
    advice = f"build the model with the settings in the folder's {CONFIG_FILE}."
    if not (Path(source) / CONFIG_FILE).is_file():
        advice = "build the model with that file's sizes, which `python -m toolkit inspect` tells."
    if missing := sorted(own.keys() - tensors.keys() - allowed):
        raise CheckpointError(
            f"{source}: {len(missing)} of the model's {len(own)} tensors are not in the file ({_some(missing)}); "
            f"{advice}"
        )
    if unknown := sorted(tensors.keys() - own.keys() - allowed):
        raise CheckpointError(
            f"{source}: {len(unknown)} tensors of the file are not in the model ({_some(unknown)}); {advice}"
        )
    for name in own.keys() & tensors.keys():
        if own[name].shape != tensors[name].shape:
            raise CheckpointError(
                f"{source}: {name} has the shape {tuple(tensors[name].shape)}, the model's is "
                f"{tuple(own[name].shape)}; {advice}"
            )
    with torch.no_grad():
        for name in own.keys() & tensors.keys():
            own[name].copy_(tensors[name])


def _some(names: list[str], most: int = 3) -> str:
    """The first names of a list, and that there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _save_tokens(tokenizer: Tokenizer | None, folder: Path) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    return dict(tokenizer.config) | {"file": Path(tokenizer.save(folder)).name}


def _checked_config(raw: Any, path: Path) -> ModelConfig:
    """A ModelConfig, or one sentence about what is wrong with the file."""
    advice = "give the model/ folder of a run of this toolkit."
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise CheckpointError(f"{path}: the format is {found!r}, expected {FORMAT!r}; {advice}")
    if raw.get("kind") not in KINDS:
        raise CheckpointError(f"{path}: the kind is {raw.get('kind')!r}, known are {', '.join(KINDS)}; {advice}")
    expected = {"architecture": dict, "sample_rate": int, "normalize": bool, "tokens": (dict, type(None))}
    for key, kind in expected.items():
        if key not in raw or not isinstance(raw[key], kind) or (kind is int and isinstance(raw[key], bool)):
            raise CheckpointError(f"{path}: {key} is {raw.get(key, 'missing')!r}, which no model has; {advice}")
    is_text = raw["kind"] in TEXT_KINDS
    if raw["sample_rate"] != 0 if is_text else raw["sample_rate"] < 1:
        expected_rate = "0, for it is of text" if is_text else "Hz above 0"
        raise CheckpointError(f"{path}: sample_rate is {raw['sample_rate']}, expected {expected_rate}; {advice}")
    tokens = raw["tokens"]
    if tokens is not None:
        file = tokens.get("file")
        if not isinstance(file, str) or not file or PurePosixPath(file).name != file or "\\" in file or file == "..":
            raise CheckpointError(f"{path}: the tokens' file {file!r} is not a plain file name in the folder; {advice}")
    extra = raw.get("extra", {})
    return ModelConfig(
        kind=raw["kind"],
        architecture=raw["architecture"],
        sample_rate=raw["sample_rate"],
        normalize=raw["normalize"],
        tokens=tokens,
        extra=extra if isinstance(extra, dict) else {},
    )


def _refuse_foreign_files(folder: Path) -> None:
    """Never replace a folder that is not a model folder."""
    if folder.is_file():
        raise CheckpointError(f"{folder}: this is a file; give a folder for the model.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder}: the folder holds other files, which saving a model would delete; give an empty or new folder."
        )


def replace_folder(fresh: Path, target: Path) -> None:
    """Put ``fresh`` in the place of ``target``; the older folder goes only when the new one stands."""
    if not target.exists():
        os.rename(fresh, target)
    else:
        older = fresh.with_name(fresh.name + ".old")
        os.rename(target, older)
        try:
            os.rename(fresh, target)
        except OSError:
            os.rename(older, target)
            raise
        shutil.rmtree(older, ignore_errors=True)
    flush_to_disk(target.parent)


def flush_to_disk(path: Path) -> None:
    """Have the kernel write a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
