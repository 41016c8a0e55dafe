"""fairseq's checkpoints, of all generations and spellings, to the toolkit's models and back."""

import argparse
import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.models.tiny import encoder, pretraining
from toolkit.data.tokens import LetterTokenizer
from toolkit.errors import CheckpointError
from toolkit.models.convert import load_encoder, load_pretrained, read_pretrained
from toolkit.models.convert.common import Converted, PretrainedInfo
from toolkit.models.convert.fairseq import write_fairseq
from toolkit.models.convert.fairseq_config import BASE_CONV_LAYERS, conv_layers
from toolkit.models.convert.fairseq_settings import plain
from toolkit.models.convert.unpickle import read_pickle
from toolkit.models.ctc import CTCModel
from toolkit.models.model_files import TEXT_KINDS, ModelConfig
from toolkit.models.text_encoder import TextEncoder
from toolkit.nn.feature_extractor import BASE_CONV_LAYERS as OUR_BASE_CONV_LAYERS

FOLDER = Path(__file__).parents[3] / "fixtures" / "fairseq_models"
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.glob("*/*.pt"))
PREFIX = "w2v_encoder.w2v_model."
KINDS = {
    "data2vec_audio/checkpoint.pt": ("data2vec_audio", "fairseq, cfg", True),
    "data2vec_text/checkpoint.pt": ("data2vec_text", "fairseq, cfg", False),
    "w2v2_ctc_from_data2vec/checkpoint.pt": ("ctc", "fairseq, cfg", True),
    "w2v2_ctc_from_groupnorm/checkpoint.pt": ("ctc", "fairseq, cfg", False),
    "w2v2_ctc_from_groupnorm/checkpoint_args.pt": ("ctc", "fairseq, args", False),
    "w2v2_pretrain_groupnorm/checkpoint.pt": ("wav2vec2_pretraining", "fairseq, args", False),
    "w2v2_pretrain_layernorm/checkpoint.pt": ("wav2vec2_pretraining", "fairseq, cfg", True),
}


def contents_of(file):
    """A fixture's contents, its omegaconf or Namespace settings as they are, its tensors our own to change."""
    contents = read_pickle(FOLDER / file)
    return contents | {"model": dict(contents["model"])}


def plain_contents(file="w2v2_ctc_from_groupnorm/checkpoint.pt"):
    """A fixture's contents as plain dicts, which may be changed and saved again."""
    contents = contents_of(file)
    return contents | {"cfg": json.loads(json.dumps(contents["cfg"]))}


def pretraining_contents():
    """A pretraining checkpoint as plain dicts."""
    contents = contents_of("w2v2_pretrain_groupnorm/checkpoint.pt")
    args = vars(contents["args"])
    model = {"_name": "wav2vec2", **args}
    cfg = {"model": model, "task": {**args, "_name": "audio_pretraining"}, "criterion": {**args, "_name": "wav2vec"}}
    return contents | {"args": None, "cfg": json.loads(json.dumps(cfg))}


