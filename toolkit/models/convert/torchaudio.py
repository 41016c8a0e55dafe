"""torchaudio's Wav2Vec2Model state dicts, from wav2vec 2.0 or HuBERT.

Such a file holds tensors alone. Sizes follow from their shapes; what does not (heads, strides, the place of the
norms) follows from which published model has these sizes, and the notes say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.errors import CheckpointError
from toolkit.models.convert.common import Converted, PretrainedInfo, Row, split_unused
from toolkit.models.convert.shapes import expected_shapes, import_checked
from toolkit.models.model_files import ModelConfig

FIRST = "feature_extractor.conv_layers.0.conv.weight"
PROJECTION = "encoder.feature_projection.projection.weight"
POSITIONAL = "encoder.transformer.pos_conv_embed.conv"
LAYER = "encoder.transformer.layers.{}"

KERNELS = (10, 3, 3, 3, 3, 2, 2)
STRIDES = (5, 2, 2, 2, 2, 2, 2)
HEAD_WIDTH = 64
HEADS = {1280: 16, 1920: 16}
"""Of the widths whose heads are wider than HEAD_WIDTH: XLS-R 1B and 2B, HuBERT X-LARGE."""

UNUSED = ("logit_generator.*",)
"""Of HuBERT's pretraining model."""
MASK = "mask_generator.mask_embedding"


def _pairs(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}.{part}", (f"{theirs}.{part}",)) for part in ("weight", "bias")]


def _table(inner: str) -> list[Row]:
    """All names; ``inner`` stands before the encoder's in ours."""
    layer, block = f"{inner}transformer.layers.{{}}", f"{inner}transformer.positional.blocks.0"
    return [
        *_pairs(f"{inner}feature_extractor.blocks.{{}}.norm", "feature_extractor.conv_layers.{}.layer_norm"),
        *_pairs(f"{inner}feature_extractor.blocks.{{}}", "feature_extractor.conv_layers.{}.conv"),
        *_pairs(f"{inner}feature_norm", "encoder.feature_projection.layer_norm"),
        *_pairs(f"{inner}projection", "encoder.feature_projection.projection"),
        Row(f"{inner}mask_embedding", (MASK,)),
        Row(f"{block}.weight_g", (f"{POSITIONAL}.parametrizations.weight.original0",), ((f"{POSITIONAL}.weight_g",),)),
        Row(f"{block}.weight_v", (f"{POSITIONAL}.parametrizations.weight.original1",), ((f"{POSITIONAL}.weight_v",),)),
        Row(f"{block}.bias", (f"{POSITIONAL}.bias",)),
        *_pairs(f"{inner}transformer.norm", "encoder.transformer.layer_norm"),
        *_pairs(f"{layer}.out", f"{LAYER}.attention.out_proj"),
        *_pairs(f"{layer}.attention_norm", f"{LAYER}.layer_norm"),
        *_pairs(f"{layer}.fc1", f"{LAYER}.feed_forward.intermediate_dense"),
        *_pairs(f"{layer}.fc2", f"{LAYER}.feed_forward.output_dense"),
        *_pairs(f"{layer}.final_norm", f"{LAYER}.final_layer_norm"),
        *(
            Row(f"{layer}.qkv.{part}", tuple(f"{LAYER}.attention.{name}_proj.{part}" for name in "qkv"))
            for part in ("weight", "bias")
        ),
        *_pairs("head", "aux"),
    ]


def is_torchaudio(contents: object) -> bool:
    """Whether an unpickled object is a state dict of torchaudio's Wav2Vec2Model, perhaps in a trainer's checkpoint."""
    return any("encoder.feature_projection." in str(name) for name in _state(contents))


def _state(contents: object) -> Mapping[Any, Any]:
    """The state dict itself: a training script's checkpoint holds it as ``state_dict``."""
    if not isinstance(contents, Mapping):
        return {}
    inner = contents.get("state_dict")
    return inner if isinstance(inner, Mapping) else contents


def read_torchaudio(contents: Mapping[str, Any], path: Path) -> Converted:
    """A state dict in the toolkit's terms.

    Arguments
    ---------
    contents : what the file holds.
    path : the file, for errors.

    Raises
    ------
    CheckpointError : a model that the toolkit lacks, or sizes that no published model has.
    """
    tensors = _tensors(contents, path)
    encoder, notes = _architecture(tensors, path)
    kind = "ctc" if "aux.weight" in tensors else "wav2vec2_encoder"
    inner = "encoder." if kind == "ctc" else ""
    architecture: dict[str, Any] = encoder
    if kind == "ctc":
        architecture = {"encoder": encoder, "vocab_size": len(tensors["aux.weight"])}
        notes += ("the file does not say what the outputs mean; output 0 is the blank",)
    expected = expected_shapes(kind, architecture, source=path)
    found, missing, left = import_checked(_table(inner), tensors, expected, source=path)
    unused, unexpected = split_unused(left, UNUSED)
    mask = f"{inner}mask_embedding"
    fresh = (mask,) if mask in missing else ()
    normalize = encoder["extractor_norm"] == "layer"
    info = PretrainedInfo(
        kind=kind,
        source="torchaudio, Wav2Vec2Model",
        sample_rate=16000,
        normalize=normalize,
        unused=unused,
        fresh=fresh,
        notes=notes,
    )
    model = ModelConfig(kind, architecture, 16000, normalize, None, {})
    return Converted(model, found, info, None, tuple(name for name in missing if name not in fresh), unexpected)


