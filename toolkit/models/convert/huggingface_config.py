"""The settings in a Hugging Face config.json beside the toolkit's, both ways.

Settings that the toolkit's models lack are refused by name, so that nothing is loaded that would compute something
else. Where a key is missing the library's own default counts (transformers 5.23, unchanged since 4.20).
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.models.ctc import CTCModel
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.models.text_encoder import TextEncoder
from toolkit.models.wav2vec2 import Wav2Vec2Pretraining

EPSILON = 1e-5
"""Of all layer norms here."""

SMALLEST_KERNEL = 3
"""Of data2vec's stack of positional convolutions, as in the original."""

LARGEST = 2**31
"""No size goes beyond it; torch's own message would be a page long."""

WAV2VEC2, DATA2VEC_AUDIO, DATA2VEC_TEXT = "wav2vec2", "data2vec-audio", "data2vec-text"
PREFIXES = {WAV2VEC2: "wav2vec2.", DATA2VEC_AUDIO: "data2vec_audio.", DATA2VEC_TEXT: "data2vec_text."}
"""What the base model's tensors are called under in a model with a head."""

ARCHITECTURES: dict[str, tuple[str, str]] = {
    "Wav2Vec2ForPreTraining": (WAV2VEC2, "wav2vec2_pretraining"),
    "Wav2Vec2Model": (WAV2VEC2, "wav2vec2_encoder"),
    "Wav2Vec2ForCTC": (WAV2VEC2, "ctc"),
    "Wav2Vec2ForSequenceClassification": (WAV2VEC2, "wav2vec2_encoder"),
    "Wav2Vec2ForAudioFrameClassification": (WAV2VEC2, "wav2vec2_encoder"),
    "Data2VecAudioModel": (DATA2VEC_AUDIO, "wav2vec2_encoder"),
    "Data2VecAudioForCTC": (DATA2VEC_AUDIO, "ctc"),
    "Data2VecAudioForSequenceClassification": (DATA2VEC_AUDIO, "wav2vec2_encoder"),
    "Data2VecAudioForAudioFrameClassification": (DATA2VEC_AUDIO, "wav2vec2_encoder"),
    "Data2VecTextModel": (DATA2VEC_TEXT, "text_encoder"),
    "Data2VecTextForMaskedLM": (DATA2VEC_TEXT, "text_encoder"),
    "Data2VecTextForSequenceClassification": (DATA2VEC_TEXT, "text_encoder"),
    "Data2VecTextForMultipleChoice": (DATA2VEC_TEXT, "text_encoder"),
    "Data2VecTextForTokenClassification": (DATA2VEC_TEXT, "text_encoder"),
    "Data2VecTextForQuestionAnswering": (DATA2VEC_TEXT, "text_encoder"),
}
"""Model type and the toolkit's kind of each architecture that can be read; the first of a pair is the one written."""

CLASSES = {
    "wav2vec2_encoder": Wav2Vec2Encoder,
    "wav2vec2_pretraining": Wav2Vec2Pretraining,
    "ctc": CTCModel,
    "text_encoder": TextEncoder,
}
"""Whose defaults count for settings that a model does not name."""

# (theirs, the encoder's, their default)
ENCODER_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("hidden_size", "dim", 768),
    ("num_hidden_layers", "num_layers", 12),
    ("intermediate_size", "ffn_dim", 3072),
    ("num_attention_heads", "num_heads", 12),
    ("conv_bias", "conv_bias", False),
    ("num_conv_pos_embedding_groups", "pos_groups", 16),
    ("hidden_dropout", "dropout", 0.1),
    ("attention_dropout", "attention_dropout", 0.1),
    ("activation_dropout", "activation_dropout", 0.1),
    ("feat_proj_dropout", "dropout_input", 0.0),
    ("layerdrop", "layerdrop", 0.1),
    ("mask_time_prob", "mask_prob", 0.05),
    ("mask_time_length", "mask_length", 10),
    ("mask_time_min_masks", "min_masks", 2),
    ("mask_feature_prob", "mask_channel_prob", 0.0),
    ("mask_feature_length", "mask_channel_length", 10),
)
PRETRAINING_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("proj_codevector_dim", "final_dim", 256),
    ("num_codevector_groups", "num_groups", 2),
    ("num_codevectors_per_group", "num_codes", 320),
    ("codevector_dim", "code_dim", 256),
    ("num_negatives", "num_negatives", 100),
    ("contrastive_logits_temperature", "logit_temperature", 0.1),
    ("feat_quantizer_dropout", "dropout_features", 0.0),
    ("diversity_loss_weight", "diversity_weight", 0.1),
)
TEXT_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("vocab_size", "vocab_size", 30522),
    ("hidden_size", "dim", 768),
    ("num_hidden_layers", "num_layers", 12),
    ("intermediate_size", "ffn_dim", 3072),
    ("num_attention_heads", "num_heads", 12),
    ("pad_token_id", "padding_id", 1),
    ("hidden_dropout_prob", "dropout", 0.1),
    ("attention_probs_dropout_prob", "attention_dropout", 0.1),
)
DEFAULT_TYPES = 2
"""How many types of tokens transformers' text models have where config.json does not say."""
TEXT_PARTS = ("token_types", "pooler")
"""Settings of the toolkit's that config.json does not tell; the tensors do."""