def saved(contents, tmp_path, zipped=True):
    torch.save(contents, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    return tmp_path / "x.pt"


def refused(path):
    """The whole sentence, with FILE for the path."""
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(path)
    return str(caught.value).replace(str(path), "FILE")


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def converted_of(kind, model, *, rate=16000, normalize=False, tokenizer=None):
    config = ModelConfig(kind, model.config, rate, normalize, tokenizer.config if tokenizer else None, {})
    info = PretrainedInfo(kind, "toolkit", rate, normalize, labels=tokenizer.labels if tokenizer else None)
    return Converted(config, dict(model.state_dict()), info, tokenizer=tokenizer)


def test_all_fixtures_are_here():
    assert FILES == sorted(KINDS)


@pytest.mark.parametrize("file", FILES)
def test_what_a_file_is(file):
    model, info = load_pretrained(FOLDER / file)
    kind, source, normalize = KINDS[file]
    assert (info.kind, info.source, info.normalize, info.fresh, info.notes) == (kind, source, normalize, (), ())
    assert info.sample_rate == (0 if kind in TEXT_KINDS else 16000)
    converted = read_pretrained(FOLDER / file)
    assert converted.missing == converted.unexpected == ()
    # the settings are complete: nothing is left to the toolkit's own defaults
    assert model.config == converted.config.architecture
    assert not model.training
    if kind == "ctc":
        symbols = json.loads((FOLDER / file).with_name("meta.json").read_text())["symbols"]
        assert list(info.labels) == symbols and converted.tokenizer.labels == tuple(symbols)
        assert converted.config.tokens == converted.tokenizer.config


def test_what_is_left_out_is_named():
    assert read_pretrained(FOLDER / "data2vec_audio/checkpoint.pt").info.unused == ()
    text = read_pretrained(FOLDER / "data2vec_text/checkpoint.pt").info.unused
    assert text == ("encoder._ema.version", "encoder.sentence_encoder.version")


def test_the_generations_give_the_same_model():
    ours, theirs = (read_pretrained(FOLDER / "w2v2_ctc_from_groupnorm" / f"checkpoint{x}.pt") for x in ("", "_args"))
    assert ours.config == theirs.config and equal(ours.tensors, theirs.tensors)


def omegaconf(monkeypatch):
    """Classes of omegaconf's names, there only while a file is written."""
    made = {}
    for module, name in (("dictconfig", "DictConfig"), ("listconfig", "ListConfig"), ("nodes", "AnyNode"),
                         ("nodes", "EnumNode"), ("base", "ContainerMetadata")):  # fmt: skip
        full = f"omegaconf.{module}"
        for part in ("omegaconf", full):
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        made[name] = type(name, (), {"__module__": full})
        setattr(sys.modules[full], name, made[name])
    return made


def as_omegaconf(value, classes, parent=None):
    """Plain settings as omegaconf pickles them: a node for each value, each with its parent."""
    kind = {dict: "DictConfig", list: "ListConfig"}.get(type(value), "AnyNode")
    made = classes[kind]()
    metadata = classes["ContainerMetadata"]()
    metadata.object_type = type(value) if kind != "AnyNode" else None
    made._metadata, made._parent = metadata, parent
    if kind == "DictConfig":
        made._content = {key: as_omegaconf(item, classes, made) for key, item in value.items()}
    elif kind == "ListConfig":
        made._content = [as_omegaconf(item, classes, made) for item in value]
    else:
        made._val = value
    return made


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_fine_tuned_model_with_omegaconfs_settings(tmp_path, monkeypatch, zipped):
    """Nested settings as a DictConfig in a DictConfig, with a reference from one group to another."""
    contents = plain_contents()
    expected = read_pretrained(FOLDER / "w2v2_ctc_from_groupnorm" / "checkpoint.pt")
    contents["cfg"]["model"]["normalize"] = "${task.normalize}"
    contents["cfg"]["model"]["w2v_args"]["task"]["normalize"] = "${task.normalize}"
    contents["cfg"] = as_omegaconf(contents["cfg"], omegaconf(monkeypatch))
    path = saved(contents, tmp_path, zipped)
    read = read_pretrained(path)
    assert read.config == replace(expected.config, tokens=None) and equal(read.tensors, expected.tensors)
    assert read.info.notes == (
        "no dictionary (dict.ltr.txt) lies beside the file: the meaning of the outputs is not known",
    )


@pytest.mark.parametrize("outer", ["plain", "namespace"])
@pytest.mark.parametrize("inner", ["plain", "namespace", "omegaconf"])
def test_nested_settings_of_any_form(tmp_path, monkeypatch, outer, inner):
    file = "checkpoint.pt" if outer == "plain" else "checkpoint_args.pt"
    contents = contents_of(f"w2v2_ctc_from_groupnorm/{file}")
    group = contents["cfg"]["model"] if outer == "plain" else vars(contents["args"])
    nested = plain_contents()["cfg"]["model"]["w2v_args"]
    if inner == "namespace":
        nested = vars(contents_of("w2v2_ctc_from_groupnorm/checkpoint_args.pt")["args"])["w2v_args"]
    group["w2v_args"] = as_omegaconf(nested, omegaconf(monkeypatch)) if inner == "omegaconf" else nested
    expected = read_pretrained(FOLDER / "w2v2_ctc_from_groupnorm" / "checkpoint.pt")
    assert read_pretrained(saved(contents, tmp_path)).config.architecture == expected.config.architecture


def test_the_fine_tunings_settings_win(tmp_path):
    contents = plain_contents()
    changed = {
        "dropout": 0.01, "attention_dropout": 0.02, "activation_dropout": 0.03, "dropout_input": 0.04,
        "final_dropout": 0.05, "layerdrop": 0.06, "mask_prob": 0.5, "mask_length": 4, "mask_channel_prob": 0.25,
        "mask_channel_length": 6, "feature_grad_mult": 0.5, "freeze_finetune_updates": 7,
    }  # fmt: skip
    contents["cfg"]["model"] |= changed
    architecture = read_pretrained(saved(contents, tmp_path)).config.architecture
    own = architecture | architecture["encoder"]
    for name, value in changed.items():
        assert own[{"freeze_finetune_updates": "freeze_updates"}.get(name, name)] == value
    contents["cfg"]["model"]["apply_mask"] = False
    encoder = read_pretrained(saved(contents, tmp_path)).config.architecture["encoder"]
    assert encoder["mask_prob"] == encoder["mask_channel_prob"] == 0


def test_an_old_file_has_fairseqs_defaults(tmp_path):
    """Settings that came later are not in older files; numbers may be text in them."""
    contents = contents_of("w2v2_pretrain_groupnorm/checkpoint.pt")
    expected = read_pretrained(FOLDER / "w2v2_pretrain_groupnorm/checkpoint.pt").config
    args = vars(contents["args"])
    for name in ("activation_fn", "quantize_input", "conv_bias", "mask_channel_prob", "mask_channel_length",
                 "sample_rate", "normalize", "cross_sample_negatives", "logit_temp", "latent_dim"):  # fmt: skip
        del args[name]
    contents["args"] = argparse.Namespace(**args | {"loss_weights": "[0.1, 10]", "encoder_layers": "2"}, cfg=None)
    assert read_pretrained(saved(contents | {"cfg": None}, tmp_path)).config == expected


def test_spellings_of_the_positional_convolution(tmp_path):
    contents = plain_contents()
    expected = read_pretrained(FOLDER / "w2v2_ctc_from_groupnorm" / "checkpoint.pt")
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    for old, new in names.items():
        name = f"{PREFIX}encoder.pos_conv.0."
        contents["model"][name + new] = contents["model"].pop(name + old)
    read = read_pretrained(saved(contents, tmp_path))
    assert equal(read.tensors, expected.tensors) and not read.missing and not read.unexpected


def test_heads_that_were_left_in_are_named(tmp_path):
    contents = plain_contents()
    extra = {f"{PREFIX}{name}": torch.ones(2) for name in ("quantizer.vars", "project_q.bias", "final_proj.weight")}
    contents["model"] |= extra | {f"{PREFIX}_ema": {"layers.0.fc1.bias": torch.ones(1)}}
    _, info = load_pretrained(saved(contents, tmp_path))
    assert set(info.unused) == {*extra, f"{PREFIX}_ema.layers.0.fc1.bias"}


def test_half_precision_is_widened(tmp_path):
    contents = pretraining_contents()
    contents["model"] = {name: value.half() for name, value in contents["model"].items()}
    read = read_pretrained(saved(contents, tmp_path))
    assert {value.dtype for value in read.tensors.values()} == {torch.float32}
    assert read.info.notes == (f"{len(contents['model'])} tensors were stored as float16 and are widened to float32",)


def test_tensors_that_lack_or_are_too_many_are_told(tmp_path):
    contents = plain_contents()
    del contents["model"][PREFIX + "encoder.layers.1.self_attn.k_proj.weight"]
    contents["model"]["w2v_encoder.adapter.weight"] = torch.ones(1)
    path = saved(contents, tmp_path)
    read = read_pretrained(path)
    assert read.missing == ("encoder.transformer.layers.1.qkv.weight",)
    assert "w2v_encoder.adapter.weight" in read.unexpected
    assert refused(path).startswith("FILE: the tensors do not match, 1 of the model are missing and 3 of")


def test_an_encoder_without_its_pretrainings_heads(tmp_path):
    contents = pretraining_contents()
    contents["model"] = {
        name: value for name, value in contents["model"].items()
        if not name.startswith(("quantizer.", "project_q.", "final_proj."))
    }  # fmt: skip
    model, info = load_pretrained(saved(contents, tmp_path))
    assert info.kind == "wav2vec2_encoder" and "this is the encoder alone" in info.notes[0]
    whole = load_encoder(FOLDER / "w2v2_pretrain_groupnorm/checkpoint.pt")
    assert equal(model.state_dict(), whole.state_dict())


@pytest.mark.parametrize("file", [file for file, (kind, _, _) in KINDS.items() if kind not in TEXT_KINDS])
def test_the_encoder_of_any_file(file):
    """Ready to be fine-tuned with other masks and dropouts."""
    own = load_encoder(FOLDER / file, mask_prob=0.25, dropout=0.3)
    assert own.config["mask_prob"] == 0.25 and own.config["dropout"] == 0.3
    model, info = load_pretrained(FOLDER / file)
    theirs = model if info.kind == "wav2vec2_encoder" else model.encoder
    assert equal(own.state_dict(), theirs.state_dict())


REFUSED = {
    "pretraining": {
        "layer_type": "conformer",
        "activation_fn": "relu",
        "quantize_input": True,
        "quantize_targets": False,
        "target_glu": True,
        "codebook_negatives": 3,
        "negatives_from_everywhere": True,
        "quantizer_depth": 2,
        "crop_seq_to_multiple": 4,
        "conv_pos_batch_norm": True,
        "extractor_mode": "batch_norm",
    },
    "ctc": {"blank_weight": 0.5, "layer_type": "conformer"},
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in REFUSED.items() for key in keys])
def test_what_cannot_be_represented_is_named(tmp_path, kind, key):
    contents = pretraining_contents() if kind == "pretraining" else plain_contents()
    value = REFUSED[kind][key]
    contents["cfg"]["model"][key] = value
    words = refused(saved(contents, tmp_path))
    assert words.startswith(
        f"FILE: the model was built with {key} = {value!r}, which the models here cannot represent; known "
    )


