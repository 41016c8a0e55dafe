"""Hugging Face folders: config.json, model.safetensors or pytorch_model.bin, preprocessor_config.json, vocab.json.

Both ways keep every number. What transformers' settings cannot say (the feature penalty, the schedule of the
temperature) stands under "toolkit" in config.json, where transformers leaves it alone; what the toolkit has no place
for (the order of a head's rows, unknown settings) is kept in the model folder's ``extra`` under "huggingface".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from toolkit.data.tokens import LetterTokenizer
from toolkit.errors import CheckpointError, TokenError, ToolkitError
from toolkit.models.convert.common import Converted, PretrainedInfo, split_unused
from toolkit.models.convert.huggingface_config import (
    DATA2VEC_TEXT,
    PREFIXES,
    Settings,
    architecture_of,
    model_type_and_kind,
    settings_of,
)
from toolkit.models.convert.huggingface_names import (
    HEADS,
    MEMORY,
    OWN,
    PICKLED_FILE,
    POOLER,
    PREPROCESSOR_FILE,
    TOKEN_SETTINGS,
    TOKEN_TYPES,
    names_table,
)
from toolkit.models.convert.huggingface_tokens import (
    NEVER,
    TOKEN_FILES,
    Vocabulary,
    read_json_object,
    read_vocabulary,
    rows_to_ours,
)
from toolkit.models.convert.huggingface_write import write_huggingface
from toolkit.models.convert.shapes import expected_shapes, import_checked
from toolkit.models.convert.unpickle import read_pickle
from toolkit.models.model_files import CONFIG_FILE, TEXT_KINDS, WEIGHTS_FILE, ModelConfig

__all__ = ["is_huggingface", "read_huggingface", "write_huggingface"]


def is_huggingface(config: Mapping[str, Any]) -> bool:
    """Whether the object in a config.json is Hugging Face's."""
    return "model_type" in config or "architectures" in config


def read_huggingface(folder: Path, weights: Path | None = None) -> Converted:
    """A folder in the toolkit's terms; ``weights`` names the file of weights, None: what lies there.

    Raises
    ------
    CheckpointError : a file is missing or damaged, tensors have other shapes than the settings say, or the toolkit
        lacks the model; tensors that are missing or too many are the result's to tell.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    config = read_json_object(path)
    if config is None:
        raise CheckpointError(f"{folder}: {CONFIG_FILE} is missing; copy the whole folder.")
    file, source = _read_weights(folder, weights)
    model_type, kind = model_type_and_kind(config, frozenset(source), path)
    prefix = PREFIXES[model_type]
    original = {name.removeprefix(prefix): name for name in source}
    if len(original) < len(source):
        raise CheckpointError(f"{file}: tensors stand there twice, with and without {prefix!r} before their names.")
    tensors = {name: source[full] for name, full in original.items()}
    files = {name: contents for name in TOKEN_FILES if (contents := read_json_object(folder / name)) is not None}
    vocabulary = _vocabulary(config, files, tensors, folder) if kind == "ctc" else Vocabulary(())
    notes = list(vocabulary.notes)
    architecture, extra = _settings(config, model_type, kind, len(vocabulary.rows), path, notes)
    if model_type == DATA2VEC_TEXT:
        architecture = architecture | _text_parts(tensors, file)
        if architecture["token_types"] > 1:
            notes.append("token types other than the first are kept and not used: here all tokens are of one type")
    found, missing, unused, unexpected, fresh = _import(kind, model_type, architecture, tensors, file, path)
    preprocessor = read_json_object(folder / PREPROCESSOR_FILE)
    rate, normalize = (0, False) if kind in TEXT_KINDS else _sound(preprocessor, folder, notes)
    if extra is None:
        files |= {PREPROCESSOR_FILE: preprocessor} if preprocessor is not None else {}
        labels = vocabulary.tokenizer.labels if vocabulary.tokenizer else None
        memory = {"config": config, "files": files, "rows": list(vocabulary.rows), "labels": labels and list(labels)}
        extra = {MEMORY: memory}
    tokenizer = _tokenizer_of(config, vocabulary.tokenizer)
    info = PretrainedInfo(
        kind=kind,
        source=f"Hugging Face, {model_type}",
        sample_rate=rate,
        normalize=normalize,
        labels=tokenizer.labels if tokenizer else None,
        unused=tuple(original[name] for name in unused),
        fresh=fresh,
        notes=tuple(notes),
    )
    tokens = tokenizer.config if tokenizer else None
    model = ModelConfig(kind, architecture, rate, normalize, tokens, extra)
    return Converted(model, found, info, tokenizer, missing, tuple(original[name] for name in unexpected))


def _read_weights(folder: Path, weights: Path | None) -> tuple[Path, dict[str, Tensor]]:
    """The file that was read, and all tensors by the file's names."""
    names = (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json", PICKLED_FILE, f"{PICKLED_FILE}.index.json")
    file = weights or next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: there are no weights ({' or '.join(names)}); copy the whole folder.")
    if file.name not in names[1::2]:
        return file, _read_tensors(file)
    index = read_json_object(file) or {}
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(
            f"{file}: weight_map, the table from tensors to files, is missing; copy the folder again."
        )
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if PurePosixPath(shard).name != shard or "\\" in shard or not (folder / shard).is_file():
            raise CheckpointError(f"{file}: the file {shard!r} that it names is not in the folder; copy it too.")
        tensors |= _read_tensors(folder / shard)
    if absent := sorted(places.keys() - tensors.keys()):
        raise CheckpointError(f"{file}: {absent[0]} is not in the file {places[absent[0]]}; copy the folder again.")
    return file, tensors


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: the file is truncated or no safetensors file ({error}); copy the folder again."
            ) from error
    contents = read_pickle(file)
    if not isinstance(contents, Mapping) or not all(isinstance(value, Tensor) for value in contents.values()):
        raise CheckpointError(f"{file}: the file holds no table of tensors; copy the folder again.")
    return {str(name): value for name, value in contents.items()}


