"""data2vec's whole models, teacher and head too, from fairseq's checkpoints and back; and as Hugging Face folders."""

import json

import pytest
import torch
import transformers

from tests.unit.models.convert.test_fairseq import FOLDER, contents_of, converted_of, equal, saved
from tests.unit.models.tiny import batch, encoder
from toolkit.__main__ import main as command
from toolkit.errors import CheckpointError
from toolkit.models.convert import load_encoder, load_pretrained, read_pretrained
from toolkit.models.convert.common import encoder_alone
from toolkit.models.convert.fairseq import write_fairseq
from toolkit.models.convert.write import write_pretrained
from toolkit.models.data2vec import Data2VecAudio, Data2VecText
from toolkit.models.model_files import load_tensors
from toolkit.models.text_encoder import TextEncoder

AUDIO, TEXT = "data2vec_audio/checkpoint.pt", "data2vec_text/checkpoint.pt"
SPEECH = {"extractor_norm": "layer", "pos_depth": 2, "pos_kernel": 10, "min_masks": 1}


def plain(file):
    """A fixture's contents, to be changed."""
    contents = contents_of(file)
    return contents | {"cfg": json.loads(json.dumps(contents["cfg"]))}


def objective(file, tmp_path, **changes):
    """The arguments but the encoder's, and the notes, of a fixture whose settings are changed."""
    contents = plain(file)
    contents["cfg"]["model"] |= changes
    read = read_pretrained(saved(contents, tmp_path))
    if "encoder" not in read.config.architecture:
        return None, read.info.notes
    return {key: value for key, value in read.config.architecture.items() if key != "encoder"}, read.info.notes


def audio(**changes):
    return Data2VecAudio(encoder(**SPEECH | changes.pop("encoder", {})), **{"top_layers": 2} | changes)


def text(**changes):
    torch.manual_seed(4)
    sizes = {"vocab_size": 11, "dim": 16, "num_layers": 2, "ffn_dim": 32, "num_heads": 2, "max_positions": 9}
    return Data2VecText(TextEncoder(**sizes), **{"mask_id": 10, "top_layers": 2} | changes)


def test_settings_of_the_recordings():
    architecture = read_pretrained(FOLDER / AUDIO).config.architecture
    assert {key: value for key, value in architecture.items() if key != "encoder"} == {
        "top_layers": 2, "layer_norms": ["instance"], "target_norms": [], "loss_beta": 0.0, "loss_scale": None,
        "ema_decay": [0.9, 0.99, 10], "ema_layers_only": True, "ema_timing": "fairseq",
    }  # fmt: skip
    architecture = read_pretrained(FOLDER / TEXT).config.architecture
    assert {key: value for key, value in architecture.items() if key != "encoder"} == {
        "top_layers": 2, "layer_norms": ["layer"], "target_norms": [], "loss_beta": 4.0, "loss_scale": 1.0,
        "ema_decay": [0.9, 0.99, 10], "ema_layers_only": True, "ema_timing": "fairseq", "mask_id": 64,
        "head_layers": 2, "teacher_input": "fairseq",
    }  # fmt: skip


