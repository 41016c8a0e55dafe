"""fairseq's checkpoints (.pt): wav2vec 2.0, models fine-tuned with CTC, and data2vec, to the toolkit's terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.data.tokens import LetterTokenizer
from toolkit.errors import CheckpointError, TokenError
from toolkit.models.convert.common import Converted, PretrainedInfo, split_unused
from toolkit.models.convert.fairseq_config import (
    SAMPLE_RATE,
    TEXT_PADDING,
    ctc_architecture,
    encoder_architecture,
    kept_encoder,
    kept_settings,
    kept_tokens,
    pretraining_architecture,
    text_architecture,
    training_notes,
)
from toolkit.models.convert.fairseq_data2vec import objective_architecture
from toolkit.models.convert.fairseq_names import CTC_PREFIX, HEADS, TEACHERS, TEXT_PREFIX, names_table
from toolkit.models.convert.fairseq_settings import Settings, plain, read_settings, setting
from toolkit.models.convert.fairseq_write import write_fairseq
from toolkit.models.convert.shapes import expected_shapes, import_checked
from toolkit.models.convert.unpickle import StandIn
from toolkit.models.model_files import TEXT_KINDS, ModelConfig

__all__ = ["is_fairseq", "read_fairseq", "write_fairseq"]

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
QUANTIZER = ("quantizer.*", "project_q.*", "target_glu.*")
AUDIO_HEADS = (*QUANTIZER, HEADS["data2vec_audio"] + "*", TEACHERS["data2vec_audio"] + "*")
"""What a pretraining model has on top of its encoder."""
TEXT_HEADS = (TEXT_PREFIX + "version", "encoder.lm_head.*", "classification_heads.*")
UNUSED: dict[str, tuple[str, ...]] = {
    "wav2vec2_pretraining": (),
    "wav2vec2_encoder": AUDIO_HEADS,
    "data2vec_audio": QUANTIZER,
    "text_encoder": (*TEXT_HEADS, HEADS["data2vec_text"] + "*", TEACHERS["data2vec_text"] + "*"),
    "data2vec_text": (*TEXT_HEADS, TEACHERS["data2vec_text"] + "version"),
    "ctc": tuple(CTC_PREFIX + pattern for pattern in AUDIO_HEADS),
}


def is_fairseq(contents: object) -> bool:
    """Whether an unpickled object is a checkpoint of fairseq's."""
    return isinstance(contents, Mapping) and "model" in contents and ("args" in contents or "cfg" in contents)


def read_fairseq(contents: Mapping[str, Any], path: Path) -> Converted:
    """A checkpoint in the toolkit's terms.

    Arguments
    ---------
    contents : of the file, as :func:`toolkit.models.convert.unpickle.read_pickle` gives them.
    path : the file; a dictionary of letters is looked for beside it.

    Raises
    ------
    CheckpointError : the model is of a kind or built with a setting that the toolkit lacks, or settings or tensors
        make no sense.
    TokenError : the dictionary beside the file is damaged.
    """
    config = contents.get("cfg") if contents.get("cfg") is not None else contents.get("args")
    settings = read_settings(config, path)
    weights, notes = _weights(contents["model"], path)
    name = _model_name(settings, weights, path)
    if name == "wav2vec_ctc":
        return _read_ctc(contents, settings, weights, path, notes)
    notes += training_notes(settings.model)
    if name in ("data2vec_text", "data2vec_audio"):
        kind, architecture, more = _data2vec(name, settings, weights, kept_settings(contents), path)
        notes += more
    elif any(key.startswith(("quantizer.", "project_q.", "final_proj.")) for key in weights):
        kind, architecture = "wav2vec2_pretraining", pretraining_architecture(settings, path)
    else:
        kind, architecture = "wav2vec2_encoder", encoder_architecture(settings.model, data2vec=False, path=path)
        notes += ("there are no tensors of the quantizer and its projections: this is the encoder alone",)
    if kind not in TEXT_KINDS:
        architecture.get("encoder", architecture).update(kept_encoder(kept_settings(contents)))
    return _converted(kind, architecture, settings, weights, path, notes)


