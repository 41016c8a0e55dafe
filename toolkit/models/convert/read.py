"""Any file or folder of a model, recognized by its content and read into the toolkit's own terms."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.data.tokens import LetterTokenizer, load_tokenizer
from toolkit.errors import CheckpointError
from toolkit.models.convert.common import Converted, PretrainedInfo
from toolkit.models.convert.fairseq import is_fairseq, read_fairseq
from toolkit.models.convert.huggingface import is_huggingface, read_huggingface
from toolkit.models.convert.shapes import expected_shapes
from toolkit.models.convert.speechbrain import is_speechbrain, read_speechbrain
from toolkit.models.convert.torchaudio import is_torchaudio, read_torchaudio
from toolkit.models.convert.unpickle import read_pickle
from toolkit.models.model_files import CONFIG_FILE, FORMAT, WEIGHTS_FILE, read_model_folder
from toolkit.models.text_classifier import LABELS

KNOWN = (
    "a model/ folder of this toolkit, a fairseq checkpoint (.pt), a Hugging Face folder (config.json with "
    "model.safetensors or pytorch_model.bin), a torchaudio state dict, or SpeechBrain's saved pretraining folder"
)


def read_pretrained(path: str | os.PathLike[str]) -> Converted:
    """Read a model of any known kind; no code of the file runs, whoever wrote it.

    Arguments
    ---------
    path : file or folder.

    Raises
    ------
    CheckpointError : there is no such file, it is damaged, of no known form, or of a model that the toolkit lacks.
    """
    converted = _read(Path(path))
    wrong = [name for name, value in converted.tensors.items() if not bool(value.isfinite().all())]
    if not wrong:
        return converted
    note = f"{len(wrong)} tensors hold values that are not finite ({', '.join(wrong[:3])}); the model will not work"
    return replace(converted, info=replace(converted.info, notes=(*converted.info.notes, note)))


def _read(path: Path) -> Converted:
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder; check the path.")
    if path.suffix == ".safetensors" or _beside_huggingface(path):
        return _read_folder(path.parent, weights=path)
    contents = read_pickle(path)
    if is_fairseq(contents):
        return read_fairseq(contents, path)
    if is_torchaudio(contents):
        return read_torchaudio(contents, path)
    raise CheckpointError(f"{path}: the file holds no model that is known here; give {KNOWN}.")


def _read_folder(folder: Path, weights: Path | None = None) -> Converted:
    config = _json_config(folder)
    if config is not None and config.get("format") == FORMAT:
        if weights is not None and weights.name != WEIGHTS_FILE:
            raise CheckpointError(f"{weights}: the model of this folder is in {WEIGHTS_FILE}; give {folder}.")
        return _read_own(folder)
    if config is not None and is_huggingface(config):
        return read_huggingface(folder, weights)
    if is_speechbrain(folder):
        return read_speechbrain(folder)
    if config is not None:
        return _read_own(folder)  # its error says what is wrong with config.json
    raise CheckpointError(f"{folder}: {CONFIG_FILE} is missing, so this is no model; give {KNOWN}.")


def _json_config(folder: Path) -> dict[str, Any] | None:
    """The object in ``config.json``; None without the file."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: this is no whole JSON file ({error}); copy the folder again.") from error
    return config if isinstance(config, dict) else {}


def _beside_huggingface(path: Path) -> bool:
    """Whether a weights file lies in a Hugging Face folder, under the name that such folders use."""
    if path.name != "pytorch_model.bin":
        return False
    config = _json_config(path.parent)
    return config is not None and is_huggingface(config)


def _read_own(folder: Path) -> Converted:
    contents = read_model_folder(folder)
    config, tensors = contents.config, contents.tensors
    tokenizer = load_tokenizer(folder) if config.tokens else None
    labels = tokenizer.labels if isinstance(tokenizer, LetterTokenizer) else None
    if config.kind == "text_classifier":
        kept = config.extra.get(LABELS)
        is_whole = isinstance(kept, list) and all(isinstance(label, str) for label in kept)
        labels = tuple(kept) if is_whole else None
    info = PretrainedInfo(
        kind=config.kind,
        source="toolkit",
        sample_rate=config.sample_rate,
        normalize=config.normalize,
        labels=labels,
    )
    expected = expected_shapes(config.kind, config.architecture, source=folder, num_tensors=len(tensors))
    return Converted(
        config,
        {name: value for name, value in tensors.items() if name in expected},
        info,
        tokenizer=tokenizer,
        missing=tuple(name for name in expected if name not in tensors),
        unexpected=tuple(sorted(tensors.keys() - expected.keys())),
    )
