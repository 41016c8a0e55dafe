"""Writing Hugging Face folders."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from toolkit.data.tokens import LetterTokenizer
from toolkit.errors import CheckpointError
from toolkit.models.convert.common import Converted, encoder_alone, export_tensors
from toolkit.models.convert.huggingface_config import (
    DEFAULT_TYPES,
    PREFIXES,
    TEXT_PARTS,
    architecture_of,
    complete,
    settings_of,
)
from toolkit.models.convert.huggingface_names import (
    HEAD_TABLE,
    MEMORY,
    OWN,
    POOLER,
    PREPROCESSOR_FILE,
    TOKEN_SETTINGS,
    TOKEN_TYPES,
    encoder_table,
    text_table,
)
from toolkit.models.convert.huggingface_tokens import TOKEN_FILES, read_json_object, rows_to_theirs, token_files
from toolkit.models.convert.shapes import expected_shapes
from toolkit.models.model_files import CONFIG_FILE, WEIGHTS_FILE, ModelConfig, flush_to_disk, replace_folder


def write_huggingface(converted: Converted, folder: Path) -> None:
    """Write a folder that ``from_pretrained`` opens, whole or not at all; of a data2vec model its encoder.

    Raises
    ------
    CheckpointError : transformers has no such model, tensors are missing, or the folder holds other files.
    OSError : the folder cannot be written; what stood there before is untouched.
    """
    target = Path(folder).absolute()
    _refuse_other_files(target)
    converted = encoder_alone(converted)
    kind = converted.config.kind
    config, files, rows = _describe(converted)
    expected = expected_shapes(kind, converted.config.architecture, source=target)
    if absent := sorted(expected.keys() - converted.tensors.keys() - set(converted.info.fresh)):
        raise CheckpointError(f"{target}: {len(absent)} of the model's tensors are missing ({absent[0]}, ...).")
    tensors = _export(converted, config, rows)
    types = {str(value.dtype).removeprefix("torch.") for value in tensors.values() if value.is_floating_point()}
    if len(types) == 1:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = types.pop()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        for name, contents in ({CONFIG_FILE: config} | files).items():
            text = json.dumps(contents, indent=2, ensure_ascii=False)
            (fresh / name).write_text(text + "\n", encoding="utf-8")
        fresh.chmod(0o755)
        for file in fresh.iterdir():
            flush_to_disk(file)
        replace_folder(fresh, target)
    except SafetensorError as error:
        raise CheckpointError(
            f"{target}: the weights could not be written ({error}); look at the space left and try again."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _refuse_other_files(target: Path) -> None:
    """Only an empty folder, or one that was written here before, is replaced."""
    if target.is_file():
        raise CheckpointError(f"{target}: this is a file; give a folder.")
    if target.is_dir() and any(target.iterdir()) and OWN not in (read_json_object(target / CONFIG_FILE) or {}):
        raise CheckpointError(f"{target}: the folder holds other files; give an empty or new folder.")


def _describe(converted: Converted) -> tuple[dict[str, Any], dict[str, Any], tuple[int | None, ...] | None]:
    """config.json, the other files, and the order of the head's rows (None: as they are)."""
    model = converted.config
    memory = model.extra.get(MEMORY)
    memory = memory if isinstance(memory, dict) and isinstance(memory.get("config"), dict) else {}
    settings = settings_of(model.kind, model.architecture)
    architectures = settings["architectures"]
    original = dict(memory.get("config", {}))
    files, rows = _token_files(converted, memory)
    own_tokens = rows is None and model.kind == "ctc"
    if original and not own_tokens and model.kind != "text_encoder":
        settings = {key: value for key, value in settings.items() if key not in TOKEN_SETTINGS}
    unchanged = bool(original) and not own_tokens and _same(original, model)
    config = (
        original | {"architectures": architectures}
        if unchanged
        else original | settings | {"architectures": architectures}
    )
    if model.kind != "text_encoder":
        files[PREPROCESSOR_FILE] = _preprocessor(converted, memory.get("files", {}).get(PREPROCESSOR_FILE))
    if unchanged:
        return config, files, rows
    tokenizer = converted.tokenizer
    letters = isinstance(tokenizer, LetterTokenizer)  # a model of text has none there: its config says what it read
    tokens = dict(tokenizer.config) | {"counts": list(tokenizer.counts)} if letters else None
    own = {"kind": model.kind, "architecture": model.architecture, "tokens": tokens, "extra": model.extra}
    return config | {OWN: own}, files, rows


