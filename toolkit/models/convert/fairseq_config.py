"""fairseq's settings as the arguments of the toolkit's models; what is missing has the default that it has there."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.models.convert.fairseq_settings import LONGEST_TEXT, Settings, group_of, setting, short

EXTRACTOR_NORMS = {"default": "group", "layer_norm": "layer"}
BASE_CONV_LAYERS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"
MOST_CONV_LAYERS = 100
SAMPLE_RATE = 16000
TEXT_PADDING = 1
"""The id of <pad> in every dictionary of fairseq's."""
KEPT_SETTINGS = {"norm_over_padding": bool, "min_masks": int}
"""Settings of ours that fairseq has no name for; files written here keep them where fairseq does not look."""

ENCODER_SETTINGS: tuple[tuple[str, str, type, Any], ...] = (
    ("dim", "encoder_embed_dim", int, 768),
    ("num_layers", "encoder_layers", int, 12),
    ("ffn_dim", "encoder_ffn_embed_dim", int, 3072),
    ("num_heads", "encoder_attention_heads", int, 12),
    ("conv_bias", "conv_bias", bool, False),
    ("pre_norm", "layer_norm_first", bool, False),
    ("pos_kernel", "conv_pos", int, 128),
    ("pos_groups", "conv_pos_groups", int, 16),
    ("pos_depth", "pos_conv_depth", int, 1),
    ("dropout", "dropout", float, 0.1),
    ("attention_dropout", "attention_dropout", float, 0.1),
    ("activation_dropout", "activation_dropout", float, 0.0),
    ("dropout_input", "dropout_input", float, 0.0),
    ("layerdrop", "encoder_layerdrop", float, 0.0),
    ("feature_grad_mult", "feature_grad_mult", float, 1.0),
    ("mask_prob", "mask_prob", float, 0.65),
    ("mask_length", "mask_length", int, 10),
    ("mask_channel_prob", "mask_channel_prob", float, 0.0),
    ("mask_channel_length", "mask_channel_length", int, 10),
    ("equal_mask_counts", "require_same_masks", bool, True),
    ("gradient_checkpointing", "checkpoint_activations", bool, False),
)
"""Ours, fairseq's name, type and fairseq's default."""

TEXT_SETTINGS: tuple[tuple[str, str, type, Any], ...] = (
    ("dim", "embed_dim", int, 768),
    ("num_layers", "layers", int, 12),
    ("ffn_dim", "ffn_embed_dim", int, 3072),
    ("num_heads", "attention_heads", int, 12),
    ("dropout", "dropout", float, 0.1),
    ("attention_dropout", "attention_dropout", float, 0.1),
    ("activation_dropout", "activation_dropout", float, 0.0),
    ("layerdrop", "layerdrop", float, 0.0),
    ("gradient_checkpointing", "checkpoint_activations", bool, False),
)
"""The same for data2vec text, whose settings lie one or two levels deeper."""

PRETRAINING_SETTINGS: tuple[tuple[str, str, type, Any], ...] = (
    ("num_groups", "latent_groups", int, 2),
    ("num_codes", "latent_vars", int, 320),
    ("num_negatives", "num_negatives", int, 100),
    ("cross_sample_negatives", "cross_sample_negatives", int, 0),
    ("logit_temperature", "logit_temp", float, 0.1),
    ("dropout_features", "dropout_features", float, 0.0),
)

REPRESENTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "encoder": {
        "layer_type": ("transformer",),
        "activation_fn": ("gelu",),
        "quantize_input": (False,),
        "crop_seq_to_multiple": (1,),
        "conv_pos_batch_norm": (False,),
    },
    "pretraining": {
        "quantize_targets": (True,),
        "quantizer_depth": (1,),
        "target_glu": (False,),
        "codebook_negatives": (0,),
        "negatives_from_everywhere": (False,),
    },
    "ctc": {"blank_weight": (0,), "layer_type": ("transformer",)},
    "text": {
        "activation_fn": ("gelu",),
        "normalize_before": (False,),
        "learned_pos": (True,),
        "layernorm_embedding": (True,),
        "no_scale_embedding": (True,),
        "no_token_positional_embeddings": (False,),
    },
}
"""Settings that change results, and the values of them that the toolkit's models can take."""

TRAINING_ONLY = {
    "mask_selection": "static",
    "mask_channel_selection": "static",
    "no_mask_overlap": False,
    "no_mask_channel_overlap": False,
    "mask_dropout": 0.0,
    "mask_channel_before": False,
    "zero_mask": False,
}
"""Settings of the masks that the toolkit lacks; they change nothing in a model that is used or trained otherwise."""


