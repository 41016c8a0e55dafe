"""Hugging Face folders without transformers: names, settings, vocabularies, both ways, and damaged folders."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolkit.data.dictionary_tokens import DictionaryTokenizer
from toolkit.data.text_dictionary import TextDictionary
from toolkit.data.tokens import LetterTokenizer, SentencePieceTokenizer
from toolkit.errors import CheckpointError
from toolkit.models.convert.common import Converted, PretrainedInfo
from toolkit.models.convert.huggingface import read_huggingface, write_huggingface
from toolkit.models.convert.huggingface_tokens import read_vocabulary, rows_to_ours, rows_to_theirs
from toolkit.models.convert.load import build_converted, load_encoder, load_pretrained
from toolkit.models.convert.read import read_pretrained
from toolkit.models.ctc import CTCModel
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.models.model_files import ModelConfig, save_model_folder
from toolkit.models.text_encoder import TextEncoder
from toolkit.models.wav2vec2 import Wav2Vec2Pretraining

SIZES = {
    "conv_layers": [(16, 10, 5), (16, 3, 2), (16, 2, 2)],
    "dim": 24,
    "num_layers": 2,
    "ffn_dim": 48,
    "num_heads": 2,
    "pos_kernel": 8,
    "pos_groups": 2,
}
LARGE = {"extractor_norm": "layer", "conv_bias": True, "pre_norm": True}
DATA2VEC = {"extractor_norm": "layer", "pos_depth": 2, "pos_kernel": 10}


def encoder(**changes):
    torch.manual_seed(5)
    return Wav2Vec2Encoder(**SIZES | changes)


def models():
    """(name, kind, model, tokenizer)"""
    letters = LetterTokenizer({"|": 9, "A": 5, "B": 0}, case="upper")
    pretraining = {"final_dim": 12, "num_codes": 6, "num_negatives": 10}
    yield "encoder", "wav2vec2_encoder", encoder(), None
    yield "large encoder", "wav2vec2_encoder", encoder(**LARGE, mask_prob=0.0), None
    yield "data2vec encoder", "wav2vec2_encoder", encoder(**DATA2VEC), None
    yield "pretraining", "wav2vec2_pretraining", Wav2Vec2Pretraining(encoder(), **pretraining), None
    wide = Wav2Vec2Pretraining(encoder(**LARGE), code_dim=8, temperature=(2, 0.1, 0.999), **pretraining)
    yield "large pretraining", "wav2vec2_pretraining", wide, None
    yield "ctc", "ctc", CTCModel(encoder(), letters.vocab_size, final_dropout=0.3, freeze_updates=7), letters
    yield "data2vec ctc", "ctc", CTCModel(encoder(**DATA2VEC), 5), None
    text = TextEncoder(vocab_size=11, dim=16, num_layers=2, ffn_dim=32, num_heads=2, max_positions=9, layerdrop=0.1)
    yield "text", "text_encoder", text, None
    typed = TextEncoder(
        vocab_size=11, dim=16, num_layers=1, ffn_dim=32, num_heads=2, max_positions=9, token_types=2, pooler=True
    )
    torch.nn.init.normal_(typed.token_type_embedding.weight)
    yield "typed text", "text_encoder", typed, None


CASES = {name: rest for name, *rest in models()}


def saved(folder, kind, model, tokenizer, **changes):
    """A model folder of the toolkit's."""
    text = kind == "text_encoder"
    settings = {"sample_rate": 0 if text else 8000, "normalize": False, "extra": {"a": [1, None]}} | changes
    save_model_folder(folder, model, kind=kind, tokenizer=tokenizer, **settings)
    return read_pretrained(folder)