@pytest.mark.parametrize("name", ["hubert", "hubert_ctc", "wav2vec_seq2seq", "wav2vec", "roberta"])
def test_other_architectures_are_named(tmp_path, name):
    contents = plain_contents()
    contents["cfg"]["model"]["_name"] = name
    assert refused(saved(contents, tmp_path)) == (
        f"FILE: a model of fairseq's architecture {name!r} cannot be used here; known are wav2vec2, wav2vec_ctc, "
        "data2vec_audio and data2vec_text."
    )


def test_data2vec_2_is_refused(tmp_path):
    words = "FILE: this is a data2vec 2.0 model, which the toolkit does not have; data2vec 1 it has."
    contents = pretraining_contents()
    contents["cfg"]["model"]["_name"] = "data2vec_multi"
    assert refused(saved(contents, tmp_path)) == words
    contents = plain_contents()
    contents["model"] = {f"{PREFIX}modality_encoders.AUDIO.x": torch.ones(1)}
    assert refused(saved(contents, tmp_path)) == words


def test_settings_of_the_masks_that_are_left_out_are_told(tmp_path):
    contents = pretraining_contents()
    contents["cfg"]["model"]["mask_selection"] = "uniform"
    contents["cfg"]["model"]["some_private_option"] = {"a": [1]}
    _, info = load_pretrained(saved(contents, tmp_path))
    assert info.notes == (
        "mask_selection = 'uniform' is left out; it changes nothing but the masks of further training",
    )


