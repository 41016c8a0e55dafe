"""The Pretrainer: parts by name, strict unless told otherwise."""

import pytest
import torch

from tests.unit.models.tiny import encoder, pretraining
from toolkit.errors import CheckpointError, ConfigError
from toolkit.models.ctc import CTCModel
from toolkit.models.model_files import load_tensors, save_model_folder
from toolkit.models.pretrainer import Pretrainer


@pytest.fixture
def folders(tmp_path):
    models = {"wav2vec2_encoder": encoder(), "wav2vec2_pretraining": pretraining(), "ctc": CTCModel(encoder(), 7)}
    for kind, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        save_model_folder(tmp_path / kind, model, kind=kind, sample_rate=16000, normalize=False)
    return tmp_path, models


@pytest.mark.parametrize("kind", ["wav2vec2_encoder", "wav2vec2_pretraining", "ctc"])
def test_the_encoder_comes_from_any_kind(folders, kind):
    path, models = folders
    fresh = CTCModel(encoder(dropout=0.0), 30)
    head = fresh.head.weight.clone()
    (report,) = Pretrainer(loadables={"encoder": fresh.encoder}, paths={"encoder": path / kind}).load()
    source = models[kind] if kind == "wav2vec2_encoder" else models[kind].encoder
    for name, value in source.state_dict().items():
        assert torch.equal(fresh.encoder.state_dict()[name], value)
    assert torch.equal(fresh.head.weight, head)
    total = len(source.state_dict())
    assert (report.loaded, report.total, report.missing) == (total, total, ())
    assert str(report) == f"encoder: {total} of {total} tensors from {path / kind} (kind {kind})"
    assert report.config.sample_rate == 16000


def test_a_whole_model(folders):
    path, models = folders
    fresh = CTCModel(encoder(), 7)
    Pretrainer(loadables={"model": fresh}, paths={"model": path / "ctc"}).load()
    for name, value in models["ctc"].state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


def test_missing_and_unexpected_only_by_name(folders):
    path, models = folders
    fresh = CTCModel(encoder(), 7)
    options = {"loadables": {"model": fresh}, "paths": {"model": path / "wav2vec2_pretraining"}}
    head = fresh.head.weight.clone()
    with pytest.raises(CheckpointError) as error:
        Pretrainer(**options).load()
    assert "tensors are not in the file (head.bias, head.weight)" in str(error.value)
    with pytest.raises(CheckpointError) as error:
        Pretrainer(**options, allow_missing=["head.*"]).load()
    assert "tensors of the file are not in the model (final_projection.bias" in str(error.value)
    patterns = ["quantizer.*", "target_projection.*", "final_projection.*"]
    (report,) = Pretrainer(**options, allow_missing=["head.*"], allow_unexpected=patterns).load()
    assert report.missing == ("head.bias", "head.weight") and len(report.unexpected) == 7
    assert torch.equal(fresh.head.weight, head)
    assert torch.equal(fresh.encoder.mask_embedding, models["wav2vec2_pretraining"].encoder.mask_embedding)


def test_nothing_that_fits_is_an_error_even_if_allowed(folders):
    path, _ = folders
    with pytest.raises(CheckpointError) as error:
        Pretrainer(
            loadables={"decoder": torch.nn.Linear(2, 2)},
            paths={"decoder": path / "ctc"},
            allow_missing=["*"],
            allow_unexpected=["*"],
        ).load()
    assert str(error.value) == (f"{path / 'ctc'}: none of the 2 tensors of 'decoder' is in the folder; give another.")


def test_another_size_in_a_folder_and_in_a_file(folders):
    path, models = folders
    advice = {
        path / "ctc": "build the model with the settings in the folder's config.json.",
        path / "model.pt": "build the model with that file's sizes, which `python -m toolkit inspect` tells.",
    }
    for source, words in advice.items():
        with pytest.raises(CheckpointError) as error:
            load_tensors(CTCModel(encoder(), 8), models["ctc"].state_dict(), source=source)
        assert str(error.value).startswith(f"{source}: head.") and str(error.value).endswith(f"; {words}")


def test_no_folder_leaves_a_part_alone():
    fresh = encoder()
    before = fresh.mask_embedding.clone()
    assert Pretrainer(loadables={"encoder": fresh}, paths={"encoder": None}).load() == []
    assert torch.equal(fresh.mask_embedding, before)


def test_a_folder_for_nobody():
    with pytest.raises(ConfigError) as error:
        Pretrainer(loadables={"encoder": encoder()}, paths={"encodr": "x"})
    assert str(error.value) == "the pretrainer has a folder for 'encodr', but its parts are encoder."