def _vocabulary(
    config: Mapping[str, Any], files: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path
) -> Vocabulary:
    """The meaning of the head's rows, which change their places in ``tensors``."""
    settings = Settings(config, folder / CONFIG_FILE)
    weight = tensors.get("lm_head.weight")
    outputs = len(weight) if weight is not None and weight.ndim else settings.get("vocab_size", 32)
    blank = None if config.get("pad_token_id", 0) is None else settings.get("pad_token_id", 0)
    vocabulary = read_vocabulary(files, outputs, blank, source=folder)
    for name, made_up in (("lm_head.weight", 0.0), ("lm_head.bias", NEVER)):
        if name in tensors and len(tensors[name]) == outputs:
            tensors[name] = rows_to_ours(tensors[name], vocabulary.rows, made_up)
    return vocabulary


def _settings(
    config: Mapping[str, Any], model_type: str, kind: str, outputs: int, path: Path, notes: list[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The architecture, and the extra that the toolkit wrote; None where the folder is not the toolkit's."""
    architecture = architecture_of(config, model_type, kind, outputs=outputs, source=path)
    own = config.get(OWN)
    if isinstance(own, dict) and own.get("kind") == kind and isinstance(own.get("architecture"), dict):
        try:
            same = all(
                config.get(key) == value
                for key, value in settings_of(kind, own["architecture"]).items()
                if key not in TOKEN_SETTINGS
            )
        except (ToolkitError, TypeError, KeyError, ValueError, AttributeError, IndexError):
            same = False
        if same and (kind != "ctc" or own["architecture"].get("vocab_size") == outputs):
            return own["architecture"], own["extra"] if isinstance(own.get("extra"), dict) else {}
        notes.append(f"the settings under {OWN!r} in {CONFIG_FILE} are of another model than those beside it: left out")
    if kind == "wav2vec2_pretraining":
        notes.append(
            "the folder does not say the temperature's schedule and has no feature penalty: 2.0 to 0.5 by 0.999995 an "
            "update, and none, as in transformers' training script"
        )
        if architecture["encoder"]["mask_prob"] < 0.3:
            notes.append("mask_time_prob in config.json is for fine-tuning; pretraining takes 0.65")
    if config.get("mask_feature_min_masks", 0):
        notes.append("mask_feature_min_masks is left out: channels may go unmasked here")
    return architecture, None


def _import(
    kind: str, model_type: str, architecture: Mapping[str, Any], tensors: dict[str, Tensor], file: Path, path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Tensors by our names; then names: missing (ours), unused and unexpected (theirs), fresh (ours)."""
    expected = expected_shapes(kind, architecture, source=path, num_tensors=len(tensors))
    inner = "" if kind in ("wav2vec2_encoder", "text_encoder") else "encoder."
    found, missing, left = import_checked(names_table(model_type, inner), tensors, expected, source=file)
    unused, unexpected = split_unused(left, HEADS if not inner else ())
    fresh: tuple[str, ...] = ()
    mask = f"{inner}mask_embedding"
    if mask in missing and kind != "wav2vec2_pretraining":
        fresh, missing = (mask,), tuple(name for name in missing if name != mask)
    return found, missing, unused, unexpected, fresh


def _text_parts(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """Which of Data2VecTextModel's further parts are there and do something: token types that are not zero, and a
    pooler that is not the identity. Without them the writer puts just these in their places."""
    types, weight, bias = (tensors.get(name) for name in (TOKEN_TYPES, f"{POOLER}.weight", f"{POOLER}.bias"))
    if types is not None and types.ndim != 2:
        raise CheckpointError(f"{file}: {TOKEN_TYPES} has the shape {tuple(types.shape)}; copy the folder again.")
    pooled = weight is not None and bias is not None
    if pooled and weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
        pooled = bool(bias.any()) or not torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype))
    return {"token_types": len(types) if types is not None and bool(types.any()) else 0, "pooler": pooled}


def _sound(preprocessor: Mapping[str, Any] | None, folder: Path, notes: list[str]) -> tuple[int, bool]:
    """Sample rate and normalization."""
    if preprocessor is None:
        notes.append(f"{PREPROCESSOR_FILE} is missing: 16000 Hz, waveforms brought to zero mean and unit variance")
    settings = Settings(preprocessor or {}, folder / PREPROCESSOR_FILE)
    rate = settings.get("sampling_rate", 16000)
    if rate < 1:
        raise CheckpointError(f"{folder / PREPROCESSOR_FILE}: sampling_rate is {rate}, expected Hz above 0.")
    return rate, settings.get("do_normalize", True)


def _tokenizer_of(config: Mapping[str, Any], found: LetterTokenizer | None) -> LetterTokenizer | None:
    """The tokenizer of vocab.json, with the options that the toolkit kept if the folder is its own."""
    own = config.get(OWN)
    tokens = own.get("tokens") if isinstance(own, dict) else None
    if found is None or not isinstance(tokens, dict):
        return found
    try:
        counts = dict(zip(found.symbols, tokens["counts"], strict=True))
        return LetterTokenizer(counts, **{key: tokens[key] for key in ("unknown", "case", "word_boundary")})
    except (TokenError, KeyError, TypeError, ValueError):
        return found
