"""Checkpoints for fairseq (.pt), written as its later versions write them: settings as plain dicts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from toolkit.data.tokens import LetterTokenizer
from toolkit.errors import CheckpointError
from toolkit.models.convert.common import Converted, empty_model, export_tensors
from toolkit.models.convert.fairseq_config import (
    ENCODER_SETTINGS,
    EXTRACTOR_NORMS,
    KEPT_SETTINGS,
    PRETRAINING_SETTINGS,
    TEXT_PADDING,
    TEXT_SETTINGS,
)
from toolkit.models.convert.fairseq_data2vec import kept_choices, objective_settings
from toolkit.models.convert.fairseq_names import TEACHERS, TEXT_PREFIX, names_table
from toolkit.models.model_files import TEXT_KINDS

LETTERS_FILE = "dict.ltr.txt"

MODEL = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "final_dim": 0,
    "quantize_targets": True,
    "quantize_input": False,
    "same_quantizer": False,
    "target_glu": False,
    "quantizer_depth": 1,
    "quantizer_factor": 3,
    "latent_vars": 320,
    "latent_groups": 2,
    "latent_dim": 0,
    "latent_temp": [2.0, 0.5, 0.999995],
    "logit_temp": 0.1,
    "dropout_features": 0.0,
    "num_negatives": 100,
    "negatives_from_everywhere": False,
    "cross_sample_negatives": 0,
    "codebook_negatives": 0,
    "mask_selection": "static",
    "mask_other": 0.0,
    "no_mask_overlap": False,
    "mask_min_space": 1,
    "mask_dropout": 0.0,
    "mask_channel_before": False,
    "mask_channel_selection": "static",
    "mask_channel_other": 0.0,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
    "max_positions": 100000,
    "required_seq_len_multiple": 2,
    "crop_seq_to_multiple": 1,
}
"""Settings of fairseq's encoder that the toolkit has no choice of, and those of its pretraining. fairseq lets a
fine-tuning override only what is there, so all are written."""

TASK = {
    "data": ".",
    "labels": None,
    "enable_padding": False,
    "max_sample_size": None,
    "min_sample_size": None,
    "num_batch_buckets": 0,
}

TEXT_TRANSFORMER = {
    "activation_fn": "gelu",
    "layernorm_embedding": True,
    "no_scale_embedding": True,
    "no_token_positional_embeddings": False,
}
TEXT_VERSION = 3.0
"""A buffer of fairseq's text encoders, which says how old a file's names are."""


def write_fairseq(converted: Converted, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint that fairseq opens, whole or not at all; a CTC model's ``dict.ltr.txt`` comes beside it.

    The encoder of a model without its pretraining's heads is written
    as what fairseq fine-tunes from.

    Arguments
    ---------
    converted : any model, as :func:`toolkit.models.convert.read.read_pretrained` gives it.
    path : the file.

    Raises
    ------
    CheckpointError : fairseq has no such model, tensors are missing, or another model's dictionary lies there.
    OSError : the file cannot be written.
    """
    path = Path(path)
    kind = converted.config.kind
    if kind == "text_classifier":
        raise CheckpointError(f"a model of kind {kind!r} cannot be written as a fairseq checkpoint; its encoder can.")
    model = empty_model(kind, converted.config.architecture, source=path)
    tensors = dict(converted.tensors)
    for name, value in model.state_dict().items():
        if name in converted.info.fresh:  # nobody has trained it, but fairseq opens whole models only
            tensors.setdefault(name, torch.zeros(value.shape))
    if missing := sorted(model.state_dict().keys() - tensors.keys()):
        raise CheckpointError(
            f"{path}: {len(missing)} tensors of the model are missing ({', '.join(missing[:3])}), and fairseq opens "
            "whole models only; give a whole file."
        )
    architecture = cast(dict[str, Any], model.config)
    if kind in TEXT_KINDS:
        tensors = _without_further_parts(tensors)
    rate, normalize = converted.config.sample_rate, converted.config.normalize
    if kind == "ctc":
        settings = _ctc_settings(architecture, rate, normalize)
    elif kind in TEXT_KINDS:
        settings = _text_settings(kind, architecture, path)
    else:
        settings = _pretraining_settings(kind, architecture, rate, normalize, path)
    weights = _weights(kind, export_tensors(names_table(kind, architecture), tensors))
    kept = _kept(kind, architecture)
    if isinstance(converted.tokenizer, LetterTokenizer) and kind == "ctc":
        kept["tokens"] = converted.tokenizer.config
    contents = _contents(settings, weights, kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    if converted.tokenizer is not None and kind == "ctc":
        _write_dictionary(converted.tokenizer, path)
    _save(contents, path)


def _without_further_parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An encoder of text as fairseq has it: the vector of the token type goes into those of the positions, which are
    added to the same tokens, and there is no pooler."""
    out = {name: value for name, value in tensors.items() if ".pooler." not in f".{name}"}
    for name in [name for name in out if name.endswith("token_type_embedding.weight")]:
        positions = name.replace("token_type", "position")
        out[positions] = out[positions] + out.pop(name)[0]
    return out


def _weights(kind: str, weights: dict[str, Any]) -> dict[str, Any]:
    """The tensors as a file holds them: a teacher's in a dict of their own, and each text encoder's version."""
    if kind in TEXT_KINDS:
        weights[TEXT_PREFIX + "version"] = torch.tensor([TEXT_VERSION])
    if kind not in TEACHERS:
        return weights
    prefix = TEACHERS[kind]
    teacher = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
    if kind in TEXT_KINDS:
        teacher["version"] = torch.tensor([TEXT_VERSION])
    return weights | {prefix.removesuffix("."): teacher}


def _contents(settings: dict[str, Any], weights: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """The file's contents; history and iterator are what fairseq looks for before it takes the weights."""
    return {
        "args": None,
        "cfg": settings,
        "model": weights,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "",
                "optimizer_name": "",
                "lr_scheduler_state": {"best": None},
                "num_updates": 0,
            }
        ],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"epoch": 1, "version": 2, "iterations_in_epoch": 0, "shuffle": True},
            "val_loss": None,
            "best": None,
            "metrics": None,
            "previous_training_time": 0.0,
            **({"toolkit": kept} if kept else {}),
        },
        "last_optimizer_state": None,
    }