def test_nested_settings_that_are_not_there(tmp_path):
    contents = plain_contents()
    contents["cfg"]["model"]["w2v_args"] = None
    assert refused(saved(contents, tmp_path)) == (
        "FILE: the settings of the pretrained model (w2v_args) are not in the file, only its path 'pretrained.pt'; "
        "load it in fairseq once and save it again, which stores them."
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cfg": None}, "FILE: the checkpoint holds no settings (args or cfg); without them nothing is known."),
        ({"cfg": [1]}, "FILE: the checkpoint holds no settings (args or cfg); without them nothing is known."),
        ({"model": [1]}, "FILE: 'model' holds no tensors by name; the file is damaged."),
        ({"model": {"a": 1}}, "FILE: a is no tensor; the file is damaged or of another program."),
        ({"model": {}}, "FILE: the output layer w2v_encoder.proj.weight is missing; the file is no CTC model."),
    ],
)
def test_files_that_make_no_sense(tmp_path, changes, words):
    assert refused(saved(plain_contents() | changes, tmp_path)) == words


def test_settings_that_contain_themselves(tmp_path):
    contents = plain_contents()
    contents["cfg"]["model"]["w2v_args"] = contents["cfg"]
    words = refused(saved(contents, tmp_path))
    assert words == "FILE: the settings contain themselves; the file is damaged."