def assert_same_tensors(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("case", CASES)
def test_from_the_toolkit_and_back_nothing_changes(case, tmp_path):
    kind, model, tokenizer = CASES[case]
    start = saved(tmp_path / "model", kind, model, tokenizer)
    write_huggingface(start, tmp_path / "hf")
    back = read_pretrained(tmp_path / "hf")
    assert back.config == start.config
    assert back.info.labels == start.info.labels and back.info.source.startswith("Hugging Face")
    assert (back.missing, back.unexpected, back.info.fresh) == ((), (), ())
    assert_same_tensors(start.tensors, back.tensors)
    if tokenizer is not None:
        assert (back.tokenizer.labels, back.tokenizer.counts) == (tokenizer.labels, tokenizer.counts)
    same, info = load_pretrained(tmp_path / "hf")
    assert_same_tensors(model.state_dict(), same.state_dict())
    assert info.kind == kind


def test_tokens_of_text_stay_out_of_the_folder(tmp_path):
    kind, model, _ = CASES["text"]
    tokenizer = DictionaryTokenizer(TextDictionary([f"w{number}" for number in range(6)]), words=True)
    write_huggingface(saved(tmp_path / "model", kind, model, tokenizer), tmp_path / "hf")
    back = read_pretrained(tmp_path / "hf")
    assert back.config.tokens is None and back.tokenizer is None
    assert_same_tensors(model.state_dict(), back.tensors)


def hf_folder(tmp_path, case, *, config=None, **files):
    """A folder as transformers would write it: no word of the toolkit in it."""
    kind, model, tokenizer = CASES[case]
    write_huggingface(saved(tmp_path / "model", kind, model, tokenizer, normalize=True), tmp_path / "hf")
    folder = tmp_path / "hf"
    settings = json.loads((folder / "config.json").read_text())
    del settings["toolkit"]
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    return folder


def contents_of(folder):
    return {file.name: json.loads(file.read_text()) for file in folder.iterdir() if file.suffix == ".json"}, load_file(
        folder / "model.safetensors"
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("through_a_model_folder", [False, True])
def test_from_hugging_face_and_back_nothing_changes(case, through_a_model_folder, tmp_path):
    folder = hf_folder(tmp_path, case, config={"a_setting_of_later": [1, {"b": None}], "torch_dtype": "float32"})
    start = read_pretrained(folder)
    if through_a_model_folder:
        model = build_converted(start, folder)
        kind, tokenizer = start.config.kind, start.tokenizer
        rate, extra = start.config.sample_rate, start.config.extra
        start = saved(
            tmp_path / "ours", kind, model, tokenizer, sample_rate=rate, normalize=start.config.normalize, extra=extra
        )
    write_huggingface(start, tmp_path / "again")
    files, tensors = contents_of(folder)
    files_again, tensors_again = contents_of(tmp_path / "again")
    files["config.json"].pop("dtype", None)
    files_again["config.json"].pop("dtype", None)
    assert files_again == files
    assert_same_tensors(tensors, tensors_again)


def test_a_model_changed_since_takes_the_folders_other_settings_along(tmp_path):
    folder = hf_folder(tmp_path, "ctc", config={"a_setting_of_later": 7})
    start = read_pretrained(folder)
    start.config.architecture["encoder"]["layerdrop"] = 0.25
    write_huggingface(start, tmp_path / "again")
    config = contents_of(tmp_path / "again")[0]["config.json"]
    assert (config["layerdrop"], config["a_setting_of_later"]) == (0.25, 7)
    assert read_pretrained(tmp_path / "again").config.architecture["encoder"]["layerdrop"] == 0.25


def test_settings_changed_by_hand_count_more_than_the_toolkits_beside_them(tmp_path):
    kind, model, tokenizer = CASES["encoder"]
    write_huggingface(saved(tmp_path / "model", kind, model, tokenizer), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    for own in (config["toolkit"], config["toolkit"] | {"architecture": {"conv_layers": 3}}, []):
        path.write_text(json.dumps(config | {"hidden_dropout": 0.4, "toolkit": own}))
        back = read_pretrained(tmp_path / "hf")
        assert back.config.architecture["dropout"] == 0.4
        assert any("left out" in note for note in back.info.notes) == bool(own)


def test_settings_are_read_by_their_names(tmp_path):
    config = {
        "hidden_dropout": 0.11, "attention_dropout": 0.12, "activation_dropout": 0.13, "feat_proj_dropout": 0.14,
        "layerdrop": 0.15, "mask_time_prob": 0.65, "mask_time_length": 5, "mask_time_min_masks": 3,
        "mask_feature_prob": 0.2, "mask_feature_length": 6, "feat_quantizer_dropout": 0.16, "num_negatives": 9,
        "contrastive_logits_temperature": 0.2, "diversity_loss_weight": 0.3,
    }  # fmt: skip
    converted = read_pretrained(hf_folder(tmp_path, "pretraining", config=config))
    own = converted.config.architecture
    inner = own["encoder"]
    names = ("dropout", "attention_dropout", "activation_dropout", "dropout_input", "layerdrop")
    assert [inner[name] for name in names] == [0.11, 0.12, 0.13, 0.14, 0.15]
    assert [inner[name] for name in ("mask_prob", "mask_length", "min_masks")] == [0.65, 5, 3]
    assert [inner[name] for name in ("mask_channel_prob", "mask_channel_length")] == [0.2, 6]
    assert [own[name] for name in ("dropout_features", "num_negatives", "logit_temperature")] == [0.16, 9, 0.2]
    assert (own["diversity_weight"], own["penalty_weight"]) == (0.3, 0.0)
    assert inner["norm_over_padding"] and not inner["equal_mask_counts"] and inner["feature_grad_mult"] == 1.0
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "hf" / "config.json").read_text()) | {"apply_spec_augment": False})
    )
    inner = read_pretrained(tmp_path / "hf").config.architecture["encoder"]
    assert (inner["mask_prob"], inner["mask_channel_prob"]) == (0, 0)