@pytest.mark.parametrize(("file", "key", "prefix"), [(AUDIO, "_ema", ""), (TEXT, "encoder._ema", "")])
def test_the_teachers_tensors(file, key, prefix):
    """Each of them, and none is the student's."""
    theirs = contents_of(file)["model"][key]
    model, _ = load_pretrained(FOLDER / file)
    student = model.encoder.transformer if file == AUDIO else model.encoder
    teacher = model.teacher.module.state_dict()
    assert sum(value.numel() for value in teacher.values()) == sum(
        value.numel() for name, value in theirs.items() if name != "version"
    )
    assert torch.equal(teacher["layers.1.fc2.weight"], theirs["layers.1.fc2.weight"])
    parts = [theirs[f"layers.2.self_attn.{part}_proj.bias"] for part in "qkv"]
    assert torch.equal(teacher["layers.2.qkv.bias"], torch.cat(parts))
    different = [name for name, value in student.state_dict().items() if not torch.equal(value, teacher[name])]
    copied = ("positional.",) if file == AUDIO else ("token_embedding", "position_embedding", "embedding_norm")
    assert different == [name for name in teacher if not name.startswith(copied)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"average_top_k_layers": 3}, {"top_layers": 3}),
        ({"average_top_k_layers": 8}, {"top_layers": 3}),  # of the three that there are
        ({"layer_norm_target_layer": True}, {"layer_norms": ["instance", "layer"]}),
        ({"layer_norm_targets": True, "instance_norm_targets": True}, {"target_norms": ["layer", "instance"]}),
        ({"instance_norm_target_layer": False}, {"layer_norms": []}),
        ({"loss_beta": 0.25, "loss_scale": 2}, {"loss_beta": 0.25, "loss_scale": 2.0}),
        ({"ema_layers_only": False}, {"ema_layers_only": False}),
        ({"ema_transformer_only": False}, {}),  # layers_only switches it on
        ({"ema_anneal_end_step": None}, {"ema_decay": [0.9, 0.99, 400000]}),
        ({"ema_end_decay": 0.9, "ema_anneal_end_step": 0}, {"ema_decay": [0.9, 0.9, 1]}),
        ({"ema_anneal_end_step": "${optimization.max_update}"}, {"ema_decay": [0.9, 0.99, 400000]}),
    ],
)
def test_settings_of_speech(changes, expected, tmp_path):
    before = objective(AUDIO, tmp_path)
    assert objective(AUDIO, tmp_path, **changes) == (before[0] | expected, ())


@pytest.mark.parametrize("scale", [None, 0, -1.0])
def test_the_scale_of_text(scale, tmp_path):
    """What is not positive is 1 / sqrt of the width there."""
    assert objective(TEXT, tmp_path, loss_scale=scale)[0]["loss_scale"] is None
    assert objective(TEXT, tmp_path, loss_scale=0.5)[0]["loss_scale"] == 0.5
    assert objective(TEXT, tmp_path, ema_transformer_layers_only=False)[0]["ema_layers_only"] is False
    notes = objective(TEXT, tmp_path, instance_norm_targets=True)[1]
    assert notes == ("instance norms of text look at real tokens alone here, and at the padding too in fairseq",)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (AUDIO, {"batch_norm_target_layer": True}, "the model was built with batch_norm_target_layer = True"),
        (AUDIO, {"group_norm_target_layer": True}, "the model was built with group_norm_target_layer = True"),
        (TEXT, {"batch_norm_target_layer": True}, "the model was built with batch_norm_target_layer = True"),
        (
            AUDIO,
            {"ema_transformer_only": False, "ema_layers_only": False},
            "the model was built with ema_transformer_only = False",
        ),
        (AUDIO, {"loss_scale": 0.0}, "in the settings loss_scale is 0.0, expected null (1 / sqrt of the width) or a "),
        (AUDIO, {"ema_end_decay": 0.5}, "in the settings ema_decay is (0.9, 0.5, 10), expected (start, end, steps) "),
        (TEXT, {"head_layers": 3}, "the model was built with head_layers = 3"),
        (TEXT, {"ema_anneal_end_step": None}, "the settings do not say ema_anneal_end_step"),
    ],
)
def test_what_cannot_be_represented_leaves_the_encoder(file, changes, words, tmp_path):
    settings, notes = objective(file, tmp_path, **changes)
    assert settings is None and len(notes) == 1
    assert notes[0].startswith(words)
    assert notes[0].endswith(", which the models here cannot represent: this is the encoder alone")
    model, info = load_pretrained(tmp_path / "x.pt")
    assert info.kind == ("wav2vec2_encoder" if file == AUDIO else "text_encoder")
    assert equal(model.state_dict(), load_pretrained(FOLDER / file)[0].encoder.state_dict())