def test_settings_that_unfold_without_end(tmp_path):
    """Sixty levels of a list that holds the level below twice: 2^60 numbers on paper, a few bytes in the file."""
    contents = plain_contents()
    level = [1]
    for _ in range(60):
        level = [level, level]
    contents["cfg"]["common"] = level
    assert read_pretrained(saved(contents, tmp_path)).config.kind == "ctc"
    for _ in range(10000):
        level = [level]
    with pytest.raises(CheckpointError, match=r"^the settings are nested too deeply; the file is damaged\.$"):
        plain(level)


def test_settings_that_make_no_model(tmp_path):
    contents = pretraining_contents()
    contents["cfg"]["model"]["encoder_attention_heads"] = 5
    assert refused(saved(contents, tmp_path)) == (
        "FILE: its settings make no model of kind 'wav2vec2_pretraining' (the transformer's dim 48 is no multiple of "
        "its num_heads 5); was the folder written by another version?"
    )
    contents["cfg"]["model"] |= {"encoder_attention_heads": 4, "encoder_ffn_embed_dim": 95}
    assert refused(saved(contents, tmp_path)) == (
        "FILE: the tensor for encoder.transformer.layers.0.fc1.weight has the shape (96, 48), but the settings beside "
        "it make (95, 48); copy the file and its settings from the same model again."
    )


def test_ones_and_zeros_for_yes_and_no(tmp_path):
    contents = pretraining_contents()
    contents["cfg"]["task"]["normalize"], contents["cfg"]["model"]["layer_norm_first"] = 1, 0
    assert read_pretrained(saved(contents, tmp_path)).info.normalize is True


@pytest.mark.parametrize("value", ["12 layers", [1], True, 1.5])
def test_settings_of_wrong_types(tmp_path, value):
    contents = pretraining_contents()
    contents["cfg"]["model"]["encoder_layers"] = value
    assert refused(saved(contents, tmp_path)) == f"FILE: the setting encoder_layers is {value!r}, expected int."


def test_shapes_that_do_not_fit(tmp_path):
    contents = plain_contents()
    contents["model"][PREFIX + "encoder.layers.0.self_attn.k_proj.weight"] = torch.ones(2, 3, 4)
    assert refused(saved(contents, tmp_path)).startswith("FILE: the tensors do not fit together (these must")


