"""fairseq's settings of data2vec's objective as the arguments of the toolkit's models, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.errors import CheckpointError, ModelError
from toolkit.models.convert.fairseq_names import HEADS, TEACHERS
from toolkit.models.convert.fairseq_settings import setting, short
from toolkit.models.data2vec import EMA_TIMINGS, TEACHER_INPUTS
from toolkit.models.data2vec_targets import TargetRule
from toolkit.nn.ema import DecayRamp

LAYERS_ONLY = {"data2vec_audio": "ema_layers_only", "data2vec_text": "ema_transformer_layers_only"}
"""By kind, the name of what copies embeddings and positional convolutions instead of averaging them."""

LAYER_NORMS = {"instance": "instance_norm_target_layer", "layer": "layer_norm_target_layer"}
TARGET_NORMS = {"layer": "layer_norm_targets", "instance": "instance_norm_targets"}
"""Each by our name, in the order in which fairseq takes them."""

UNKNOWN_NORMS = ("batch_norm_target_layer", "group_norm_target_layer")

KEPT_CHOICES = {"ema_timing": EMA_TIMINGS, "teacher_input": TEACHER_INPUTS}
"""Choices of ours that fairseq does not have: it always does what is called "fairseq" here. Files written here keep
another choice where fairseq does not look."""


class _Obstacle(Exception):
    """Why an objective cannot be represented."""


def objective_architecture(
    kind: str, model: Mapping[str, Any], weights: Mapping[str, Tensor], kept: Mapping[str, Any], path: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments of a data2vec model but its encoder, and notes; no arguments where it can be but an encoder.

    Arguments
    ---------
    kind : data2vec_audio or data2vec_text.
    model : its settings, the encoder's ``num_layers`` under ``encoder_layers`` or a group of its own.
    weights : by fairseq's names.
    kept : what :func:`kept_choices` wrote.
    path : the file, for errors.

    Raises
    ------
    CheckpointError : a setting is of another type.
    """
    missing = [name for name, prefix in (("teacher (_ema)", TEACHERS[kind]), ("head", HEADS[kind]))
               if not any(key.startswith(prefix) for key in weights)]  # fmt: skip
    if missing:
        return {}, (f"there is no {' and no '.join(missing)} in the file: this is the encoder alone",)
    try:
        architecture = _objective(kind, model, weights, path)
    except _Obstacle as obstacle:
        return {}, (f"{obstacle}, which the models here cannot represent: this is the encoder alone",)
    choices = {"ema_timing": "fairseq"} | ({"teacher_input": "fairseq"} if kind == "data2vec_text" else {})
    choices |= {name: kept[name] for name in choices if kept.get(name) in KEPT_CHOICES[name]}
    notes: tuple[str, ...] = ()
    if kind == "data2vec_text" and "instance" in (*architecture["layer_norms"], *architecture["target_norms"]):
        notes = ("instance norms of text look at real tokens alone here, and at the padding too in fairseq",)
    return architecture | choices, notes


def _objective(kind: str, model: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Raises _Obstacle with the setting that stands in the way."""
    audio = kind == "data2vec_audio"
    for key in UNKNOWN_NORMS:
        if setting(model, key, bool, False, path):
            raise _Obstacle(f"the model was built with {key} = True")
    layers_only = setting(model, LAYERS_ONLY[kind], bool, True, path)
    if audio and not layers_only and not setting(model, "ema_transformer_only", bool, True, path):
        raise _Obstacle("the model was built with ema_transformer_only = False")  # layers_only switches it on
    architecture = {
        "top_layers": setting(model, "average_top_k_layers", int, 8, path),
        "layer_norms": [ours for ours, key in LAYER_NORMS.items() if setting(model, key, bool, False, path)],
        "target_norms": [ours for ours, key in TARGET_NORMS.items() if setting(model, key, bool, False, path)],
        "loss_beta": setting(model, "loss_beta", float, 0.0, path),
        "loss_scale": setting(model, "loss_scale", float, None, path),
        "ema_decay": _decay(model, path),
        "ema_layers_only": layers_only,
    }
    if not audio and (architecture["loss_scale"] or 0.0) <= 0:
        architecture["loss_scale"] = None  # what fairseq's text model says for 1 / sqrt of the width
    # Layers beyond the number there is are averaged as if they were not asked for.
    architecture["top_layers"] = min(architecture["top_layers"], _num_layers(kind, weights))
    rule = {key: architecture[key] for key in ("layer_norms", "target_norms", "loss_beta", "loss_scale", "top_layers")}
    try:
        DecayRamp.checked(architecture["ema_decay"])
        TargetRule.checked(_num_layers(kind, weights), **rule)
    except ModelError as error:
        raise _Obstacle(f"in the settings {str(error).rstrip('.')}") from error
    if audio:
        return architecture
    head_layers = setting(model, "head_layers", int, 1, path)
    if head_layers not in (1, 2):
        raise _Obstacle(f"the model was built with head_layers = {head_layers}")
    return architecture | {"head_layers": head_layers}


def _num_layers(kind: str, weights: Mapping[str, Tensor]) -> int:
    """Blocks of the teacher."""
    prefix = TEACHERS[kind] + "layers."
    return len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})


def _decay(model: Mapping[str, Any], path: Path) -> list[Any]:
    """Start, end and updates of the ramp, which the training's length stands in for where they are not said."""
    start = setting(model, "ema_decay", float, 0.999, path)
    end = setting(model, "ema_end_decay", float, 0.9999, path)
    steps = setting(model, "ema_anneal_end_step", int, setting(model, "max_update", int, None, path), path)
    if start == end:
        steps = max(1, steps or 1)  # there is no ramp: fairseq does not look at its length
    if steps is None:
        raise _Obstacle("the settings do not say ema_anneal_end_step")
    return [start, end, steps]


def objective_settings(kind: str, architecture: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """fairseq's settings of a model's objective; the inverse of :func:`objective_architecture`.

    Raises
    ------
    CheckpointError : fairseq has no such setting; ``path`` is the file to be written.
    """
    start, end, steps = architecture["ema_decay"]
    scale = architecture["loss_scale"]
    out = {
        "average_top_k_layers": architecture["top_layers"],
        **_norm_settings(architecture["layer_norms"], LAYER_NORMS, "layer_norms", path),
        **_norm_settings(architecture["target_norms"], TARGET_NORMS, "target_norms", path),
        "batch_norm_target_layer": False,
        "loss_beta": architecture["loss_beta"],
        "loss_scale": scale,
        "ema_decay": start,
        "ema_end_decay": end,
        "ema_anneal_end_step": steps,
        LAYERS_ONLY[kind]: architecture["ema_layers_only"],
    }
    if kind == "data2vec_audio":
        return out | {"group_norm_target_layer": False, "ema_transformer_only": True, "max_update": steps,
                      "min_target_var": 0.1, "min_pred_var": 0.01}  # fmt: skip
    return out | {"loss_scale": scale or 0.0, "head_layers": architecture["head_layers"]}


def _norm_settings(norms: Sequence[str], keys: Mapping[str, str], name: str, path: Path) -> dict[str, bool]:
    if list(norms) != [norm for norm in keys if norm in norms]:
        raise CheckpointError(
            f"{path}: the model's {name} are {short(list(norms))}, but fairseq takes each of {', '.join(keys)} once "
            "at most, in this order."
        )
    return {key: norm in norms for norm, key in keys.items()}


def kept_choices(kind: str, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Choices that are not fairseq's."""
    if kind not in TEACHERS:
        return {}
    return {name: architecture[name] for name in KEPT_CHOICES if architecture.get(name, "fairseq") != "fairseq"}
