"""What holds for every kind of file: what is too large, of another type, not finite or under another name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.models.originals import FOLDER
from toolkit.__main__ import main
from toolkit.errors import CheckpointError, ManifestError
from toolkit.models.convert import load_pretrained, read_pretrained
from toolkit.models.convert.write import write_pretrained

CTC = FOLDER / "w2v2_ctc_from_groupnorm" / "checkpoint.pt"


def changed(tmp_path, change):
    """The recorded CTC model with its contents changed."""
    contents = torch.load(CTC, weights_only=False)
    change(contents)
    torch.save(contents, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def encoder_settings(contents):
    return contents["cfg"]["model"]["w2v_args"]["model"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: encoder_settings(c).update(encoder_layers=10**9), "the settings name 1000000000 layers, but the"),
        (lambda c: encoder_settings(c).update(encoder_embed_dim=-1), "its settings make no model"),
        (lambda c: encoder_settings(c).update(encoder_embed_dim=10**12), "its settings make no model"),
        (lambda c: c["cfg"]["task"].update(sample_rate=0), "the setting sample_rate is 0, expected Hz above 0"),
        (
            lambda c: c["model"].update({"w2v_encoder.proj.bias": c["model"]["w2v_encoder.proj.bias"].long()}),
            "the tensor for head.bias is of int64, expected floating point numbers",
        ),
        (
            lambda c: c["model"].update({"w2v_encoder.proj.weight": c["model"]["w2v_encoder.proj.weight"].to_sparse()}),
            "the tensor for head.weight is of sparse_coo, expected floating point numbers",
        ),
    ],
)
def test_files_that_no_program_wrote(change, words, tmp_path):
    with pytest.raises(CheckpointError) as error:
        load_pretrained(changed(tmp_path, change))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_values_that_are_not_finite_are_noted(tmp_path):
    def spoil(contents):
        contents["model"]["w2v_encoder.proj.bias"][3] = float("nan")

    notes = read_pretrained(changed(tmp_path, spoil)).info.notes
    assert any(note.startswith("1 tensors hold values that are not finite (head.bias)") for note in notes)
    assert not any("finite" in note for note in read_pretrained(CTC).info.notes)


def test_unknown_letters_and_the_tokens_options(tmp_path):
    converted = read_pretrained(CTC)
    assert converted.tokenizer.encode("é")[0] == 3  # <unk>, as in fairseq
    own = read_pretrained(CTC)
    own.tokenizer.unknown = "drop"
    write_pretrained(own, tmp_path / "own" / "model.pt", to="fairseq")
    assert read_pretrained(tmp_path / "own" / "model.pt").tokenizer.config == own.tokenizer.config


def test_another_file_in_a_model_folder_is_not_its_model(tmp_path):
    write_pretrained(read_pretrained(CTC), tmp_path / "model", to="toolkit")
    weights = tmp_path / "model" / "model.safetensors"
    assert read_pretrained(weights).tensors.keys() == load_file(weights).keys()
    shutil.copy(weights, tmp_path / "model" / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: the model of this folder is in model\.safetensors"):
        read_pretrained(tmp_path / "model" / "other.safetensors")


def test_inspect_says_what_a_model_folder_lacks(tmp_path, capsys):
    write_pretrained(read_pretrained(CTC), tmp_path / "model", to="toolkit")
    weights = tmp_path / "model" / "model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if name != "head.bias"}, weights)
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "missing in the file (1):\n    head.bias" in capsys.readouterr().out


def test_a_manifest_is_not_written_over_another(tmp_path):
    source = FOLDER.parent / "fairseq_folder" / "train.tsv"
    audio = str(FOLDER.parent / "librispeech_tiny")
    for name in ("train.tsv", "train.wrd"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ManifestError, match="is there already; name a new path, nothing is overwritten"):
            main(["manifest", str(source), str(tmp_path / "train.tsv"), "--audio_folder", audio])
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert main(["manifest", str(source), str(tmp_path / "train.tsv"), "--audio_folder", audio]) == 0


@pytest.mark.parametrize("name", ["aux.weight", "encoder.feature_projection.projection.weight"])
def test_a_number_where_a_matrix_should_be(name, tmp_path):
    state = load_file(FOLDER.parent / "torchaudio" / "group.safetensors")
    state = {key.removeprefix("state."): value for key, value in state.items() if key.startswith("state.")} or state
    torch.save(state | {name: torch.tensor(1.0)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="tensors that tell the model's sizes are missing"):
        read_pretrained(tmp_path / "model.pt")
