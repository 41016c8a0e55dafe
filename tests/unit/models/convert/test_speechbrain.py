"""SpeechBrain's folders: its own architecture is refused, its wrapper around a Hugging Face model is read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from toolkit.errors import CheckpointError
from toolkit.models.convert.load import load_pretrained

FIXTURES = Path(__file__).parents[3] / "fixtures" / "torchaudio"


def own_folder(folder):
    """The recipe's four modules, by SpeechBrain 1.0's names and sizes made small."""
    dim, ffn, channels = 8, 16, 4
    extractor = {"norm.weight": torch.ones(channels), "norm.bias": torch.zeros(channels)}
    for i, kernel in enumerate((11, 3, 3, 3, 3, 3, 3)):
        block = f"extractor.convblock_{i}.convs"
        extractor[f"{block}.conv_0.conv.weight"] = torch.zeros(channels, channels if i else 1, kernel)
        extractor |= {f"{block}.norm_0.norm.{part}": torch.zeros(channels) for part in ("weight", "bias")}
    layer = "latent_encoder.layers.0"
    encoder = {
        "mask_emb": torch.zeros(dim),
        "input_projector.weight": torch.zeros(dim, channels),
        "positional_encoding.pe": torch.zeros(1, 2500, dim),
        f"{layer}.self_att.att.in_proj_weight": torch.zeros(3 * dim, dim),
        f"{layer}.pos_ffn.ffn.0.weight": torch.zeros(ffn, dim),
        f"{layer}.norm1.norm.weight": torch.zeros(dim),
        "latent_encoder.norm.norm.weight": torch.zeros(dim),
    }
    parts = {
        "latent_extractor": extractor,
        "latent_encoder": encoder,
        "feat_proj": {"weight": torch.zeros(4, dim)},
        "target_quantiser": {"quantiser.vars": torch.zeros(1, 6, 2), "proj.weight": torch.zeros(4, 4)},
    }
    for name, state in parts.items():
        torch.save(state, folder / f"{name}.ckpt")
    (folder / "CKPT.yaml").write_text("end-of-epoch: true\n")
    return folder


def test_its_own_architecture_is_refused_with_what_differs(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(own_folder(tmp_path))
    assert "sinusoids" in str(caught.value) and "1e-6" in str(caught.value)


def wrapped_state(inner="model."):
    """torchaudio's recorded model by the names of SpeechBrain's wrapper around Hugging Face's."""
    tensors = load_file(FIXTURES / "layer.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    renamed = {
        name.replace("encoder.feature_projection", "feature_projection").replace(
            "encoder.transformer", "encoder"
        ): value
        for name, value in state.items()
    }
    return {inner + name: value for name, value in renamed.items()}, tensors


@pytest.mark.parametrize("pretraining", [False, True])
def test_a_wrapped_model_computes_the_same(tmp_path, pretraining):
    state, tensors = wrapped_state("model.wav2vec2." if pretraining else "model.")
    if pretraining:
        state |= {"model.wav2vec2.masked_spec_embed": torch.ones(128), "model.project_q.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "wav2vec2.ckpt")
    encoder, info = load_pretrained(tmp_path)
    with torch.no_grad():
        out = encoder(tensors["waveforms"])
    torch.testing.assert_close(out.features, tensors["output"], rtol=0, atol=1e-5)
    assert info.source.startswith("SpeechBrain")
    assert info.unused == (("model.project_q.weight",) if pretraining else ())
    assert info.fresh == (() if pretraining else ("mask_embedding",))


def test_other_folders_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"this one holds model\.ckpt"):
        load_pretrained(tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "wav2vec2.ckpt")
    with pytest.raises(CheckpointError, match="no tensors of a wrapped model"):
        load_pretrained(tmp_path)
    (tmp_path / "wav2vec2.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError):
        load_pretrained(tmp_path)