@pytest.mark.parametrize(
    ("file", "gone", "words"),
    [
        (AUDIO, ("_ema",), "no teacher (_ema)"),
        (AUDIO, ("final_proj.",), "no head"),
        (AUDIO, ("_ema", "final_proj."), "no teacher (_ema) and no head"),
        (TEXT, ("encoder._ema",), "no teacher (_ema)"),
        (TEXT, ("encoder._ema", "encoder.regression_head."), "no teacher (_ema) and no head"),
    ],
)
def test_a_file_without_teacher_or_head_is_the_encoder(file, gone, words, tmp_path):
    contents = plain(file)
    contents["model"] = {name: value for name, value in contents["model"].items() if not name.startswith(gone)}
    model, info = load_pretrained(saved(contents, tmp_path))
    assert info.notes == (f"there is {words} in the file: this is the encoder alone",)
    assert equal(model.state_dict(), load_pretrained(FOLDER / file)[0].encoder.state_dict())
    left = {name for name in info.unused if "_ema" in name or "final_proj" in name or "regression_head" in name}
    assert bool(left) == (len(gone) == 1)


def test_a_teacher_that_lacks_a_tensor_is_told(tmp_path):
    contents = plain(AUDIO)
    contents["model"]["_ema"] = {k: v for k, v in contents["model"]["_ema"].items() if k != "layers.1.fc1.bias"}
    with pytest.raises(CheckpointError, match="1 of the model are missing and 0 of the file unexpected") as caught:
        load_pretrained(saved(contents, tmp_path))
    assert "teacher.module.layers.1.fc1.bias" in str(caught.value)
    # fine-tuning does not need it
    assert equal(load_encoder(tmp_path / "x.pt").state_dict(), load_encoder(FOLDER / AUDIO).state_dict())