def conv_layers(value: Any, path: Path) -> list[list[int]]:
    """(channels, kernel, stride) of each convolution, from fairseq's "[(512, 10, 5)] + [(512, 3, 2)] * 4" or a list.

    The text is taken apart, never evaluated.

    Raises
    ------
    CheckpointError : it is anything but lists of three positive numbers, added and repeated.
    """
    try:
        if isinstance(value, str):
            if len(value) > LONGEST_TEXT:
                raise ValueError("too long")
            layers = _layers(ast.parse(value.strip(), mode="eval").body)
        else:
            layers = value
        layers = [[_whole(number) for number in layer] for layer in layers]
        if not layers or any(len(layer) != 3 or min(layer) < 1 for layer in layers):
            raise ValueError("no layers of three numbers")
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"{path}: conv_feature_layers is {short(value)}, expected (channels, kernel, stride) of each convolution, "
            "as in '[(512, 10, 5)] + [(512, 3, 2)] * 4'."
        ) from error
    return layers


def _layers(node: ast.expr) -> list[Any]:
    """The list that an expression of lists, sums and repetitions stands for."""
    if isinstance(node, ast.List):
        layers = [_numbers(item) for item in node.elts]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        layers = _layers(node.left) + _layers(node.right)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and isinstance(node.right, ast.Constant):
        count = _whole(node.right.value)
        if not 0 <= count <= MOST_CONV_LAYERS:
            raise ValueError("too many layers")
        layers = _layers(node.left) * count
    else:
        raise ValueError("no list")
    if len(layers) > MOST_CONV_LAYERS:
        raise ValueError("too many layers")
    return layers


def _numbers(node: ast.expr) -> list[int]:
    if not isinstance(node, ast.Tuple | ast.List) or not all(isinstance(item, ast.Constant) for item in node.elts):
        raise ValueError("no tuple of numbers")
    return [_whole(item.value) for item in node.elts if isinstance(item, ast.Constant)]


def _whole(number: Any) -> int:
    if type(number) is not int:
        raise ValueError("no whole number")
    return number


def check_represented(group: Mapping[str, Any], part: str, path: Path) -> None:
    """Raise CheckpointError where a setting has a value that the toolkit's models cannot take."""
    for key, known in REPRESENTED[part].items():
        value = group.get(key)
        if value is not None and value not in known:
            raise CheckpointError(
                f"{path}: the model was built with {key} = {short(value)}, which the models here cannot represent; "
                f"known is {', '.join(map(repr, known))}."
            )


def training_notes(group: Mapping[str, Any]) -> tuple[str, ...]:
    """A line for each setting of the masks that is left out."""
    return tuple(
        f"{key} = {short(group[key])} is left out; it changes nothing but the masks of further training"
        for key, usual in TRAINING_ONLY.items()
        if group.get(key) is not None and group[key] != usual
    )