LAYERS = {
    "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]": OUR_BASE_CONV_LAYERS,
    "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] * 2": OUR_BASE_CONV_LAYERS,
    " [(8,2,2)]*2 ": [(8, 2, 2)] * 2,
    "([(8,2,2)] + [(4,3,1)]) * 2": [(8, 2, 2), (4, 3, 1)] * 2,
    "[(8, 2, 2), [4, 3, 1]]": [(8, 2, 2), (4, 3, 1)],
}


@pytest.mark.parametrize("text", LAYERS)
def test_convolutions_from_text(text):
    assert conv_layers(text, Path("x")) == [list(layer) for layer in LAYERS[text]]
    assert conv_layers(LAYERS[text], Path("x")) == [list(layer) for layer in LAYERS[text]]


def test_the_default_convolutions():
    assert conv_layers(BASE_CONV_LAYERS, Path("x")) == [list(layer) for layer in OUR_BASE_CONV_LAYERS]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch MARKER')", "[(8, 2, 2)] * 10**9", "[(8, 2, 2)] * 101", "[(1,1,1)]*99*99*99*99",
        "[(8, 2)]", "[(8, 2, 0)]", "[(8, -2, 1)]", "[('8', 2, 1)]", "[(8.0, 2, 1)]", "[(True, 2, 1)]", "[]", "", "8",
        "[x for x in y]", "[(8, 2, 2)] - []", "[(8, 2, 2)", "(" * 5000, "[(8,2,2)]" + "+[(8,2,2)]" * 5000, 7, [[1, 2]],
        "open('MARKER', 'w')", "[(len('abc'), 2, 2)]", "[(8, 2, 2)] * (1 + 1)",
    ],
)  # fmt: skip
def test_other_texts_are_refused_and_not_run(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    contents = pretraining_contents()
    contents["cfg"]["model"]["conv_feature_layers"] = text
    words = refused(saved(contents, tmp_path))
    if text == "":  # as if it were not there, and then the tensors do not fit
        assert "shape" in words
    else:
        assert words.startswith("FILE: conv_feature_layers is ") and len(words) < 250
        assert words.endswith("of each convolution, as in '[(512, 10, 5)] + [(512, 3, 2)] * 4'.")
    assert os.listdir(tmp_path) == ["x.pt"]


def test_dictionaries_beside_and_inside(tmp_path, monkeypatch):
    contents = plain_contents()
    symbols = [chr(65 + n) for n in range(27)] + ["|"]
    (tmp_path / "dict.ltr.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    labels = ("<s>", "<pad>", "</s>", "<unk>", *symbols)
    assert read_pretrained(saved(contents, tmp_path)).info.labels == labels
    # by the name in the settings before the usual one; a path in the settings leads nowhere
    (tmp_path / "dict.phn.txt").write_text("".join(f"{symbol} 1\n" for symbol in reversed(symbols)))
    contents["cfg"]["task"]["labels"] = "phn"
    assert read_pretrained(saved(contents, tmp_path)).info.labels == labels[:4] + labels[:3:-1]
    contents["cfg"]["task"]["labels"] = "../../x/phn"
    assert read_pretrained(saved(contents, tmp_path)).info.labels == labels
    # the checkpoint's own before any file
    dictionary = type("Dictionary", (), {"__module__": "fairseq.data.dictionary"})
    for part in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules["fairseq.data.dictionary"].Dictionary = dictionary
    made = dictionary()
    made.symbols, made.count = [*labels[:4], *(f"{n}x" for n in range(28))], [1] * 32
    contents["task_state"] = {"target_dictionary": made}
    assert read_pretrained(saved(contents, tmp_path)).info.labels == tuple(made.symbols)
    made.symbols = made.symbols[1:]
    assert refused(saved(contents, tmp_path)).startswith("FILE: the dictionary in it is not <s>, <pad>, </s>, <unk>")


def test_a_dictionary_of_another_size(tmp_path):
    (tmp_path / "dict.ltr.txt").write_text("A 1\n| 1\n")
    assert refused(saved(plain_contents(), tmp_path)) == (
        "FILE: the model has 32 outputs, but dict.ltr.txt holds 6 symbols, the four special ones included; put the "
        "dictionary that the model was trained with beside it."
    )


@pytest.mark.parametrize("file", FILES)
def test_there_and_back(tmp_path, file):
    """fairseq -> toolkit -> fairseq: every tensor bit for bit, a teacher's in their own dict, and none is gone."""
    source = contents_of(file)["model"]
    read = read_pretrained(FOLDER / file)
    path = tmp_path / "new" / "x.pt"
    write_fairseq(read, path)
    written = torch.load(path, weights_only=True)  # dicts, lists, numbers, strings and tensors alone
    assert written["model"].keys() == source.keys()
    nested = [name for name, value in source.items() if not isinstance(value, torch.Tensor)]
    assert nested == {"data2vec_audio": ["_ema"], "data2vec_text": ["encoder._ema"]}.get(file.split("/")[0], [])
    assert all(equal(written["model"].pop(name), source[name]) for name in nested)
    assert all(torch.equal(value, source[name]) for name, value in written["model"].items())
    again = read_pretrained(path)
    assert again.config == read.config and equal(again.tensors, read.tensors)
    assert again.info == replace(read.info, source="fairseq, cfg", unused=again.info.unused)
    assert set(os.listdir(path.parent)) == {"x.pt"} | ({"dict.ltr.txt"} if read.info.kind == "ctc" else set())


def test_what_fairseq_looks_for(tmp_path):
    write_fairseq(read_pretrained(FOLDER / "w2v2_ctc_from_groupnorm/checkpoint_args.pt"), tmp_path / "x.pt")
    written = torch.load(tmp_path / "x.pt", weights_only=True)
    theirs = contents_of("w2v2_ctc_from_groupnorm/checkpoint.pt")
    assert written.keys() == theirs.keys() and written["args"] is None
    assert written["optimizer_history"][-1].keys() == theirs["optimizer_history"][-1].keys()
    assert written["extra_state"]["train_iterator"].keys() <= theirs["extra_state"]["train_iterator"].keys() | {
        "version"
    }
    for group in ("model", "task", "criterion"):
        assert written["cfg"][group].keys() <= theirs["cfg"][group].keys()
    own_paths = {"w2v_path", "data", "w2v_args", "conv_feature_layers"}
    unused = {"final_dim", "latent_vars", "num_negatives"}  # the pretraining's, which are not known any more
    for own, other in ((written["cfg"], theirs["cfg"]), (w["cfg"]["model"]["w2v_args"] for w in (written, theirs))):
        for key in own["model"].keys() - own_paths - unused:
            assert own["model"][key] == other["model"][key], key
    inner = written["cfg"]["model"]["w2v_args"]
    assert inner["criterion"] is None and inner["lr_scheduler"] is None


OURS = {
    "wav2vec2_encoder": lambda: encoder(pre_norm=True, extractor_norm="layer"),
    "wav2vec2_encoder, data2vec": lambda: encoder(pos_depth=3, min_masks=1),
    "wav2vec2_encoder, equal widths": lambda: encoder(dim=16, min_masks=1, always_project=True),
    "wav2vec2_pretraining": lambda: pretraining({"pos_depth": 3, "gradient_checkpointing": True}, code_dim=8),
    "wav2vec2_pretraining, other masks": lambda: pretraining(
        {"min_masks": 0, "norm_over_padding": True, "dim": 16}, cross_sample_negatives=3
    ),
    "ctc": lambda: CTCModel(encoder(mask_channel_prob=0.2), 8, final_dropout=0.1, freeze_updates=5),
    "text_encoder": lambda: TextEncoder(vocab_size=9, dim=16, num_layers=1, ffn_dim=8, num_heads=2, max_positions=7),
}


@pytest.mark.parametrize("case", OURS)
def test_our_own_models_there_and_back(tmp_path, case):
    """Also what fairseq has no name for: how padding is taken, and the least number of masks."""
    kind = case.split(",")[0]
    tokenizer = LetterTokenizer(["A", "B", "C", "|"]) if kind == "ctc" else None
    rate = 0 if kind == "text_encoder" else 8000
    ours = converted_of(kind, OURS[case](), rate=rate, normalize=rate > 0, tokenizer=tokenizer)
    write_fairseq(ours, tmp_path / "x.pt")
    again = read_pretrained(tmp_path / "x.pt")
    assert again.config == ours.config and equal(again.tensors, ours.tensors)
    assert again.info.labels == ours.info.labels and not again.missing and not again.unexpected
    load_pretrained(tmp_path / "x.pt")


def test_a_token_type_goes_into_the_positions(tmp_path):
    """fairseq has no such vector, and no pooler; the sums stay the same."""
    sizes = {"vocab_size": 9, "dim": 16, "num_layers": 1, "ffn_dim": 8, "num_heads": 2, "max_positions": 7}
    text = TextEncoder(**sizes, token_types=2, pooler=True).eval()
    torch.nn.init.normal_(text.token_type_embedding.weight)
    write_fairseq(converted_of("text_encoder", text, rate=0), tmp_path / "x.pt")
    again, info = load_pretrained(tmp_path / "x.pt")
    assert (again.config["token_types"], again.config["pooler"]) == (0, False)
    assert not any("token_type" in name or "pooler" in name for name in info.unused)
    tokens = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]])
    torch.testing.assert_close(again.eval()(tokens).features, text(tokens).features)