def _groups(model: dict[str, Any], task: dict[str, Any], criterion: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "_name": None,
        "common": {"_name": None, "seed": 1, "fp16": False, "user_dir": None},
        "model": model,
        "task": task,
        "criterion": criterion,
        "optimizer": None,
        "lr_scheduler": None,
        "scoring": None,
        "bpe": None,
        "tokenizer": None,
    }


def _encoder_settings(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the encoder, under the name of the pretraining that it looks like."""
    norms = {ours: theirs for theirs, ours in EXTRACTOR_NORMS.items()}
    return {
        "_name": "data2vec_audio" if _is_data2vec(encoder) else "wav2vec2",
        **MODEL,
        "extractor_mode": norms[encoder["extractor_norm"]],
        "conv_feature_layers": " + ".join(f"[({c}, {k}, {s})]" for c, k, s in encoder["conv_layers"]),
        **{theirs: encoder[ours] for ours, theirs, _, _ in ENCODER_SETTINGS},
    }


def _is_data2vec(encoder: Mapping[str, Any]) -> bool:
    """Which of fairseq's two encoders: they differ where the widths are equal, and in the least number of masks."""
    if encoder["conv_layers"][-1][0] == encoder["dim"]:
        return encoder["always_project"]
    return encoder["pos_depth"] > 1 and encoder["min_masks"] == 1


def _kept(kind: str, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the names and values above do not tell, where they are not fairseq's."""
    choices = kept_choices(kind, architecture)
    if kind in TEXT_KINDS:
        return choices
    encoder = architecture.get("encoder", architecture)
    data2vec = kind == "data2vec_audio" or _is_data2vec(encoder)
    theirs = {"norm_over_padding": True, "min_masks": 1 if data2vec else 2}
    return {key: encoder[key] for key in KEPT_SETTINGS if encoder[key] != theirs[key]} | choices


def _pretraining_settings(
    kind: str, architecture: Mapping[str, Any], rate: int, normalize: bool, path: Path
) -> dict[str, Any]:
    task = {"_name": "audio_pretraining", **TASK, "sample_rate": rate, "normalize": normalize}
    if kind == "wav2vec2_encoder":
        model = _encoder_settings(architecture)
        criterion = {"_name": "model"} if model["_name"] == "data2vec_audio" else {"_name": "wav2vec", "infonce": True}
        return _groups(model, task, criterion)
    encoder = architecture["encoder"]
    equal_widths = encoder["conv_layers"][-1][0] == encoder["dim"]
    if kind == "data2vec_audio":
        if equal_widths and not encoder["always_project"]:
            raise CheckpointError(
                f"{path}: the model does not project features that have the transformer's width already "
                "(always_project), as fairseq's data2vec does; build it with always_project: True."
            )
        objective = objective_settings(kind, architecture, path)
        return _groups({**_encoder_settings(encoder), "_name": kind, **objective}, task, {"_name": "model"})
    if equal_widths and encoder["always_project"]:
        raise CheckpointError(
            f"{path}: the model projects features that have the transformer's width already (always_project), which "
            "fairseq's wav2vec 2.0 cannot; its encoder alone can be written."
        )
    model = {
        **_encoder_settings(encoder),
        "_name": "wav2vec2",
        "final_dim": architecture["final_dim"],
        "latent_dim": architecture["code_dim"] or 0,
        "latent_temp": list(architecture["temperature"]),
        **{theirs: architecture[ours] for ours, theirs, _, _ in PRETRAINING_SETTINGS},
    }
    criterion = {
        "_name": "wav2vec",
        "infonce": True,
        "loss_weights": [architecture["diversity_weight"], architecture["penalty_weight"]],
        "log_keys": ["prob_perplexity", "code_perplexity", "temp"],
    }
    return _groups(model, task, criterion)


def _ctc_settings(architecture: Mapping[str, Any], rate: int, normalize: bool) -> dict[str, Any]:
    """The fine-tuning's settings with the pretraining's inside, which carry the same masks and dropouts."""
    inner = _encoder_settings(architecture["encoder"])
    task = {"_name": "audio_pretraining", **TASK, "sample_rate": rate, "normalize": normalize}
    # Everything about masks and dropouts, under the same names in both but for the last.
    own = {key: value for key, value in inner.items() if "mask" in key or "dropout" in key}
    del own["dropout_features"]
    model = {
        "_name": "wav2vec_ctc",
        "w2v_path": "",
        "no_pretrained_weights": False,
        "apply_mask": True,
        **own,
        "layerdrop": inner["encoder_layerdrop"],
        "final_dropout": architecture["final_dropout"],
        "freeze_finetune_updates": architecture["freeze_updates"],
        "feature_grad_mult": inner["feature_grad_mult"],
        "checkpoint_activations": inner["checkpoint_activations"],
        "normalize": normalize,
        "data": ".",
        "w2v_args": _groups(inner, task, None),
        "blank_weight": 0.0,
        "blank_mode": "add",
    }
    outer = {**task, "_name": "audio_finetuning", "labels": "ltr", "eval_wer": False, "autoregressive": False}
    criterion = {"_name": "ctc", "zero_infinity": True, "sentence_avg": True, "post_process": "letter"}
    return _groups(model, outer, criterion)


def _text_settings(kind: str, whole: Mapping[str, Any], path: Path) -> dict[str, Any]:
    architecture = whole.get("encoder", whole)
    if architecture["padding_id"] != TEXT_PADDING:
        raise CheckpointError(
            f"{path}: the model's padding_id is {architecture['padding_id']}, in fairseq it is always {TEXT_PADDING}."
        )
    values = {theirs: architecture[ours] for ours, theirs, _, _ in TEXT_SETTINGS}
    inner = ("embed_dim", "ffn_embed_dim", "layers", "attention_heads", "layerdrop")
    positions = architecture["max_positions"]
    model = {
        "_name": "data2vec_text",
        "max_positions": positions,
        **_text_objective(kind, whole, path),
        "transformer": {
            "_name": None,
            **TEXT_TRANSFORMER,
            **{key: value for key, value in values.items() if key not in inner},
            "max_source_positions": positions,
            "encoder": {
                "_name": None,
                "normalize_before": False,
                "learned_pos": True,
                **{key: values[key] for key in inner},
            },
        },
    }
    task = {"_name": "masked_lm", "data": ".", "tokens_per_sample": positions}
    return _groups(model, task, {"_name": "model"})


def _text_objective(kind: str, architecture: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if kind == "text_encoder":
        return {"head_layers": 1}
    last = architecture["encoder"]["vocab_size"] - 1
    if architecture["mask_id"] != last:
        raise CheckpointError(
            f"{path}: the model's mask_id is {architecture['mask_id']}, in fairseq it is always the last of the "
            f"vocabulary, {last}."
        )
    return objective_settings(kind, architecture, path)


def _write_dictionary(tokenizer: LetterTokenizer, path: Path) -> None:
    file = path.with_name(LETTERS_FILE)
    if file.exists():
        if LetterTokenizer.from_file(file).labels == tokenizer.labels:
            return
        raise CheckpointError(
            f"{path}: {LETTERS_FILE} of another model lies beside it; give an empty or new folder for the checkpoint."
        )
    tokenizer.save(path.parent)


def _save(contents: dict[str, Any], path: Path) -> None:
    """torch.save to a neighbour that takes the file's place when all of it is on the disk."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except RuntimeError as error:  # torch says in its own words that the disk is full
        raise CheckpointError(
            f"{path}: the checkpoint could not be written ({error}); look at the space left and try again."
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)