# What must have one value, and why another cannot be taken.
FIXED_AUDIO = (
    ("hidden_act", "gelu", "gelu"),
    ("feat_extract_activation", "gelu", "gelu"),
    ("layer_norm_eps", EPSILON, EPSILON),
    ("add_adapter", False, False),
    ("adapter_attn_dim", None, None),
    ("position_embeddings_type", None, None),
    ("quantization_config", None, None),
)
FIXED_TEXT = (
    ("hidden_act", "gelu", "gelu"),
    ("layer_norm_eps", EPSILON, 1e-12),
    ("position_embedding_type", "absolute", "absolute"),
    ("is_decoder", False, False),
    ("add_cross_attention", False, False),
    ("quantization_config", None, None),
)


@dataclass(frozen=True)
class Settings:
    """A config.json whose values are checked as they are read.

    values : the object in the file.
    source : the file, for the errors.
    """

    values: Mapping[str, Any]
    source: str | os.PathLike[str]

    def get(self, key: str, default: Any) -> Any:
        """The value of ``key``, of the type of ``default``, which counts where the key is missing.

        Raises
        ------
        CheckpointError : it is of another type.
        """
        value = self.values.get(key, default)
        if isinstance(default, bool) or isinstance(value, bool):
            fits = isinstance(value, bool) and isinstance(default, bool)
        elif isinstance(default, float):
            fits = isinstance(value, (int, float))
        elif isinstance(default, (list, tuple)):
            fits = value is default or (isinstance(value, list) and all(type(n) is int for n in value))
        else:
            fits = isinstance(value, type(default))
        if not fits or (isinstance(value, int) and abs(value) > LARGEST):
            raise CheckpointError(
                f"{self.source}: {key} is {json.dumps(value)[:80]}, expected a value such as {json.dumps(default)}."
            )
        return value

    def fields(self, table: tuple[tuple[str, str, Any], ...]) -> dict[str, Any]:
        """The toolkit's settings by a table of (theirs, ours, their default)."""
        return {ours: self.get(theirs, default) for theirs, ours, default in table}

    def check(self, table: tuple[tuple[str, Any, Any], ...]) -> None:
        """Refuse settings whose value, or default (the third) where it is missing, is not the one (the second)."""
        for key, wanted, default in table:
            value = self.values.get(key, default)
            if value != wanted:
                raise CheckpointError(
                    f"{self.source}: {key} is {json.dumps(value)[:80]}, and the toolkit has this model only with "
                    f"{json.dumps(wanted)}."
                )


