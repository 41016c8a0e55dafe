"""Model folders: what goes in comes out, whole or not at all, and each bad folder gets its sentence."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.models.tiny import batch, encoder, pretraining
from toolkit.data.tokens import LetterTokenizer, load_tokenizer
from toolkit.errors import CheckpointError, ModelError
from toolkit.models import model_files
from toolkit.models.convert import load_encoder, load_pretrained, read_pretrained
from toolkit.models.convert.read import KNOWN
from toolkit.models.ctc import CTCModel
from toolkit.models.model_files import read_model_config, save_model_folder
from toolkit.seeds import Randomness

RNG = Randomness(1)
MODELS = {
    "wav2vec2_encoder": lambda: encoder(pre_norm=True),
    "wav2vec2_pretraining": pretraining,
    "ctc": lambda: CTCModel(encoder(), 7, freeze_updates=3),
}


def save(folder, kind="ctc", **changes):
    model = MODELS[kind]()
    settings = {"kind": kind, "sample_rate": 16000, "normalize": False} | changes
    return model, save_model_folder(folder, model, **settings)


@pytest.mark.parametrize("kind", MODELS)
def test_a_loaded_model_is_the_saved_one(tmp_path, kind):
    model, folder = save(tmp_path / "run" / "model", kind, sample_rate=8000, normalize=True, extra={"wer": 3.5})
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["model"]
    loaded = load_pretrained(folder)[0]
    assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
    waveforms, lengths = batch(2000, 1500)
    options = {"rng": RNG} if kind == "wav2vec2_pretraining" else {}
    ours, theirs = (m.eval()(waveforms, lengths, **options) for m in (loaded, model))
    name = {"wav2vec2_encoder": "features", "wav2vec2_pretraining": "loss_sum", "ctc": "log_probs"}[kind]
    assert torch.equal(getattr(ours, name), getattr(theirs, name))
    config = read_model_config(folder)
    assert (config.kind, config.sample_rate, config.normalize, config.tokens) == (kind, 8000, True, None)
    assert config.extra == {"wer": 3.5}


def test_the_tokenizer_comes_along(tmp_path):
    tokenizer = LetterTokenizer.from_texts(["HELLO WORLD"])
    _, folder = save(tmp_path / "model", tokenizer=tokenizer)
    assert read_model_config(folder).tokens["kind"] == "letters"
    assert (folder / read_model_config(folder).tokens["file"]).is_file()
    again = load_tokenizer(folder)
    assert again.encode("HELLO") == tokenizer.encode("HELLO") and again.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("kind", MODELS)
def test_the_encoder_of_any_folder(tmp_path, kind):
    model, folder = save(tmp_path / "model", kind)
    loaded = load_encoder(folder, dropout=0.3, mask_prob=0.2)
    source = model if kind == "wav2vec2_encoder" else model.encoder
    for name, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert loaded.config == source.config | {"dropout": 0.3, "mask_prob": 0.2}


def test_overrides_that_cannot_be(tmp_path):
    _, folder = save(tmp_path / "model")
    with pytest.raises(ModelError) as error:
        load_encoder(folder, drop_out=0.3)
    assert str(error.value) == "the encoder has no argument 'drop_out'; did you mean 'dropout'?"
    with pytest.raises(CheckpointError) as error:
        load_encoder(folder, ffn_dim=64)
    assert str(error.value).startswith(f"{folder}: transformer.layers.")
    assert "has the shape" in str(error.value) and "the model's is" in str(error.value)


def test_saving_again_replaces_all(tmp_path):
    save(tmp_path / "model", tokenizer=LetterTokenizer.from_texts(["AB"]))
    model, folder = save(tmp_path / "model", "wav2vec2_encoder")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert load_pretrained(folder)[0].config == model.config and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("step", ["save_file", "flush_to_disk", "replace_folder"])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, step):
    _, folder = save(tmp_path / "model", "wav2vec2_encoder")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_files, step, full)
    with pytest.raises(OSError):
        save(tmp_path / "model", "ctc")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_exchange_puts_the_older_folder_back(tmp_path, monkeypatch):
    model, folder = save(tmp_path / "model", "wav2vec2_encoder")
    rename = os.rename

    def broken(source, target):
        if Path(target) == folder and (Path(source) / "config.json").read_text().count('"ctc"'):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError):
        save(tmp_path / "model", "ctc")
    assert os.listdir(tmp_path) == ["model"] and load_pretrained(folder)[0].config == model.config


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError) as error:
        save(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: the folder holds other files, which saving a model would delete; give an empty or new folder."
    )
    assert (tmp_path / "thesis.txt").is_file()
    with pytest.raises(CheckpointError) as error:
        save(tmp_path / "thesis.txt")
    assert str(error.value) == f"{tmp_path / 'thesis.txt'}: this is a file; give a folder for the model."


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(CheckpointError) as error:
        save_model_folder(tmp_path / "m", encoder(), kind="hubert", sample_rate=16000, normalize=False)
    assert str(error.value) == (
        f"{tmp_path / 'm'}: a model of kind 'hubert' cannot be saved, the kinds are {', '.join(model_files.KINDS)}."
    )
    with pytest.raises(CheckpointError) as error:
        save(tmp_path / "m", extra={"path": Path("x")})
    assert str(error.value).startswith(f"{tmp_path / 'm'}: the model's settings are no plain JSON (")
    assert os.listdir(tmp_path) == []


def edit(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (raw | changes).items() if v != "gone"}))


def sentence(folder):
    with pytest.raises(CheckpointError) as error:
        load_pretrained(folder)[0]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_files(tmp_path):
    nowhere = tmp_path / "nowhere"
    assert sentence(nowhere) == f"{nowhere}: there is no such file or folder; check the path."
    _, folder = save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert sentence(folder) == f"{folder}: model.safetensors is missing; give the model/ folder of a finished run."
    (folder / "config.json").unlink()
    assert sentence(folder) == f"{folder}: config.json is missing, so this is no model; give {KNOWN}."


def test_truncated_files(tmp_path):
    _, folder = save(tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        weights.write_bytes(whole[:size])
        message = sentence(folder)
        assert message.startswith(f"{weights}: the file is truncated or no safetensors file (")
        assert message.endswith("; copy the folder again.")
    config = folder / "config.json"
    config.write_text(config.read_text()[:40])
    assert sentence(folder).startswith(f"{config}: this is no whole JSON file (")


def test_a_pickle_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    _, folder = save(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    assert "no safetensors file" in sentence(folder)
    torch.save({"trap": Trap()}, folder / "model.safetensors")
    assert "no safetensors file" in sentence(folder)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "gone"}, "the format is None, expected 'toolkit-model-1'"),
        ({"kind": "bert"}, "the kind is 'bert', known are wav2vec2_encoder, wav2vec2_pretraining, ctc"),
        ({"kind": "gone"}, "the kind is None, known are"),
        ({"sample_rate": "gone"}, "sample_rate is 'missing', which no model has"),
        ({"sample_rate": "16k"}, "sample_rate is '16k', which no model has"),
        ({"sample_rate": True}, "sample_rate is True, which no model has"),
        ({"sample_rate": 0}, "sample_rate is 0, expected Hz above 0"),
        ({"normalize": 1}, "normalize is 1, which no model has"),
        ({"architecture": []}, "architecture is [], which no model has"),
    ],
)
def test_foreign_settings(tmp_path, changes, words):
    _, folder = save(tmp_path / "model")
    edit(folder, **changes)
    message = sentence(folder)
    assert message.startswith(f"{folder / 'config.json'}: {words}")
    assert message.endswith("give the model/ folder of a run of this toolkit.")


def test_another_programs_config(tmp_path):
    _, folder = save(tmp_path / "model")
    (folder / "config.json").write_text('["Wav2Vec2ForCTC"]')
    assert sentence(folder).startswith(f"{folder / 'config.json'}: the format is 'list', expected 'toolkit-model-1'")


@pytest.mark.parametrize("file", ["../dict.ltr.txt", "/etc/passwd", "..", "", "a/b", "..\\x", None, 3])
def test_tokens_stay_in_the_folder(tmp_path, file):
    _, folder = save(tmp_path / "model")
    edit(folder, tokens={"kind": "letters", "file": file})
    assert f"the tokens' file {file!r} is not a plain file name in the folder" in sentence(folder)


def test_settings_that_make_no_model(tmp_path):
    _, folder = save(tmp_path / "model")
    good = json.loads((folder / "config.json").read_text())["architecture"]
    edit(folder, architecture=good | {"encoder": good["encoder"] | {"rope": True}})
    assert sentence(folder) == (
        f"{folder}: there is the setting 'rope' for the encoder, which this version cannot build."
    )
    for bad in (good | {"num_speakers": 3}, good | {"vocab_size": "many"}, good | {"vocab_size": 0}):
        edit(folder, architecture=bad)
        message = sentence(folder)
        assert message.startswith(f"{folder}: its settings make no model of kind 'ctc' (")
        assert message.endswith("); was the folder written by another version?")


def test_names_and_shapes_must_fit(tmp_path):
    _, folder = save(tmp_path / "model")
    weights = folder / "model.safetensors"
    good = load_file(weights)
    advice = "build the model with the settings in the folder's config.json."
    save_file({k: v for k, v in good.items() if k != "head.bias"}, weights)
    with pytest.raises(CheckpointError, match="1 of the model are missing and 0 of the file unexpected") as error:
        load_pretrained(folder)
    assert str(error.value).endswith("  missing in the file (1):\n    head.bias")
    assert load_pretrained(folder, allow_missing=["head.*"])
    save_file(good | {"tail.bias": torch.zeros(2)}, weights)
    with pytest.raises(CheckpointError, match="0 of the model are missing and 1 of the file unexpected") as error:
        load_pretrained(folder)
    assert str(error.value).endswith("  unexpected in the file (1):\n    tail.bias")
    assert load_pretrained(folder, allow_unexpected=["tail.*"])
    save_file(good | {"head.bias": torch.zeros(9)}, weights)
    assert sentence(folder) == f"{folder}: head.bias has the shape (9,), the model's is (7,); {advice}"


def test_a_refused_file_changes_nothing():
    model = encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {name: torch.zeros_like(value) for name, value in before.items()}
    tensors["mask_embedding"] = torch.zeros(3)
    with pytest.raises(CheckpointError):
        model_files.load_tensors(model, tensors, source="here")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_parts(tmp_path):
    _, folder = save(tmp_path / "model")
    contents = read_pretrained(folder)
    assert set(contents.part("head")) == {"weight", "bias"}
    assert contents.part("nothing").keys() == contents.tensors.keys()