def _same(original: Mapping[str, Any], model: ModelConfig) -> bool:
    """Whether config.json, as it was read, still describes the model."""
    model_type = settings_of(model.kind, model.architecture)["model_type"]
    outputs = model.architecture.get("vocab_size", 0)
    try:
        read = architecture_of(original, model_type, model.kind, outputs=outputs, source=CONFIG_FILE)
    except CheckpointError:
        return False
    if model.kind == "text_encoder":
        # told by the tensors, not by the file
        read |= {name: model.architecture[name] for name in TEXT_PARTS if name in model.architecture}
    return complete(model.kind, read) == complete(model.kind, model.architecture)


def _token_files(
    converted: Converted, memory: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[int | None, ...] | None]:
    """The tokenizer's files, and the order of rows that they were read with."""
    if converted.config.kind != "ctc":
        return {}, None
    tokenizer = converted.tokenizer
    if tokenizer is not None and not isinstance(tokenizer, LetterTokenizer):
        raise CheckpointError(
            "the model cannot be written as a Hugging Face folder: the CTC tokenizer there spells letters, and this "
            "model's tokens are SentencePiece's."
        )
    labels = None if tokenizer is None else list(tokenizer.labels)
    outputs = converted.config.architecture["vocab_size"]
    rows = memory.get("rows")
    if isinstance(rows, list) and len(rows) == outputs and labels == memory.get("labels"):
        return {name: memory["files"][name] for name in TOKEN_FILES if name in memory["files"]}, tuple(rows)
    if tokenizer is None:
        return {}, None
    if tokenizer.vocab_size != outputs:
        raise CheckpointError(
            f"the model has {outputs} outputs and its tokenizer {tokenizer.vocab_size} symbols; they are of two models."
        )
    return token_files(tokenizer), None


def _preprocessor(converted: Converted, original: Mapping[str, Any] | None) -> dict[str, Any]:
    model = converted.config
    encoder = model.architecture.get("encoder", model.architecture)
    defaults = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        # A group norm sees the padding, attention mask or not: these models were trained without.
        "return_attention_mask": encoder.get("extractor_norm", "group") == "layer",
    }
    if model.kind == "ctc":
        defaults["processor_class"] = "Wav2Vec2Processor"
    return dict(original or defaults) | {"do_normalize": model.normalize, "sampling_rate": model.sample_rate}


def _export(converted: Converted, config: Mapping[str, Any], rows: tuple[int | None, ...] | None) -> dict[str, Tensor]:
    """Tensors by transformers' names."""
    kind = converted.config.kind
    if kind == "text_encoder":
        return _export_text(converted.tensors, config.get("type_vocab_size", DEFAULT_TYPES))
    tensors = dict(converted.tensors)
    if rows is not None:
        tensors |= {name: rows_to_theirs(tensors[name], rows) for name in ("head.weight", "head.bias")}
    inner = "" if kind == "wav2vec2_encoder" else "encoder."
    mask = f"{inner}mask_embedding"
    if not config.get("mask_time_prob", 0.05) and not config.get("mask_feature_prob", 0.0):
        tensors.pop(mask, None)  # transformers has the vector only where something is masked
    elif mask not in tensors and OWN in config:
        dim = len(tensors[f"{inner}transformer.norm.weight"])
        tensors[mask] = torch.rand(dim, generator=torch.Generator().manual_seed(0))  # as it is drawn at the start
    model_type = config["model_type"]
    prefix = PREFIXES[model_type] if inner else ""
    encoder = {name.removeprefix(inner): value for name, value in tensors.items() if name.startswith(inner)}
    heads = {name: value for name, value in tensors.items() if not name.startswith(inner)}
    out = export_tensors(encoder_table(model_type), encoder)
    return {prefix + name: value for name, value in out.items()} | export_tensors(HEAD_TABLE, heads)


def _export_text(tensors: Mapping[str, Tensor], types: int) -> dict[str, Tensor]:
    """The encoder's tensors, and what transformers' model has besides: token types, which add nothing where the
    encoder has none, and a pooler, which is then the identity."""
    out = export_tensors(text_table(), tensors)
    weight = tensors["token_embedding.weight"]
    out.setdefault(TOKEN_TYPES, weight.new_zeros(types, weight.shape[1]))
    out.setdefault(f"{POOLER}.weight", torch.eye(weight.shape[1], dtype=weight.dtype))
    out.setdefault(f"{POOLER}.bias", weight.new_zeros(weight.shape[1]))
    return out