def _data2vec(
    name: str, settings: Settings, weights: Mapping[str, Tensor], kept: Mapping[str, Any], path: Path
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Kind, arguments and notes: the whole model, or its encoder where the objective is not there or not known."""
    text = name == "data2vec_text"
    if text:
        encoder = _text_architecture(settings, weights, path)
    else:
        encoder = encoder_architecture(settings.model, data2vec=True, path=path)
    objective, notes = objective_architecture(name, settings.model, weights, kept, path)
    if not objective:
        return "text_encoder" if text else "wav2vec2_encoder", encoder, notes
    symbols = {"mask_id": encoder["vocab_size"] - 1} if text else {}  # the task adds the mask to its dictionary, last
    return name, {"encoder": encoder, **symbols, **objective}, notes


def _text_architecture(settings: Settings, weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    rows = []
    for name in ("embed_tokens", "embed_positions"):
        embedding = weights.get(f"{TEXT_PREFIX}{name}.weight")
        if embedding is None or embedding.dim() != 2:
            raise CheckpointError(f"{path}: {TEXT_PREFIX}{name}.weight is missing; the file holds no model of text.")
        rows.append(len(embedding))
    return text_architecture(settings.model, vocab_size=rows[0], max_positions=rows[1] - TEXT_PADDING - 1, path=path)


def _read_ctc(
    contents: Mapping[str, Any], settings: Settings, weights: dict[str, Tensor], path: Path, notes: tuple[str, ...]
) -> Converted:
    """A fine-tuned model, whose pretraining settings lie inside its own."""
    if settings.model.get("w2v_args") is None:
        raise CheckpointError(
            f"{path}: the settings of the pretrained model (w2v_args) are not in the file, only its path "
            f"{settings.model.get('w2v_path')!r}; load it in fairseq once and save it again, which stores them."
        )
    inner = read_settings(settings.model["w2v_args"], path)
    name = _model_name(inner, {key.removeprefix(CTC_PREFIX): value for key, value in weights.items()}, path)
    if name not in ("wav2vec2", "data2vec_audio"):
        raise CheckpointError(f"{path}: a model fine-tuned from {name!r} cannot be used here.")
    head = weights.get("w2v_encoder.proj.weight")
    if head is None or head.dim() != 2:
        raise CheckpointError(f"{path}: the output layer w2v_encoder.proj.weight is missing; the file is no CTC model.")
    architecture = ctc_architecture(settings, inner, data2vec=name == "data2vec_audio", path=path)
    architecture["vocab_size"] = len(head)
    architecture["encoder"] |= kept_encoder(kept_settings(contents))
    options = kept_tokens(kept_settings(contents))
    tokenizer = _tokenizer(settings, contents.get("task_state"), options, len(head), path)
    notes += training_notes({**inner.model, **settings.model})
    if tokenizer is None:
        notes += ("no dictionary (dict.ltr.txt) lies beside the file: the meaning of the outputs is not known",)
    return _converted("ctc", architecture, settings, weights, path, notes, tokenizer)


def _converted(
    kind: str,
    architecture: dict[str, Any],
    settings: Settings,
    weights: dict[str, Tensor],
    path: Path,
    notes: tuple[str, ...],
    tokenizer: LetterTokenizer | None = None,
) -> Converted:
    expected = expected_shapes(kind, architecture, source=path, num_tensors=len(weights))
    tensors, missing, rest = import_checked(names_table(kind, architecture), weights, expected, source=path)
    unused, unexpected = split_unused(rest, UNUSED[kind])
    rate = 0 if kind in TEXT_KINDS else setting(settings.task, "sample_rate", int, SAMPLE_RATE, path)
    if rate < 1 and kind not in TEXT_KINDS:
        raise CheckpointError(f"{path}: the setting sample_rate is {rate}, expected Hz above 0.")
    said = setting(settings.model, "normalize", bool, False, path)  # fine-tuned models say it in both places
    normalize = kind not in TEXT_KINDS and setting(settings.task, "normalize", bool, said, path)
    info = PretrainedInfo(
        kind=kind,
        source=f"fairseq, {settings.generation}",
        sample_rate=rate,
        normalize=normalize,
        labels=None if tokenizer is None else tokenizer.labels,
        unused=unused,
        notes=notes,
    )
    tokens = None if tokenizer is None else tokenizer.config
    config = ModelConfig(kind, architecture, sample_rate=rate, normalize=normalize, tokens=tokens, extra={})
    return Converted(config, tensors, info, tokenizer=tokenizer, missing=missing, unexpected=unexpected)


def _weights(model: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """All tensors by name, a nested dict's after a dot, in float32 at least; and a note if they were not."""
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{path}: 'model' holds no tensors by name; the file is damaged.")
    weights: dict[str, Tensor] = {}
    for name, value in model.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for rest, tensor in inner:
            full = f"{name}.{rest}" if rest else str(name)
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{path}: {full} is no tensor; the file is damaged or of another program.")
            weights[full] = tensor.detach()
    halves = {name for name, value in weights.items() if value.dtype in (torch.float16, torch.bfloat16)}
    if not halves:
        return weights, ()
    formats = sorted({str(weights[name].dtype).removeprefix("torch.") for name in halves})
    widened = {name: value.float() if name in halves else value for name, value in weights.items()}
    return widened, (f"{len(halves)} tensors were stored as {' and '.join(formats)} and are widened to float32",)


def _model_name(settings: Settings, weights: Mapping[str, Tensor], path: Path) -> str:
    """The registered name of the model; from its tensors where the settings say none."""
    if any("modality_encoders." in name for name in weights) or settings.name == "data2vec_multi":
        raise CheckpointError(
            f"{path}: this is a data2vec 2.0 model, which the toolkit does not have; data2vec 1 it has."
        )
    name = settings.name
    if name is None:
        name = "wav2vec_ctc" if any(key.startswith(CTC_PREFIX) for key in weights) else "wav2vec2"
    if name not in ("wav2vec2", "wav2vec_ctc", "data2vec_audio", "data2vec_text"):
        raise CheckpointError(
            f"{path}: a model of fairseq's architecture {name!r} cannot be used here; known are wav2vec2, wav2vec_ctc, "
            "data2vec_audio and data2vec_text."
        )
    return name


def _tokenizer(
    settings: Settings, task_state: Any, options: dict[str, Any], rows: int, path: Path
) -> LetterTokenizer | None:
    """The dictionary in the checkpoint, or beside it."""
    stored = task_state.get("target_dictionary") if isinstance(task_state, Mapping) else None
    if isinstance(stored, StandIn):
        tokenizer, source = _stored_dictionary(plain(stored), options, path), "the dictionary in it"
    else:
        labels = settings.task.get("labels")
        labels = labels if isinstance(labels, str) and re.fullmatch(r"[\w-]+", labels) else "ltr"
        file = next((path.with_name(f"dict.{kind}.txt") for kind in (labels, "ltr")
                     if path.with_name(f"dict.{kind}.txt").is_file()), None)  # fmt: skip
        if file is None:
            return None
        tokenizer, source = LetterTokenizer.from_file(file, **options), file.name
    if tokenizer.vocab_size != rows:
        raise CheckpointError(
            f"{path}: the model has {rows} outputs, but {source} holds {tokenizer.vocab_size} symbols, the four "
            "special ones included; put the dictionary that the model was trained with beside it."
        )
    return tokenizer


def _stored_dictionary(state: Any, options: dict[str, Any], path: Path) -> LetterTokenizer:
    symbols, counts = (state.get(key) if isinstance(state, dict) else None for key in ("symbols", "count"))
    if not isinstance(symbols, list) or symbols[:4] != SPECIALS or not all(isinstance(name, str) for name in symbols):
        raise CheckpointError(f"{path}: the dictionary in it is not {', '.join(SPECIALS)} and then symbols.")
    if len(set(symbols)) != len(symbols):
        raise TokenError(f"{path}: the dictionary in it holds a symbol twice.")
    if not isinstance(counts, list) or len(counts) != len(symbols) or any(type(count) is not int for count in counts):
        counts = [0] * len(symbols)
    pairs = list(zip(symbols, counts, strict=True))
    return LetterTokenizer(dict(pairs[len(SPECIALS) :]), **options, source=str(path))