def _tensors(contents: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The model's tensors, without what a wrapper put before their names."""
    state = {str(name): value for name, value in _state(contents).items() if isinstance(value, Tensor)}
    full = next((name for name in state if name.endswith(FIRST)), None)
    if full is None or any(PROJECTION not in name and name.endswith("rel_attn_embed.weight") for name in state):
        what = "relative positions in its attention (WavLM)" if full else "no convolutions over the waveform"
        raise CheckpointError(f"{path}: the model has {what}; the toolkit reads wav2vec 2.0's and HuBERT's.")
    prefix = full.removesuffix(FIRST)
    # In HuBERT's pretraining model the mask vector stands beside the model proper.
    outer = prefix.removesuffix("wav2vec2.")
    return {name.removeprefix(prefix).removeprefix(outer): value for name, value in state.items()}


def _architecture(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The encoder's settings by the shapes of its tensors, and what they do not say."""
    convolutions = _numbered(tensors, r"feature_extractor\.conv_layers\.(\d+)\.conv\.weight")
    layers = _numbered(tensors, r"encoder\.transformer\.layers\.(\d+)\.layer_norm\.weight")
    names = (PROJECTION, f"{POSITIONAL}.bias", f"{LAYER.format(0)}.feed_forward.intermediate_dense.weight")
    weight_v = next(
        (tensors[name] for end in ("parametrizations.weight.original1", "weight_v")
         if (name := f"{POSITIONAL}.{end}") in tensors), None,
    )  # fmt: skip
    ranks = dict(zip(names, (2, 1, 2), strict=True)) | {"aux.weight": 2}
    is_whole = all(name in tensors for name in names)
    if any(name in tensors and tensors[name].ndim != rank for name, rank in ranks.items()):
        is_whole = False
    if weight_v is None or weight_v.ndim != 3 or not is_whole:
        raise CheckpointError(f"{path}: tensors that tell the model's sizes are missing; give the whole state dict.")
    shapes = [tuple(value.shape) for value in convolutions]
    kernels = tuple(shape[-1] for shape in shapes)
    if kernels != KERNELS or any(len(shape) != 3 for shape in shapes):
        raise CheckpointError(
            f"{path}: the convolutions' kernels are {kernels}; the strides are not in such a file, and the toolkit "
            f"knows them for {KERNELS} only."
        )
    dim = tensors[PROJECTION].shape[0]
    heads = HEADS.get(dim, dim // HEAD_WIDTH)
    if not heads or dim % heads or not weight_v.shape[1] or tensors[PROJECTION].shape[-1] == dim:
        raise CheckpointError(
            f"{path}: the transformer's width is {dim}; the toolkit reads widths in multiples of {HEAD_WIDTH}, other "
            "than that of the convolutions."
        )
    large = "feature_extractor.conv_layers.1.layer_norm.weight" in tensors
    encoder = {
        "conv_layers": [[shape[0], shape[2], stride] for shape, stride in zip(shapes, STRIDES, strict=True)],
        "extractor_norm": "layer" if large else "group",
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in tensors,
        "norm_over_padding": not large,
        "dim": dim,
        "num_layers": len(layers),
        "ffn_dim": tensors[names[2]].shape[0],
        "num_heads": heads,
        "pre_norm": large,
        "pos_kernel": weight_v.shape[2],
        "pos_groups": dim // weight_v.shape[1],
    }
    notes = (
        f"the file does not say the number of heads: {heads}, as published models of width {dim} have",
        f"the file does not say where the norms stand: {'before' if large else 'after'} each block, as in published "
        f"models with {'a layer norm after each convolution' if large else 'a group norm'}",
        f"the file does not say whether waveforms are normalized: {'yes' if large else 'no'}, as for these models",
        "dropouts and masks are not in such files: the toolkit's defaults",
    )
    return encoder, notes


def _numbered(tensors: Mapping[str, Tensor], pattern: str) -> list[Tensor]:
    """The tensors whose names match, in the order of the number in them."""
    found = [(int(match.group(1)), name) for name in tensors if (match := re.fullmatch(pattern, name))]
    return [tensors[name] for _, name in sorted(found)]