def test_the_preprocessor_says_rate_and_normalization(tmp_path):
    folder = hf_folder(tmp_path, "encoder", preprocessor_config={"do_normalize": False, "sampling_rate": 11025})
    info = read_pretrained(folder).info
    assert (info.normalize, info.sample_rate) == (False, 11025)
    os.remove(folder / "preprocessor_config.json")
    info = read_pretrained(folder).info
    assert (info.normalize, info.sample_rate) == (True, 16000)
    assert any("preprocessor_config.json is missing" in note for note in info.notes)


def rewritten(folder, change):
    """The folder with its tensors changed."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.contiguous() for name, value in change(tensors).items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["sharded", "pickled", "sharded and pickled", "old names", "no prefix", "named"])
def test_weights_in_every_form(kind, tmp_path):
    folder = hf_folder(tmp_path, "ctc")
    expected = read_pretrained(folder).tensors
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    path = folder
    if kind == "old names":
        stem, new = "wav2vec2.encoder.pos_conv_embed.conv.", "parametrizations.weight.original"
        tensors = {name.replace(new + "0", "weight_g").replace(new + "1", "weight_v"): value
                   for name, value in tensors.items()}  # fmt: skip
        assert f"{stem}weight_g" in tensors
        save_file(tensors, folder / "model.safetensors")
    elif kind == "no prefix":
        save_file({name.removeprefix("wav2vec2."): value for name, value in tensors.items()},
                  folder / "model.safetensors")  # fmt: skip
    elif kind == "pickled":
        torch.save(tensors, folder / "pytorch_model.bin")
        path = folder / "pytorch_model.bin"
    elif kind == "named":
        save_file(tensors, folder / "other.safetensors")
        path = folder / "other.safetensors"
    else:
        pickled = "pickled" in kind
        stem, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
        write = torch.save if pickled else save_file
        names = sorted(tensors)
        places = {name: f"{stem}-0000{1 + i % 2}-of-00002.{end}" for i, name in enumerate(names)}
        for shard in set(places.values()):
            write({name: tensors[name] for name in names if places[name] == shard}, folder / shard)
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    back = read_pretrained(path)
    assert (back.missing, back.unexpected) == ((), ())
    assert_same_tensors(expected, back.tensors)


def test_a_mask_vector_may_be_absent_where_none_is_trained(tmp_path):
    def without(tensors):
        return {name: value for name, value in tensors.items() if "masked_spec_embed" not in name}

    encoder_folder = rewritten(hf_folder(tmp_path / "e", "ctc"), without)
    _, info = load_pretrained(encoder_folder)
    assert info.fresh == ("encoder.mask_embedding",)
    assert load_encoder(encoder_folder).dim == 24
    with pytest.raises(CheckpointError, match="mask_embedding"):
        load_pretrained(rewritten(hf_folder(tmp_path / "p", "pretraining"), without))


def test_no_mask_vector_is_written_where_transformers_has_none(tmp_path):
    config = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "apply_spec_augment": True}
    folder = hf_folder(tmp_path, "encoder", config=config)
    write_huggingface(read_pretrained(folder), tmp_path / "again")
    assert "masked_spec_embed" not in load_file(tmp_path / "again" / "model.safetensors")


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("Wav2Vec2ForSequenceClassification", "projector.weight"),
        ("Wav2Vec2ForAudioFrameClassification", "layer_weights"),
    ],
)
def test_other_heads_are_left_out_by_name(architecture, head, tmp_path):
    def headed(tensors):
        return {f"wav2vec2.{name}": value for name, value in tensors.items()} | {head: torch.zeros(3)}

    folder = rewritten(hf_folder(tmp_path, "encoder", config={"architectures": [architecture]}), headed)
    converted = read_pretrained(folder)
    assert (converted.info.kind, converted.info.unused, converted.unexpected) == ("wav2vec2_encoder", (head,), ())
    write_huggingface(converted, tmp_path / "again")
    assert contents_of(tmp_path / "again")[0]["config.json"]["architectures"] == ["Wav2Vec2Model"]


@pytest.mark.parametrize("case", ["encoder", "pretraining", "ctc", "text"])
def test_tensors_tell_the_head_where_config_json_does_not(case, tmp_path):
    folder = hf_folder(tmp_path, case, config={"architectures": None})
    assert read_pretrained(folder).info.kind == CASES[case][0]


REFUSED = [
    ({"hidden_act": "relu"}, 'hidden_act is "relu"'),
    ({"feat_extract_activation": "gelu_new"}, "feat_extract_activation"),
    ({"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12"),
    ({"add_adapter": True}, "add_adapter is true"),
    ({"adapter_attn_dim": 16}, "adapter_attn_dim is 16"),
    ({"position_embeddings_type": "relative"}, "position_embeddings_type"),
    ({"quantization_config": {"bits": 8}}, "quantization_config"),
    ({"feat_extract_norm": "batch"}, "batch"),
    ({"conv_kernel": [10, 3]}, "conv_dim, conv_kernel and conv_stride are of 3, 2, 3 entries"),
    ({"hidden_size": "24"}, 'hidden_size is "24", expected a value such as 768'),
    ({"hidden_size": True}, "hidden_size is true"),
    ({"conv_bias": 1}, "conv_bias is 1"),
    ({"hidden_dropout": 1.5}, "dropout"),
    ({"num_hidden_layers": 10**9}, "the settings name 1000000000 layers, but the file holds"),
    ({"hidden_size": 10**6}, "has the shape"),
    ({"hidden_size": 10**30}, "hidden_size is 1000000"),
    ({"intermediate_size": 47}, r"has the shape \(48, 24\), but the settings beside it make \(47, 24\)"),
    ({"num_attention_heads": 5}, "no multiple of its num_heads 5"),
    ({"num_conv_pos_embedding_groups": 0}, "its settings make no model"),
    ({"architectures": ["Wav2Vec2ForXVector"]}, "the architecture 'Wav2Vec2ForXVector'"),
    ({"architectures": ["Wav2Vec2BertModel"], "model_type": "wav2vec2-bert"}, "Wav2Vec2BertModel"),
    ({"architectures": ["Wav2Vec2ConformerForCTC"]}, "Wav2Vec2ConformerForCTC"),
    ({"architectures": None, "model_type": "whisper"}, "the model type 'whisper'"),
    ({"architectures": 3}, "the architecture 3"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED)
def test_what_the_toolkit_lacks_is_refused_in_a_sentence(config, words, tmp_path):
    folder = hf_folder(tmp_path, "encoder", config=config)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"), [({"num_conv_pos_embeddings": 1}, "at least 2"), ({"conv_pos_kernel_size": 2}, "at least 3")]
)
def test_data2vecs_positions_are_a_stack(config, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        read_pretrained(hf_folder(tmp_path, "data2vec encoder", config=config))


def test_data2vec_means_the_depth_by_num_conv_pos_embeddings(tmp_path):
    inner = read_pretrained(hf_folder(tmp_path, "data2vec encoder")).config.architecture
    assert (inner["pos_depth"], inner["pos_kernel"]) == (2, 10)


def damage(folder, what):
    weights = folder / "model.safetensors"
    if what == "no weights":
        os.remove(weights)
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "no safetensors":
        weights.write_bytes(b"PK\x03\x04 something else")
    elif what == "empty":
        weights.write_bytes(b"")
    elif what == "config no JSON":
        (folder / "config.json").write_text('{"model_type": "wav2vec2", ')
    elif what == "config a list":
        (folder / "config.json").write_text("[1, 2]")
    elif what == "deep config":
        (folder / "config.json").write_text("[" * 100_000)
    elif what == "vocab no JSON":
        (folder / "vocab.json").write_text("{")
    elif what == "vocab a list":
        (folder / "vocab.json").write_text("[]")
    elif what == "vocab of words":
        (folder / "vocab.json").write_text('{"A": "B"}')
    elif what == "blank outside":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 99}))
    elif what == "preprocessor":
        (folder / "preprocessor_config.json").write_text('{"sampling_rate": "16k"}')
    elif what == "rate":
        (folder / "preprocessor_config.json").write_text('{"sampling_rate": 0}')
    elif what == "shard missing":
        os.remove(weights)
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    elif what == "shard outside":
        os.rename(weights, folder.parent / "model.safetensors")
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    elif what == "no map":
        os.remove(weights)
        (folder / "model.safetensors.index.json").write_text("{}")
    elif what == "tensor not in shard":
        os.rename(weights, folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    elif what == "pickle of a list":
        os.remove(weights)
        torch.save([1], folder / "pytorch_model.bin")
    elif what == "pickle damaged":
        os.remove(weights)
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no weights", "there are no weights"),
        ("truncated", "truncated or no safetensors"),
        ("no safetensors", "truncated or no safetensors"),
        ("empty", "truncated or no safetensors"),
        ("config no JSON", "no whole JSON"),
        ("config a list", "config.json"),
        ("deep config", "no whole JSON"),
        ("vocab no JSON", "vocab.json: this is no whole JSON"),
        ("vocab a list", "no JSON object"),
        ("vocab of words", "gives 'A' the row 'B'"),
        ("blank outside", "the blank is row 99"),
        ("preprocessor", 'sampling_rate is "16k"'),
        ("rate", "sampling_rate is 0"),
        ("shard missing", "'model-1.safetensors' that it names is not in the folder"),
        ("shard outside", "is not in the folder"),
        ("no map", "weight_map"),
        ("tensor not in shard", "a is not in the file model-1.safetensors"),
        ("pickle of a list", "no table of tensors"),
        ("pickle damaged", "pytorch_model.bin"),
    ],
)
def test_damaged_folders_are_told_in_a_sentence(what, words, tmp_path):
    folder = hf_folder(tmp_path, "ctc")
    damage(folder, what)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_missing_extra_and_misshapen_tensors(tmp_path):
    def changed(tensors):
        tensors["surplus"] = torch.zeros(1)
        del tensors["lm_head.bias"], tensors["wav2vec2.encoder.layers.1.attention.k_proj.weight"]
        return tensors

    folder = rewritten(hf_folder(tmp_path / "one", "ctc"), changed)
    converted = read_pretrained(folder)
    assert converted.missing == ("encoder.transformer.layers.1.qkv.weight", "head.bias")
    assert "surplus" in converted.unexpected
    with pytest.raises(CheckpointError, match="2 of the model are missing"):
        load_pretrained(folder)
    with pytest.raises(CheckpointError, match="2 of the model's tensors are missing"):
        write_huggingface(converted, tmp_path / "again")
    assert not (tmp_path / "again").exists()

    def misshapen(tensors):
        return tensors | {"wav2vec2.encoder.layers.0.attention.q_proj.weight": torch.zeros(12, 24)}

    with pytest.raises(CheckpointError, match="these must have one shape"):
        read_pretrained(rewritten(hf_folder(tmp_path / "two", "ctc"), misshapen))

    def twice(tensors):
        return tensors | {"masked_spec_embed": torch.zeros(24)}

    with pytest.raises(CheckpointError, match="stand there twice"):
        read_pretrained(rewritten(hf_folder(tmp_path / "three", "ctc"), twice))


def test_a_folder_that_holds_other_files_is_left_alone(tmp_path):
    converted = saved(tmp_path / "model", *CASES["encoder"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("the only copy")
    with pytest.raises(CheckpointError, match="holds other files"):
        write_huggingface(converted, other)
    with pytest.raises(CheckpointError, match="is a file"):
        write_huggingface(converted, other / "thesis.tex")
    assert os.listdir(other) == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    write_huggingface(converted, tmp_path / "empty")
    write_huggingface(converted, tmp_path / "empty")  # its own is replaced
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_write_that_fails_leaves_what_stood_there(tmp_path, monkeypatch):
    converted = saved(tmp_path / "model", *CASES["encoder"])
    write_huggingface(converted, tmp_path / "hf")
    before = (tmp_path / "hf" / "config.json").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toolkit.models.convert.huggingface_write.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_huggingface(converted, tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 16}, "has a projection where the toolkit's has none"),
        ({"pos_depth": 2, "pre_norm": True, "extractor_norm": "layer"}, "stack of positional convolutions only with"),
        ({"pos_depth": 2}, "stack of positional convolutions only with"),
    ],
)
def test_what_transformers_lacks_is_refused_in_a_sentence(changes, words, tmp_path):
    converted = saved(tmp_path / "model", "wav2vec2_encoder", encoder(**changes), None)
    with pytest.raises(CheckpointError, match=words):
        write_huggingface(converted, tmp_path / "hf")
    pretraining = Wav2Vec2Pretraining(encoder(**DATA2VEC), final_dim=12, num_codes=6)
    converted = saved(tmp_path / "model", "wav2vec2_pretraining", pretraining, None)
    with pytest.raises(CheckpointError, match="no pretraining model"):
        write_huggingface(converted, tmp_path / "hf")


def test_other_kinds_and_tokens_are_refused(tmp_path):
    config = ModelConfig("hubert", {}, 16000, True, None, {})
    info = PretrainedInfo("hubert", "toolkit", 16000, True)
    with pytest.raises(CheckpointError, match="kind 'hubert'"):
        write_huggingface(Converted(config, {}, info), tmp_path / "hf")
    start = saved(tmp_path / "model", *CASES["ctc"])
    pieces = SentencePieceTokenizer.__new__(SentencePieceTokenizer)
    with pytest.raises(CheckpointError, match="SentencePiece"):
        write_huggingface(Converted(start.config, start.tensors, start.info, tokenizer=pieces), tmp_path / "hf")
    with pytest.raises(CheckpointError, match="are of two models"):
        other = LetterTokenizer(["A"])
        write_huggingface(Converted(start.config, start.tensors, start.info, tokenizer=other), tmp_path / "hf")


# vocabularies

XLSR = {"vocab.json": {"a": 1, "b": 2, "|": 0, "'": 3, "[UNK]": 4, "[PAD]": 5},
        "tokenizer_config.json": {"unk_token": "[UNK]", "pad_token": "[PAD]", "do_lower_case": False},
        "added_tokens.json": {"<s>": 6, "</s>": 7}}  # fmt: skip


SOMEWHERE = Path("folder")


def test_the_standard_vocabulary_keeps_its_order():
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5}
    found = read_vocabulary({"vocab.json": vocab}, 6, 0, source=SOMEWHERE)
    assert found.rows == (0, 1, 2, 3, 4, 5) and found.notes == ()
    assert found.tokenizer.labels == ("<s>", "<pad>", "</s>", "<unk>", "|", "E")
    assert found.tokenizer.unknown == "unk"


def test_an_xlsr_vocabulary_changes_places():
    found = read_vocabulary(XLSR, 6, 5, source=SOMEWHERE)  # <s> and </s> lie behind the head's rows
    assert found.rows == (5, None, None, 4, 0, 1, 2, 3)
    assert found.tokenizer.symbols == ("|", "a", "b", "'")
    assert found.tokenizer.decode(found.tokenizer.encode("a b'a")) == "a b'a"
    found = read_vocabulary(XLSR, 8, 5, source=SOMEWHERE)
    assert found.rows == (5, 6, 7, 4, 0, 1, 2, 3)


def test_rows_go_there_and_back_bit_for_bit():
    rows = read_vocabulary(XLSR, 6, 5, source=SOMEWHERE).rows
    weight, bias = torch.randn(6, 4), torch.randn(6)
    ours = rows_to_ours(weight, rows, 0.0), rows_to_ours(bias, rows, -1e4)
    assert torch.equal(rows_to_theirs(ours[0], rows), weight) and torch.equal(rows_to_theirs(ours[1], rows), bias)
    x = torch.randn(3, 4)
    log_probs = (x @ ours[0].T + ours[1]).log_softmax(-1)
    expected = (x @ weight.T + bias).log_softmax(-1)
    for place, row in enumerate(rows):
        if row is not None:
            torch.testing.assert_close(log_probs[:, place], expected[:, row], rtol=0, atol=1e-6)


def test_odd_vocabularies():
    files = {"vocab.json": {" ": 0, "tʃ": 1, "<unk>": 2, "e\u0301": 3, "|": 4, "<ctc>": 5, "\n": 6},
             "tokenizer_config.json": {"word_delimiter_token": " ", "unk_token": None, "pad_token": "<ctc>",
                                       "bos_token": {"content": "e\u0301"}, "eos_token": "e\u0301",
                                       "do_lower_case": True}}  # fmt: skip
    found = read_vocabulary(files, 9, None, source=SOMEWHERE)
    assert found.rows == (5, 3, None, None, 0, 1, 2, 4, 6, 7, 8)
    assert found.tokenizer.symbols == ("▁", "tʃ", "<row2>", "|", "<row6>", "<row7>", "<row8>")
    assert (found.tokenizer.case, found.tokenizer.unknown, found.tokenizer.word_boundary) == ("upper", "error", "▁")
    assert any("tʃ" in note for note in found.notes) and any("upper case" in note for note in found.notes)
    found = read_vocabulary({"vocab.json": {"x": 0, "y": 1}}, 2, 1, source=SOMEWHERE)
    assert found.rows == (1, None, None, None, 0) and "no symbol parts words" in found.notes[0]


def test_a_vocabulary_for_each_language():
    files = {"vocab.json": {"eng": {"a": 1, "<pad>": 0}, "fra": {"b": 1, "<pad>": 0}}}
    with pytest.raises(CheckpointError, match="target_lang"):
        read_vocabulary(files, 2, 0, source=SOMEWHERE)
    files["tokenizer_config.json"] = {"target_lang": "fra"}
    assert read_vocabulary(files, 2, 0, source=SOMEWHERE).tokenizer.symbols == ("b",)


def test_without_a_vocabulary_only_the_blank_moves(tmp_path):
    found = read_vocabulary({}, 4, 2, source=SOMEWHERE)
    assert found.rows == (2, 0, 1, 3) and found.tokenizer is None
    folder = hf_folder(tmp_path, "data2vec ctc", config={"pad_token_id": 2})
    converted = read_pretrained(folder)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(converted.tensors["head.weight"][0], head[2])
    write_huggingface(converted, tmp_path / "again")
    again, tensors = contents_of(tmp_path / "again")
    assert again["config.json"]["pad_token_id"] == 2 and torch.equal(tensors["lm_head.weight"], head)


def xlsr_folder(tmp_path):
    folder = hf_folder(tmp_path, "data2vec ctc", config={"pad_token_id": 4, "vocab_size": 5})
    files = {"vocab.json": {"a": 1, "|": 0, "b": 2, "[UNK]": 3, "[PAD]": 4},
             "tokenizer_config.json": XLSR["tokenizer_config.json"]}  # fmt: skip
    for name, contents in files.items():
        (folder / name).write_text(json.dumps(contents))
    return folder


def test_an_xlsr_folder_goes_through_a_model_folder_and_back(tmp_path):
    folder = xlsr_folder(tmp_path)
    start = read_pretrained(folder)
    assert start.info.labels == ("<s>", "<pad>", "</s>", "<unk>", "|", "a", "b")
    model = build_converted(start, folder)
    ours = saved(tmp_path / "ours", "ctc", model, start.tokenizer, normalize=True, extra=start.config.extra)
    assert torch.equal(ours.tensors["head.bias"][1:3], torch.full((2,), -1e4))
    write_huggingface(ours, tmp_path / "again")
    files, tensors = contents_of(folder)
    files_again, tensors_again = contents_of(tmp_path / "again")
    assert files_again == files
    assert_same_tensors(tensors, tensors_again)


def test_a_new_vocabulary_takes_the_place_of_the_remembered_one(tmp_path):
    start = read_pretrained(xlsr_folder(tmp_path))
    tokenizer = LetterTokenizer(["|", "x", "y"])
    config = ModelConfig("ctc", start.config.architecture, 8000, True, tokenizer.config, start.config.extra)
    write_huggingface(Converted(config, start.tensors, start.info, tokenizer), tmp_path / "again")
    files, tensors = contents_of(tmp_path / "again")
    assert files["vocab.json"]["x"] == 5 and files["config.json"]["pad_token_id"] == 0
    assert torch.equal(tensors["lm_head.weight"], start.tensors["head.weight"])
    back = read_pretrained(tmp_path / "again")
    assert back.config == config and back.tokenizer.symbols == ("|", "x", "y")


# text


def test_token_types_and_a_pooler_are_there_only_where_they_do_something(tmp_path):
    folder = hf_folder(tmp_path, "text", config={"type_vocab_size": 2})

    row = torch.linspace(-0.5, 0.5, 16)

    def typed(tensors):
        tensors["embeddings.token_type_embeddings.weight"] = torch.stack([row, row + 1])
        tensors["pooler.dense.bias"] = torch.ones(16)
        return tensors | {"lm_head.bias": torch.zeros(2), "embeddings.position_ids": torch.arange(11)[None]}

    before = read_pretrained(folder)
    assert (before.config.architecture["token_types"], before.config.architecture["pooler"]) == (0, False)
    assert before.info.notes == () and before.config.sample_rate == 0
    after = read_pretrained(rewritten(folder, typed))
    assert (after.config.architecture["token_types"], after.config.architecture["pooler"]) == (2, True)
    assert "lm_head.bias" in after.info.unused and "pooler.dense.bias" not in after.info.unused
    assert after.unexpected == after.missing == () and len(after.info.notes) == 1
    plain, own = (build_converted(each, folder).eval() for each in (before, after))
    tokens = torch.tensor([[0, 5, 6, 2]])
    assert not torch.allclose(plain(tokens).features, own(tokens).features)
    with torch.no_grad():  # the first type's vector and no other is added everywhere
        plain.position_embedding.weight += row
    torch.testing.assert_close(plain(tokens).features, own(tokens).features)


def test_a_table_of_token_types_without_rows_of_numbers_is_refused(tmp_path):
    def flat(tensors):
        return tensors | {"embeddings.token_type_embeddings.weight": torch.ones(16)}

    with pytest.raises(CheckpointError, match=r"token_type_embeddings.weight has the shape \(16,\)"):
        read_pretrained(rewritten(hf_folder(tmp_path, "text"), flat))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12"),
        ({"is_decoder": True}, "is_decoder"),
        ({"max_position_embeddings": 2}, "leaves no position"),
        ({"vocab_size": 12}, "has the shape"),
    ],
)
def test_other_text_models_are_refused(config, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        read_pretrained(hf_folder(tmp_path, "text", config=config))


def test_a_missing_config_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_huggingface(tmp_path)
