"""torchaudio's state dicts, beside an output of torchaudio's own model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from toolkit.errors import CheckpointError
from toolkit.models.convert.load import build_converted, load_pretrained
from toolkit.models.convert.read import read_pretrained
from toolkit.models.convert.torchaudio import is_torchaudio, read_torchaudio

FIXTURES = Path(__file__).parents[3] / "fixtures" / "torchaudio"
FILE = Path("model.pt")


def recorded(name):
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return state, tensors


def outputs(model, *arguments):
    with torch.no_grad():
        return model(*arguments)


def test_a_fine_tuned_base_model_computes_the_same():
    state, tensors = recorded("group")
    converted = read_torchaudio(state, FILE)
    assert (converted.missing, converted.unexpected, converted.info.fresh) == ((), (), ("encoder.mask_embedding",))
    assert converted.info.kind == "ctc" and not converted.info.normalize and converted.info.labels is None
    out = outputs(build_converted(converted, FILE), tensors["waveforms"])
    torch.testing.assert_close(out.log_probs, tensors["output"].log_softmax(-1), rtol=0, atol=1e-5)


def test_a_large_layout_computes_the_same():
    state, tensors = recorded("layer")
    converted = read_torchaudio(state, FILE)
    assert converted.info.kind == "wav2vec2_encoder" and converted.info.normalize
    out = outputs(build_converted(converted, FILE), tensors["waveforms"])
    torch.testing.assert_close(out.features, tensors["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["group", "layer"])
def test_padded_batches_compute_the_same(name):
    state, tensors = recorded(name)
    lengths = tensors["lengths"]
    padded = tensors["waveforms"] * (torch.arange(4000)[None] < lengths[:, None])
    out = outputs(build_converted(read_torchaudio(state, FILE), FILE), padded, lengths)
    assert out.frame_lengths.tolist() == tensors["frames"].tolist()
    values = out.log_probs if name == "group" else out.features
    expected = tensors["padded_output"].log_softmax(-1) if name == "group" else tensors["padded_output"]
    for ours, theirs, frames in zip(values, expected, out.frame_lengths, strict=True):
        torch.testing.assert_close(ours[:frames], theirs[:frames], rtol=0, atol=1e-5)


def test_what_the_shapes_do_not_say_is_said():
    notes = " ".join(read_torchaudio(recorded("layer")[0], FILE).info.notes)
    assert "number of heads: 2" in notes and "before each block" in notes and "normalized: yes" in notes
    assert "output 0 is the blank" in " ".join(read_torchaudio(recorded("group")[0], FILE).info.notes)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "hubert", "lightning", "old weight norm"])
def test_wrappers_are_seen_through(wrap, tmp_path):
    state, tensors = recorded("layer")
    if wrap == "state_dict":
        state = {"state_dict": state, "epoch": 3}
    if wrap in ("hubert", "lightning"):
        outer = "model." if wrap == "lightning" else ""
        state = {f"{outer}wav2vec2.{name}": value for name, value in state.items()}
        state[f"{outer}mask_generator.mask_embedding"] = torch.arange(128.0)
        state[f"{outer}logit_generator.label_embeddings"] = torch.zeros(4, 5)
    if wrap == "old weight norm":
        names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        for new, old in names.items():
            state[f"encoder.transformer.pos_conv_embed.conv.{old}"] = state.pop(
                f"encoder.transformer.pos_conv_embed.conv.{new}"
            )
    file = tmp_path / "model.pt"
    torch.save(state, file)
    encoder, info = load_pretrained(file)
    torch.testing.assert_close(outputs(encoder, tensors["waveforms"]).features, tensors["output"], rtol=0, atol=1e-5)
    if wrap in ("hubert", "lightning"):
        assert encoder.mask_embedding.tolist() == list(range(128))
        assert info.fresh == () and info.unused == ("logit_generator.label_embeddings",)


def test_known_widths_have_their_own_heads():
    state, _ = recorded("layer")

    def widened(value, dim):  # only shapes matter
        return value.new_zeros([dim if size == 128 else size for size in value.shape])

    for dim, heads in ((768, 12), (1024, 16), (1280, 16), (1920, 16)):
        wide = {name: widened(value, dim) for name, value in state.items()}
        name = "encoder.transformer.pos_conv_embed.conv.parametrizations.weight.original1"
        wide[name] = torch.zeros(dim, dim // 16, 16)
        assert read_torchaudio(wide, FILE).config.architecture["num_heads"] == heads


def broken(what):
    state, _ = recorded("group")
    name = "encoder.transformer.layers.0.attention.q_proj.weight"
    if what == "wavlm":
        state["encoder.transformer.layers.0.attention.rel_attn_embed.weight"] = torch.zeros(4, 2)
    elif what == "kernel":
        state["feature_extractor.conv_layers.0.conv.weight"] = torch.zeros(16, 1, 11)
    elif what == "width":
        state["encoder.feature_projection.projection.weight"] = torch.zeros(32, 16)
    elif what == "no positions":
        del state["encoder.transformer.pos_conv_embed.conv.parametrizations.weight.original1"]
    elif what == "shape":
        state[name] = torch.zeros(128, 64)
    elif what == "no convolutions":
        state = {key: value for key, value in state.items() if "conv_layers" not in key}
    return state


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("wavlm", "WavLM"),
        ("kernel", "the strides are not in such a file"),
        ("width", "width is 32"),
        ("no positions", "missing"),
        ("shape", "these must have one shape"),
        ("no convolutions", "no convolutions"),
    ],
)
def test_other_models_are_refused_in_a_sentence(what, words):
    with pytest.raises(CheckpointError, match=words):
        read_torchaudio(broken(what), FILE)


def test_missing_and_extra_tensors_are_named(tmp_path):
    state, _ = recorded("group")
    del state["aux.bias"]
    state["surplus"] = torch.zeros(1)
    converted = read_torchaudio(state, FILE)
    assert (converted.missing, converted.unexpected) == (("head.bias",), ("surplus",))
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="1 of the model are missing and 1 of the file unexpected"):
        load_pretrained(tmp_path / "model.pt")
    assert load_pretrained(tmp_path / "model.pt", allow_missing=["head.bias"], allow_unexpected=["surplus"])


def test_other_files_are_not_taken_for_it(tmp_path):
    assert not is_torchaudio({"model": {}}) and not is_torchaudio([1]) and not is_torchaudio({"state_dict": 3})
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="no model that is known here"):
        read_pretrained(tmp_path / "model.pt")