OURS = {
    "audio": ("data2vec_audio", audio),
    "audio, other choices": (
        "data2vec_audio",
        lambda: audio(
            encoder={"norm_over_padding": True, "min_masks": 3, "dim": 16, "always_project": True},
            ema_timing="fairseq", layer_norms=["instance", "layer"], target_norms=["layer", "instance"],
            loss_beta=0.5, loss_scale=3.0, ema_layers_only=False, ema_decay=[0.5, 0.75, 4],
        ),
    ),
    "text": ("data2vec_text", text),
    "text, other choices": (
        "data2vec_text",
        lambda: text(head_layers=1, loss_scale=None, teacher_input="fairseq", ema_timing="fairseq", layer_norms=[],
                     target_norms=["layer"], ema_layers_only=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_our_own_there_and_back(case, tmp_path):
    kind, make = OURS[case]
    model = make()
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter))
    rate = 0 if kind == "data2vec_text" else 8000
    ours = converted_of(kind, model, rate=rate, normalize=rate > 0)
    write_fairseq(ours, tmp_path / "x.pt")
    again = read_pretrained(tmp_path / "x.pt")
    assert again.config == ours.config and equal(again.tensors, ours.tensors)
    assert not again.missing and not again.unexpected and not again.info.notes
    written = torch.load(tmp_path / "x.pt", weights_only=True)
    nested = [name for name, value in written["model"].items() if isinstance(value, dict)]
    assert nested == ["_ema" if kind == "data2vec_audio" else "encoder._ema"]
    # fairseq's own names are there whatever the choices of ours
    theirs = contents_of(f"{kind}/checkpoint.pt")["cfg"]["model"]
    assert written["cfg"]["model"]["_name"] == kind and written["cfg"]["model"].keys() - theirs.keys() == set()


def test_what_fairseq_cannot_hold(tmp_path):
    def words(kind, model):
        with pytest.raises(CheckpointError) as caught:
            write_fairseq(converted_of(kind, model, rate=0), tmp_path / "x.pt")
        return str(caught.value).replace(str(tmp_path / "x.pt"), "FILE")

    assert words("data2vec_text", text(mask_id=4)) == (
        "FILE: the model's mask_id is 4, in fairseq it is always the last of the vocabulary, 10."
    )
    assert words("data2vec_audio", audio(layer_norms=["layer", "instance"])) == (
        "FILE: the model's layer_norms are ['layer', 'instance'], but fairseq takes each of instance, layer once at "
        "most, in this order."
    )
    assert words("data2vec_audio", audio(encoder={"dim": 16})) == (
        "FILE: the model does not project features that have the transformer's width already (always_project), as "
        "fairseq's data2vec does; build it with always_project: True."
    )


def test_fine_tuning_takes_the_students_encoder(tmp_path):
    model, _ = load_pretrained(FOLDER / AUDIO)
    own = load_encoder(FOLDER / AUDIO, dropout=0.3)
    assert equal(own.state_dict(), model.encoder.state_dict()) and own.config["dropout"] == 0.3
    with pytest.raises(CheckpointError, match="this is a model of text, of kind 'data2vec_text'; give one of speech"):
        load_encoder(FOLDER / TEXT)
    fresh = TextEncoder(**read_pretrained(FOLDER / TEXT).config.architecture["encoder"])
    load_tensors(fresh, read_pretrained(FOLDER / TEXT).part("encoder"), source="here")
    assert equal(fresh.state_dict(), load_pretrained(FOLDER / TEXT)[0].encoder.state_dict())


def test_hugging_face_gets_the_encoder_and_the_rest_is_told(tmp_path, capsys):
    """The recorded model, whose convolutions are as wide as its transformer, too."""
    assert command(["convert", str(FOLDER / AUDIO), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    told = "left out: the teacher and the head of data2vec (50 tensors), for transformers has its encoder alone\n"
    assert told in capsys.readouterr().out
    theirs, report = transformers.Data2VecAudioModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_encoder(FOLDER / AUDIO).eval()
    waveforms, _ = batch(4000, 4000)
    with torch.no_grad():
        expected = theirs.eval()(waveforms).last_hidden_state
        torch.testing.assert_close(ours(waveforms).features, expected, rtol=0, atol=1e-4)
    again = read_pretrained(tmp_path / "hf")
    before = encoder_alone(read_pretrained(FOLDER / AUDIO))
    assert len(before.info.unused) == 50
    assert {name.split(".")[0] for name in before.info.unused} == {"teacher", "prediction"}
    assert (again.config.kind, again.config.architecture) == ("wav2vec2_encoder", before.config.architecture)
    assert equal(again.tensors, before.tensors)


def test_hugging_face_gets_the_encoder_of_text(tmp_path):
    read = read_pretrained(FOLDER / TEXT)
    notes = write_pretrained(read, tmp_path / "hf", to="huggingface")
    left = len(read.tensors) - len(encoder_alone(read).tensors)
    told = f"left out: the teacher and the head of data2vec ({left} tensors), for transformers has its encoder alone"
    assert notes == (told,)
    theirs = transformers.Data2VecTextModel.from_pretrained(tmp_path / "hf").eval()
    ours = load_pretrained(FOLDER / TEXT)[0].encoder
    tokens = torch.tensor([[0, 5, 6, 64, 2], [0, 7, 2, 1, 1]])
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=(tokens != 1).long()).last_hidden_state
        real = tokens != 1
        torch.testing.assert_close(ours(tokens).features[real], expected[real], rtol=0, atol=1e-4)
    # other forms lose nothing, and say so
    assert write_pretrained(read, tmp_path / "own", to="toolkit") == ()
    assert equal(read_pretrained(tmp_path / "own").tensors, read.tensors)


def test_a_token_type_of_student_and_teacher_goes_into_their_positions(tmp_path):
    torch.manual_seed(5)
    sizes = {"vocab_size": 11, "dim": 16, "num_layers": 2, "ffn_dim": 32, "num_heads": 2, "max_positions": 9}
    inner = TextEncoder(**sizes, token_types=1)
    torch.nn.init.normal_(inner.token_type_embedding.weight)
    ours = Data2VecText(inner, mask_id=10, top_layers=2).eval()
    write_fairseq(converted_of("data2vec_text", ours, rate=0), tmp_path / "x.pt")
    again, _ = load_pretrained(tmp_path / "x.pt")
    tokens = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])
    hidden = torch.tensor([[0, 10, 6, 2], [0, 10, 2, 1]])
    assert again.encoder.token_type_embedding is None
    torch.testing.assert_close(again.eval()(hidden, tokens).loss_sum, ours(hidden, tokens).loss_sum)