def test_what_fairseq_cannot_hold(tmp_path):
    def words(converted):
        with pytest.raises(CheckpointError) as caught:
            write_fairseq(converted, tmp_path / "new" / "x.pt")
        assert not (tmp_path / "new").exists()
        return str(caught.value).replace(str(tmp_path / "new" / "x.pt"), "FILE")

    model = pretraining({"dim": 16, "always_project": True})
    assert words(converted_of("wav2vec2_pretraining", model)) == (
        "FILE: the model projects features that have the transformer's width already (always_project), which fairseq's "
        "wav2vec 2.0 cannot; its encoder alone can be written."
    )
    text = TextEncoder(vocab_size=9, dim=16, num_layers=1, ffn_dim=8, num_heads=2, max_positions=7, padding_id=0)
    assert words(converted_of("text_encoder", text, rate=0)) == (
        "FILE: the model's padding_id is 0, in fairseq it is always 1."
    )
    whole = converted_of("wav2vec2_encoder", encoder())
    del whole.tensors["feature_norm.bias"]
    assert words(whole) == (
        "FILE: 1 tensors of the model are missing (feature_norm.bias), and fairseq opens whole models only; give a "
        "whole file."
    )


def test_a_fresh_mask_vector_is_written_as_zeros(tmp_path):
    whole = converted_of("wav2vec2_encoder", encoder())
    del whole.tensors["mask_embedding"]
    write_fairseq(replace(whole, info=replace(whole.info, fresh=("mask_embedding",))), tmp_path / "x.pt")
    assert not torch.load(tmp_path / "x.pt", weights_only=True)["model"]["mask_emb"].any()


def test_a_dictionary_of_another_model_is_not_overwritten(tmp_path):
    (tmp_path / "dict.ltr.txt").write_text("Z 1\n| 1\n")
    model = CTCModel(encoder(), 6)
    with pytest.raises(CheckpointError, match=r"dict\.ltr\.txt of another model lies beside it; give an empty or new"):
        write_fairseq(converted_of("ctc", model, tokenizer=LetterTokenizer(["A", "|"])), tmp_path / "x.pt")
    assert os.listdir(tmp_path) == ["dict.ltr.txt"]
    write_fairseq(converted_of("ctc", model, tokenizer=LetterTokenizer({"Z": 7, "|": 2})), tmp_path / "x.pt")
    assert (tmp_path / "dict.ltr.txt").read_text() == "Z 1\n| 1\n"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_text("old")

    def full(contents, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*; look at the space left and try again"):
        write_fairseq(converted_of("wav2vec2_encoder", encoder()), path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.pt"]