def model_type_and_kind(config: Mapping[str, Any], names: frozenset[str], source: str | os.PathLike[str]):
    """(model type, the toolkit's kind) of a folder.

    Arguments
    ---------
    config : the object in config.json.
    names : of the file's tensors; they decide where config.json names no architecture.
    source : the file, for the error.

    Raises
    ------
    CheckpointError : a model that the toolkit lacks.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else named
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    model_type = config.get("model_type")
    if name or model_type not in PREFIXES:
        what = f"the architecture {name!r}" if name else f"the model type {model_type!r}"
        raise CheckpointError(
            f"{source}: {what} is not among the models of this toolkit; it reads wav2vec2, data2vec-audio and "
            "data2vec-text: base models, Wav2Vec2ForPreTraining, and CTC heads."
        )
    if model_type == DATA2VEC_TEXT:
        return model_type, "text_encoder"
    if "lm_head.weight" in names:
        return model_type, "ctc"
    return model_type, "wav2vec2_pretraining" if "quantizer.codevectors" in names else "wav2vec2_encoder"


def architecture_of(
    config: Mapping[str, Any], model_type: str, kind: str, *, outputs: int = 0, source: str | os.PathLike[str]
) -> dict[str, Any]:
    """The toolkit's settings of a model that config.json describes.

    Arguments
    ---------
    config : the object in config.json.
    model_type, kind : see :func:`model_type_and_kind`.
    outputs : of a CTC head as the toolkit has it; config.json may not know.
    source : the file, for the errors.

    Raises
    ------
    CheckpointError : a setting has a value of the wrong type, or one that the toolkit's model lacks.
    """
    settings = Settings(config, source)
    if model_type == DATA2VEC_TEXT:
        return _text_architecture(settings)
    encoder = _encoder_architecture(settings, model_type)
    if kind == "wav2vec2_encoder":
        return encoder
    if kind == "ctc":
        return {"encoder": encoder, "vocab_size": outputs, "final_dropout": settings.get("final_dropout", 0.1)}
    own = settings.fields(PRETRAINING_FIELDS)
    # The schedule of the temperature stands in transformers' training script, with these values, not in the model.
    return {"encoder": encoder} | own | {"temperature": [2.0, 0.5, 0.999995], "penalty_weight": 0.0}


def _encoder_architecture(settings: Settings, model_type: str) -> dict[str, Any]:
    settings.check(FIXED_AUDIO)
    encoder = settings.fields(ENCODER_FIELDS)
    sizes = [
        list(settings.get(key, default))
        for key, default in (
            ("conv_dim", [512] * 7),
            ("conv_kernel", [10, 3, 3, 3, 3, 2, 2]),
            ("conv_stride", [5, 2, 2, 2, 2, 2, 2]),
        )
    ]
    if len({len(part) for part in sizes}) != 1 or not sizes[0]:
        raise CheckpointError(
            f"{settings.source}: conv_dim, conv_kernel and conv_stride are of {', '.join(str(len(p)) for p in sizes)} "
            "entries; each convolution needs one of each."
        )
    encoder["conv_layers"] = [list(layer) for layer in zip(*sizes, strict=True)]
    encoder["always_project"] = sizes[0][-1] == encoder["dim"]  # transformers always does
    if not settings.get("apply_spec_augment", True):
        encoder["mask_prob"] = encoder["mask_channel_prob"] = 0.0
    if model_type == WAV2VEC2:
        encoder["extractor_norm"] = settings.get("feat_extract_norm", "group")
        encoder["pre_norm"] = settings.get("do_stable_layer_norm", False)
        encoder["pos_kernel"], encoder["pos_depth"] = settings.get("num_conv_pos_embeddings", 128), 1
    else:
        encoder |= {"extractor_norm": "layer", "pre_norm": False} | _data2vec_positions(settings)
    # The group norm of transformers' runs over the padding, and so does data2vec's stack of convolutions; each
    # utterance keeps its own number of masked frames; nothing scales the gradient into the convolutions.
    encoder["norm_over_padding"] = encoder["extractor_norm"] == "group" or encoder["pos_depth"] > 1
    return encoder | {"equal_mask_counts": False, "feature_grad_mult": 1.0, "gradient_checkpointing": False}


def _data2vec_positions(settings: Settings) -> dict[str, int]:
    """num_conv_pos_embeddings is the number of convolutions here, and a kernel's size in wav2vec2."""
    depth, kernel = settings.get("num_conv_pos_embeddings", 5), settings.get("conv_pos_kernel_size", 19)
    if depth < 2 or kernel < SMALLEST_KERNEL:
        raise CheckpointError(
            f"{settings.source}: num_conv_pos_embeddings is {depth} and conv_pos_kernel_size {kernel}; data2vec's "
            f"stack of positional convolutions has at least 2, of at least {SMALLEST_KERNEL} frames."
        )
    return {"pos_depth": depth, "pos_kernel": kernel * depth}


def _text_architecture(settings: Settings) -> dict[str, Any]:
    settings.check(FIXED_TEXT)
    own = settings.fields(TEXT_FIELDS)
    settings.get("type_vocab_size", DEFAULT_TYPES)  # its type is checked
    positions = settings.get("max_position_embeddings", 512) - own["padding_id"] - 1
    if positions < 1:
        raise CheckpointError(
            f"{settings.source}: max_position_embeddings leaves no position behind the padding's; expected 514 or so."
        )
    return own | {"max_positions": positions, "activation_dropout": 0.0, "layerdrop": 0.0}


