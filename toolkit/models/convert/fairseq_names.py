"""The names of fairseq's tensors beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.models.convert.common import Row

CTC_PREFIX = "w2v_encoder.w2v_model."
"""Before the names of the pretrained model inside a fine-tuned one."""
TEXT_PREFIX = "encoder.sentence_encoder."
"""Before the names of the encoder in a model of text."""
TEACHER = "teacher.module."
"""Before ours of a teacher."""
TEACHERS = {"data2vec_audio": "_ema.", "data2vec_text": "encoder._ema."}
"""Before theirs, by kind: what stands before the dot is a dict of its own in the file."""
HEADS = {"data2vec_audio": "final_proj.", "data2vec_text": "encoder.regression_head."}
"""Before the names of what predicts a teacher's features."""


def names_table(kind: str, architecture: Mapping[str, Any]) -> list[Row]:
    """The table of a kind of model; where fairseq's names depend on a setting, by that setting.

    Arguments
    ---------
    kind : one of the toolkit's kinds.
    architecture : as in a model folder.
    """
    if kind == "text_encoder":
        return _text_rows("", TEXT_PREFIX)
    if kind == "wav2vec2_encoder":
        return _encoder_rows(architecture, "", "")
    encoder = architecture["encoder"]
    if kind == "data2vec_text":
        # Between two products stands an activation, which counts as a module too.
        products = [_pair(f"prediction.{i}.", f"{HEADS[kind]}{2 * i}.") for i in range(architecture["head_layers"])]
        return [
            *_text_rows("encoder.", TEXT_PREFIX),
            *(row for pair in products for row in pair),
            *_text_rows(TEACHER, TEACHERS[kind]),
        ]
    if kind == "data2vec_audio":
        return [
            *_encoder_rows(encoder, "encoder.", ""),
            *_pair("prediction.", HEADS[kind]),
            *_transformer_rows(encoder, TEACHER, TEACHERS[kind]),
        ]
    if kind == "ctc":
        return [*_encoder_rows(encoder, "encoder.", CTC_PREFIX), *_pair("head.", "w2v_encoder.proj.")]
    return [
        *_encoder_rows(encoder, "encoder.", ""),
        Row("quantizer.codebook", ("quantizer.vars",), flat=True),
        *_pair("quantizer.projection.", "quantizer.weight_proj."),
        *_pair("target_projection.", "project_q."),
        *_pair("final_projection.", "final_proj."),
    ]


def _pair(ours: str, theirs: str) -> list[Row]:
    """Rows of a weight and a bias."""
    return [Row(ours + kind, (theirs + kind,)) for kind in ("weight", "bias")]


def _layer_rows(ours: str, theirs: str) -> list[Row]:
    """Rows of the blocks of a transformer, of speech or of text."""
    rows = [
        Row(f"{ours}{{}}.qkv.{kind}", tuple(f"{theirs}{{}}.self_attn.{part}_proj.{kind}" for part in "qkv"))
        for kind in ("weight", "bias")
    ]
    same = {
        "out": "self_attn.out_proj",
        "attention_norm": "self_attn_layer_norm",
        "fc1": "fc1",
        "fc2": "fc2",
        "final_norm": "final_layer_norm",
    }
    for own, other in same.items():
        rows += _pair(f"{ours}{{}}.{own}.", f"{theirs}{{}}.{other}.")
    return rows


def _text_rows(ours: str, theirs: str) -> list[Row]:
    """Rows of an encoder of text."""
    return [
        Row(ours + "token_embedding.weight", (theirs + "embed_tokens.weight",)),
        Row(ours + "position_embedding.weight", (theirs + "embed_positions.weight",)),
        *_pair(ours + "embedding_norm.", theirs + "layernorm_embedding."),
        *_layer_rows(ours + "layers.", theirs + "layers."),
    ]


def _encoder_rows(encoder: Mapping[str, Any], ours: str, theirs: str) -> list[Row]:
    """Rows of an encoder of speech."""
    # With layer norm the norm stands between two transpositions, which count as modules too.
    norm = "2.1." if encoder.get("extractor_norm") == "layer" else "2."
    convolution = theirs + "feature_extractor.conv_layers.{}."
    return [
        Row(ours + "mask_embedding", (theirs + "mask_emb",)),
        *_pair(ours + "feature_extractor.blocks.{}.norm.", convolution + norm),
        *_pair(ours + "feature_extractor.blocks.{}.", convolution + "0."),
        *_pair(ours + "feature_norm.", theirs + "layer_norm."),
        *_pair(ours + "projection.", theirs + "post_extract_proj."),
        *_transformer_rows(encoder, ours + "transformer.", theirs + "encoder."),
    ]


def _transformer_rows(encoder: Mapping[str, Any], ours: str, theirs: str) -> list[Row]:
    """Rows of the transformer in an encoder of speech, with its positional convolutions."""
    positional, block = theirs + "pos_conv.{}.", ours + "positional.blocks.{}."
    if encoder.get("pos_depth", 1) > 1:
        positions = _pair(block, positional + "0.")
    else:
        newer = positional + "parametrizations.weight.original"  # how torch names the parts since 2.0
        positions = [
            Row(block + "weight_g", (positional + "weight_g",), also=((newer + "0",),)),
            Row(block + "weight_v", (positional + "weight_v",), also=((newer + "1",),)),
            Row(block + "bias", (positional + "bias",)),
        ]
    return [
        *positions,
        *_pair(ours + "norm.", theirs + "layer_norm."),
        *_layer_rows(ours + "layers.", theirs + "layers."),
    ]