def kept_settings(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that only files written by this toolkit hold, as they stand there."""
    extra = contents.get("extra_state")
    kept = extra.get("toolkit") if isinstance(extra, Mapping) else None
    return dict(kept) if isinstance(kept, Mapping) else {}


def kept_encoder(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the encoder."""
    return {key: kept[key] for key, kind in KEPT_SETTINGS.items() if type(kept.get(key)) is kind}


def kept_tokens(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the letters; without any an unknown character becomes ``<unk>``, as in fairseq."""
    tokens = kept.get("tokens")
    tokens = tokens if isinstance(tokens, Mapping) else {}
    known = {name: tokens[name] for name in ("unknown", "case", "word_boundary") if isinstance(tokens.get(name), str)}
    return {"unknown": "unk"} | known


def encoder_architecture(model: Mapping[str, Any], *, data2vec: bool, path: Path) -> dict[str, Any]:
    """The encoder's arguments from the settings of a pretraining model.

    Raises
    ------
    CheckpointError : a setting has a value that the encoder cannot take.
    """
    check_represented(model, "encoder", path)
    mode = setting(model, "extractor_mode", str, "default", path)
    if mode not in EXTRACTOR_NORMS:
        raise CheckpointError(
            f"{path}: the model was built with extractor_mode = {mode!r}, which the models here cannot represent; "
            f"known are {', '.join(EXTRACTOR_NORMS)}."
        )
    architecture = {name: setting(model, key, kind, default, path) for name, key, kind, default in ENCODER_SETTINGS}
    layers = conv_layers(model.get("conv_feature_layers") or BASE_CONV_LAYERS, path)
    return {
        "conv_layers": layers,
        "extractor_norm": EXTRACTOR_NORMS[mode],
        "norm_over_padding": True,
        "always_project": data2vec and layers[-1][0] == architecture["dim"],
        "min_masks": 1 if data2vec else 2,
        **architecture,
    }


def pretraining_architecture(settings: Settings, path: Path) -> dict[str, Any]:
    """The arguments of the pretraining model, the encoder's under ``encoder``.

    Raises
    ------
    CheckpointError : a setting has a value that the model cannot take.
    """
    model = settings.model
    check_represented({"quantize_targets": False, **model}, "pretraining", path)
    encoder = encoder_architecture(model, data2vec=False, path=path)
    own = {name: setting(model, key, kind, default, path) for name, key, kind, default in PRETRAINING_SETTINGS}
    final_dim = setting(model, "final_dim", int, 0, path)
    latent_dim = setting(model, "latent_dim", int, 0, path)
    temperature = setting(model, "latent_temp", list, [2, 0.5, 0.999995], path)
    if len(temperature) != 3:
        raise CheckpointError(f"{path}: the setting latent_temp is {temperature}, expected start, end and decay.")
    diversity, penalty = _loss_weights(settings.criterion, path)
    return {
        "encoder": encoder,
        "final_dim": final_dim if final_dim > 0 else encoder["dim"],
        "code_dim": latent_dim if latent_dim > 0 else None,
        "temperature": temperature,
        "diversity_weight": diversity,
        "penalty_weight": penalty,
        **own,
    }


def _loss_weights(criterion: Mapping[str, Any], path: Path) -> tuple[float, float]:
    """Weights of the diversity and of the feature penalty; those of the paper where the file says nothing."""
    weights = setting(criterion, "loss_weights", list, None, path)
    if weights is None:
        return (0.1, 10.0) if "loss_weights" not in criterion else (0.0, 0.0)
    weights = weights * 2 if len(weights) == 1 else weights  # one is for both
    if len(weights) != 2 or not all(type(weight) in (int, float) for weight in weights):
        raise CheckpointError(f"{path}: the setting loss_weights is {short(weights)}, expected two numbers.")
    return float(weights[0]), float(weights[1])


def ctc_architecture(outer: Settings, inner: Settings, *, data2vec: bool, path: Path) -> dict[str, Any]:
    """The arguments of a fine-tuned model but its vocabulary: the inner settings, overridden by the outer ones.

    Raises
    ------
    CheckpointError : a setting has a value that the model cannot take.
    """
    check_represented(outer.model, "ctc", path)
    same = [key for _, key, _, _ in ENCODER_SETTINGS if key in outer.model and key != "encoder_layerdrop"]
    overrides = {key: outer.model[key] for key in same if outer.model[key] is not None}
    if outer.model.get("layerdrop") is not None:
        overrides["encoder_layerdrop"] = outer.model["layerdrop"]
    encoder = encoder_architecture({**inner.model, **overrides}, data2vec=data2vec, path=path)
    if not setting(outer.model, "apply_mask", bool, False, path):
        encoder |= {"mask_prob": 0.0, "mask_channel_prob": 0.0}
    return {
        "encoder": encoder,
        "final_dropout": setting(outer.model, "final_dropout", float, 0.0, path),
        "freeze_updates": setting(outer.model, "freeze_finetune_updates", int, 0, path),
    }


def text_architecture(model: Mapping[str, Any], *, vocab_size: int, max_positions: int, path: Path) -> dict[str, Any]:
    """The arguments of a text encoder, whose sizes of embeddings are those of the tensors.

    Raises
    ------
    CheckpointError : a setting has a value that the encoder cannot take.
    """
    transformer = group_of(model, "transformer")
    encoder = group_of(transformer, "encoder")
    # Older files hold all of it in one level, the encoder's with its name in front.
    older = {key.removeprefix("encoder_"): value for key, value in model.items()}
    settings = {**older, **transformer, **encoder}
    check_represented(settings, "text", path)
    return {
        "vocab_size": vocab_size,
        "max_positions": max_positions,
        "padding_id": TEXT_PADDING,
        "token_types": 0,
        "pooler": False,
        **{name: setting(settings, key, kind, default, path) for name, key, kind, default in TEXT_SETTINGS},
    }
