"""Names in Hugging Face folders: files, keys, and tables of tensors."""

from __future__ import annotations

from toolkit.models.convert.common import Row
from toolkit.models.convert.huggingface_config import DATA2VEC_AUDIO, DATA2VEC_TEXT

MEMORY = "huggingface"
"""Key in a model folder's extra: the folder's own files, and the order of its head's rows."""
OWN = "toolkit"
"""Key in config.json: what the toolkit knows of its model beyond transformers' settings."""

PREPROCESSOR_FILE = "preprocessor_config.json"
PICKLED_FILE = "pytorch_model.bin"
TOKEN_SETTINGS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "architectures")
"""Keys of config.json that follow from the vocabulary and the head, not from the architecture."""

TOKEN_TYPES, POOLER = "embeddings.token_type_embeddings.weight", "pooler.dense"
"""Parts of Data2VecTextModel that the toolkit's encoder of text has only where they do something."""

HEADS = (
    "projector.*", "classifier.*", "layer_weights", "lm_head.*", "qa_outputs.*", "pooler.*",
    "embeddings.position_ids", "embeddings.token_type_ids", TOKEN_TYPES,
)  # fmt: skip
"""Of models that are read as encoders only."""


def _pairs(ours: str, theirs: str) -> list[Row]:
    """Rows for a layer's weight and bias."""
    return [Row(f"{ours}.{part}", (f"{theirs}.{part}",)) for part in ("weight", "bias")]


def encoder_table(model_type: str) -> list[Row]:
    """Names in an encoder of speech, without the base model's prefix."""
    layer, theirs = "transformer.layers.{}", "encoder.layers.{}"
    table = [
        *_pairs("feature_extractor.blocks.{}.norm", "feature_extractor.conv_layers.{}.layer_norm"),
        *_pairs("feature_extractor.blocks.{}", "feature_extractor.conv_layers.{}.conv"),
        *_pairs("feature_norm", "feature_projection.layer_norm"),
        *_pairs("projection", "feature_projection.projection"),
        Row("mask_embedding", ("masked_spec_embed",)),
        *_pairs("transformer.norm", "encoder.layer_norm"),
        *_pairs(f"{layer}.out", f"{theirs}.attention.out_proj"),
        *_pairs(f"{layer}.attention_norm", f"{theirs}.layer_norm"),
        *_pairs(f"{layer}.fc1", f"{theirs}.feed_forward.intermediate_dense"),
        *_pairs(f"{layer}.fc2", f"{theirs}.feed_forward.output_dense"),
        *_pairs(f"{layer}.final_norm", f"{theirs}.final_layer_norm"),
    ]
    table += [
        Row(f"{layer}.qkv.{part}", tuple(f"{theirs}.attention.{name}_proj.{part}" for name in "qkv"))
        for part in ("weight", "bias")
    ]
    if model_type == DATA2VEC_AUDIO:
        return table + _pairs("transformer.positional.blocks.{}", "encoder.pos_conv_embed.layers.{}.conv")
    conv, block = "encoder.pos_conv_embed.conv", "transformer.positional.blocks.0"
    return table + [
        # torch's parametrization, and the spelling of the hub's older files
        Row(f"{block}.weight_g", (f"{conv}.parametrizations.weight.original0",), ((f"{conv}.weight_g",),)),
        Row(f"{block}.weight_v", (f"{conv}.parametrizations.weight.original1",), ((f"{conv}.weight_v",),)),
        Row(f"{block}.bias", (f"{conv}.bias",)),
    ]


def text_table() -> list[Row]:
    """Names in an encoder of text, without the base model's prefix."""
    layer, theirs = "layers.{}", "encoder.layer.{}"
    table = [
        Row("token_embedding.weight", ("embeddings.word_embeddings.weight",)),
        Row("position_embedding.weight", ("embeddings.position_embeddings.weight",)),
        Row("token_type_embedding.weight", (TOKEN_TYPES,)),
        *_pairs("pooler", POOLER),
        *_pairs("embedding_norm", "embeddings.LayerNorm"),
        *_pairs(f"{layer}.out", f"{theirs}.attention.output.dense"),
        *_pairs(f"{layer}.attention_norm", f"{theirs}.attention.output.LayerNorm"),
        *_pairs(f"{layer}.fc1", f"{theirs}.intermediate.dense"),
        *_pairs(f"{layer}.fc2", f"{theirs}.output.dense"),
        *_pairs(f"{layer}.final_norm", f"{theirs}.output.LayerNorm"),
    ]
    names = ("query", "key", "value")
    return table + [
        Row(f"{layer}.qkv.{part}", tuple(f"{theirs}.attention.self.{name}.{part}" for name in names))
        for part in ("weight", "bias")
    ]


HEAD_TABLE = [
    Row("quantizer.codebook", ("quantizer.codevectors",), flat=True),
    *_pairs("quantizer.projection", "quantizer.weight_proj"),
    *_pairs("target_projection", "project_q"),
    *_pairs("final_projection", "project_hid"),
    *_pairs("head", "lm_head"),
]


def names_table(model_type: str, inner: str) -> list[Row]:
    """All names; ``inner`` stands before the encoder's in ours."""
    if model_type == DATA2VEC_TEXT:
        return text_table()
    encoder = [Row(inner + row.ours, row.theirs, row.also, row.flat) for row in encoder_table(model_type)]
    return encoder + HEAD_TABLE