def complete(kind: str, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the defaults of those that are not named, as plain JSON has them."""
    whole = json.loads(json.dumps(dict(architecture)))
    if kind not in CLASSES:
        return whole
    if "encoder" in whole:
        whole["encoder"] = complete("wav2vec2_encoder", whole["encoder"])
    defaults = {
        name: value.default
        for name, value in inspect.signature(CLASSES[kind]).parameters.items()
        if value.default is not inspect.Parameter.empty
    }
    whole = json.loads(json.dumps(defaults)) | whole
    if kind == "wav2vec2_pretraining" and whole["code_dim"] is None:
        whole["code_dim"] = whole["final_dim"]
    return whole


def settings_of(kind: str, architecture: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a model of the toolkit's; :func:`architecture_of` reads it back.

    Raises
    ------
    CheckpointError : transformers has no such model.
    """
    if kind not in CLASSES:
        raise CheckpointError(f"a model of kind {kind!r} cannot be written as a Hugging Face folder; its encoder can.")
    whole = complete(kind, architecture)
    if kind == "text_encoder":
        return _text_settings(whole)
    encoder = whole.get("encoder", whole)
    model_type = WAV2VEC2 if encoder["pos_depth"] == 1 else DATA2VEC_AUDIO
    _check_expressible(encoder, model_type, kind)
    # In a pair of equal meaning the first is written.
    name = next(name for name, value in ARCHITECTURES.items() if value == (model_type, kind))
    out: dict[str, Any] = {"architectures": [name], "model_type": model_type}
    out |= {theirs: encoder[ours] for theirs, ours, _ in ENCODER_FIELDS}
    for key, place in (("conv_dim", 0), ("conv_kernel", 1), ("conv_stride", 2)):
        out[key] = [layer[place] for layer in encoder["conv_layers"]]
    out |= {"num_feat_extract_layers": len(encoder["conv_layers"]), "hidden_act": "gelu"}
    out |= {"feat_extract_activation": "gelu", "layer_norm_eps": EPSILON}
    if model_type == WAV2VEC2:
        out |= {"feat_extract_norm": encoder["extractor_norm"], "do_stable_layer_norm": encoder["pre_norm"]}
        out["num_conv_pos_embeddings"] = encoder["pos_kernel"]
    else:
        depth = encoder["pos_depth"]
        out |= {"num_conv_pos_embeddings": depth, "feat_extract_norm": "layer"}
        out["conv_pos_kernel_size"] = max(SMALLEST_KERNEL, encoder["pos_kernel"] // depth)
    if encoder["mask_prob"] == encoder["mask_channel_prob"] == 0:
        # Without any mask the library builds no mask vector; the model here has one.
        out |= {"apply_spec_augment": False, "mask_time_prob": 0.05}
    else:
        out["apply_spec_augment"] = True
    if kind == "ctc":
        out |= {"vocab_size": whole["vocab_size"], "final_dropout": whole["final_dropout"]}
        out |= {"ctc_loss_reduction": "sum", "ctc_zero_infinity": True}
    if kind == "wav2vec2_pretraining":
        out |= {theirs: whole[ours] for theirs, ours, _ in PRETRAINING_FIELDS}
    return out | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _check_expressible(encoder: Mapping[str, Any], model_type: str, kind: str) -> None:
    """Refuse an encoder that no class of transformers' computes."""
    what = None
    if encoder["conv_layers"][-1][0] == encoder["dim"] and not encoder["always_project"]:
        what = "transformers' model has a projection where the toolkit's has none (features as wide as the transformer)"
    elif model_type == DATA2VEC_AUDIO and kind == "wav2vec2_pretraining":
        what = "transformers has no pretraining model with a stack of positional convolutions"
    elif model_type == DATA2VEC_AUDIO and (encoder["pre_norm"] or encoder["extractor_norm"] != "layer"):
        what = "transformers has a stack of positional convolutions only with pre_norm false and extractor_norm layer"
    if what:
        raise CheckpointError(f"the model cannot be written as a Hugging Face folder: {what}.")


def _text_settings(whole: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"architectures": ["Data2VecTextModel"], "model_type": DATA2VEC_TEXT}
    out |= {theirs: whole[ours] for theirs, ours, _ in TEXT_FIELDS}
    out["max_position_embeddings"] = whole["max_positions"] + whole["padding_id"] + 1
    # transformers' model has such a table always
    out |= {"hidden_act": "gelu", "layer_norm_eps": EPSILON, "type_vocab_size": max(1, whole["token_types"])}
    return out | {"bos_token_id": 0, "eos_token_id": 2}
