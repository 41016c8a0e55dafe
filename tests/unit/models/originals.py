"""The recorded runs of the original implementation, and its parameter names beside ours."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.models.wav2vec2 import Wav2Vec2Pretraining

FOLDER = Path(__file__).parents[2] / "fixtures" / "fairseq_models"
RENAMED = [
    (r"^feature_extractor\.conv_layers\.(\d+)\.0\.", r"encoder.feature_extractor.blocks.\1."),
    (r"^feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?", r"encoder.feature_extractor.blocks.\1.norm."),
    (r"^layer_norm\.", "encoder.feature_norm."),
    (r"^post_extract_proj\.", "encoder.projection."),
    (r"^mask_emb$", "encoder.mask_embedding"),
    (r"^encoder\.pos_conv\.", "encoder.transformer.positional.blocks."),
    (r"^encoder\.layer_norm\.", "encoder.transformer.norm."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"encoder.transformer.layers.\1.out."),
    (r"^encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"encoder.transformer.layers.\1.attention_norm."),
    (r"^encoder\.layers\.(\d+)\.final_layer_norm\.", r"encoder.transformer.layers.\1.final_norm."),
    (r"^encoder\.layers\.(\d+)\.(fc[12])\.", r"encoder.transformer.layers.\1.\2."),
    (r"^quantizer\.vars$", "quantizer.codebook"),
    (r"^quantizer\.weight_proj\.", "quantizer.projection."),
    (r"^project_q\.", "target_projection."),
    (r"^final_proj\.", "final_projection."),
]
ATTENTION = re.compile(r"^encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)$")


def recorded(case):
    """(meta, tensors, weights) of a recorded case."""
    folder = FOLDER / case
    meta = json.loads((folder / "meta.json").read_text())
    return meta, load_file(folder / "tensors.safetensors"), load_file(folder / "weights.safetensors")


def view_as_original(name, tensors):
    """The tensor that the original calls ``name``, out of tensors by our names."""
    name = name.removeprefix("w2v_encoder.w2v_model.")
    if name.startswith("w2v_encoder.proj."):
        return tensors[name.replace("w2v_encoder.proj", "head")]
    if match := ATTENTION.match(name):
        layer, part, kind = match.groups()
        return tensors[f"encoder.transformer.layers.{layer}.qkv.{kind}"].chunk(3)["qkv".index(part)]
    for pattern, ours in RENAMED:
        if re.search(pattern, name):
            found = tensors[re.sub(pattern, ours, name)]
            return found.flatten(0, 1)[None] if name == "quantizer.vars" else found
    raise KeyError(name)


def fill(model, weights):
    """Copy the original's weights in; every parameter of the model must get its value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        parameters = dict(model.named_parameters())
        for name, value in weights.items():
            target = view_as_original(name, parameters)
            assert target.shape == value.shape, name
            target.copy_(value)
    assert all(not parameter.isnan().any() for parameter in model.parameters())
    return model


def encoder_of(config, **changes):
    """Our encoder by the original's settings."""
    layers = []
    for piece in re.findall(r"\[\((\d+), ?(\d+), ?(\d+)\)\](?: ?\* ?(\d+))?", config["conv_feature_layers"]):
        layers += [tuple(int(n) for n in piece[:3])] * int(piece[3] or 1)
    settings = {
        "conv_layers": layers,
        "extractor_norm": {"default": "group", "layer_norm": "layer"}[config["extractor_mode"]],
        "conv_bias": config["conv_bias"],
        "norm_over_padding": True,
        "dim": config["encoder_embed_dim"],
        "num_layers": config["encoder_layers"],
        "ffn_dim": config["encoder_ffn_embed_dim"],
        "num_heads": config["encoder_attention_heads"],
        "pre_norm": config["layer_norm_first"],
        "pos_kernel": config["conv_pos"],
        "pos_groups": config["conv_pos_groups"],
        "feature_grad_mult": config["feature_grad_mult"],
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "dropout_input": 0.0,
        "layerdrop": 0.0,
    }
    return Wav2Vec2Encoder(**settings | changes)


def pretraining_of(meta, **changes):
    """Our pretraining model by the original's settings."""
    config = meta["model_config"]
    return Wav2Vec2Pretraining(
        encoder_of(config, **changes),
        final_dim=config["final_dim"],
        num_groups=config["latent_groups"],
        num_codes=config["latent_vars"],
        temperature=config["latent_temp"],
        num_negatives=config["num_negatives"],
        logit_temperature=config["logit_temp"],
        dropout_features=0.0,
        diversity_weight=meta["scalars"]["loss_weights"][0],
        penalty_weight=meta["scalars"]["loss_weights"][1],
    )


def assert_gradients(model, tensors, prefix="grad."):
    """Recorded gradients, each within 1e-3 of its largest entry."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = [name for name in tensors if name.startswith(prefix)]
    assert names
    for name in names:
        ours = view_as_original(name.removeprefix(prefix), gradients)
        largest = float(tensors[name].abs().max())
        torch.testing.assert_close(ours, tensors[name], rtol=0, atol=1e-3 * largest, msg=lambda m, n=name: f"{n}: {m}")
