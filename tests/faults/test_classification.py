"""The classification recipe: what is given by mistake, what a cut run goes on from, and evaluation without a corpus."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.real_runs import COMMON, FIXTURES, ROOT, TEXT, Ended, Stop, run_forked, run_here, text_words, words_of
from toolkit.data.dictionary_tokens import DictionaryTokenizer
from toolkit.data.text_bpe import Gpt2Bpe, Gpt2Tokenizer
from toolkit.data.text_dictionary import TextDictionary
from toolkit.data.tokens import load_tokenizer
from toolkit.models.data2vec import Data2VecText
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.models.model_files import save_model_folder
from toolkit.models.text_encoder import TextEncoder

SCRIPT = ROOT / "recipes" / "WikiText" / "classification" / "train.py"
TABLES, BPE = FIXTURES / "textcls_tiny", FIXTURES / "gpt2_bpe"
FAIRSEQ = FIXTURES / "fairseq_models" / "data2vec_text" / "checkpoint.pt"
SIZES = {"dim": 16, "num_layers": 2, "ffn_dim": 32, "num_heads": 2, "max_positions": 64}
UPDATES = 13
"""Of which an epoch has 9."""


def words(output: Path, **keys: Any) -> list[str]:
    """The recipe on 160 messages, some 4,000 tokens: 9 updates an epoch."""
    base = {
        "data_folder": TABLES, "output_folder": output, "bpe_folder": BPE, "max_updates": 2, "batch_tokens": 128,
        "effective_batch": 512, "valid_interval_updates": 4,
        **{f"encoder_sizes.{name}": value for name, value in SIZES.items()},
    }  # fmt: skip
    return [str(SCRIPT.parent / "hparams" / "classify_tiny.yaml"), *words_of(COMMON, base, keys)]


def done(output: Path, **keys: Any) -> Ended:
    ended = run_here(SCRIPT, words(output, **keys))
    assert ended.code == 0, ended.stderr[-3000:]
    return ended


def refused(sentence: str, output: Path, **keys: Any) -> None:
    """The run ends with exit code 2, and the sentence is the last thing it says."""
    ended = run_here(SCRIPT, words(output, **keys))
    assert ended.code == 2 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert ended.error == sentence


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what the clock decides."""
    clock = {"throughput", "loader_wait_share", "elapsed_seconds"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def tables(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the folder of tables, one of them changed: its rows pass through a function."""

    def make(name: str, change: Callable[[list[list[str]]], object]) -> Path:
        folder = Path(shutil.copytree(TABLES, tmp_path / "tables"))
        with open(folder / name, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        change(rows)
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        return folder

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 updates, made once; tests do not write into it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done(folder)
    return folder


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_missing_table(output, part):
    refused(f"the table {TABLES / 'nowhere.csv'} does not exist; give a CSV file with the columns text, label.",
            output, **{f"{part}_splits": "[nowhere.csv]"})  # fmt: skip


def test_a_missing_column_an_empty_text_and_one_label_only(output, tables):
    refused(f"{TABLES / 'test.csv'} has no column topic; its header line has text, label: name the columns with "
            "--text_column and --label_column.", output, label_column="topic")  # fmt: skip

    def change(rows: list[list[str]]) -> None:
        rows[3][0] = " "

    folder = tables("train.csv", change)
    refused(f"{folder / 'train.csv'}, line 4: the column text is empty; complete or delete the row.",
            output, data_folder=folder)  # fmt: skip
    rows = [["text", "label"], ["a", "ham"], ["b", "ham"]]
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    refused(f"{folder / 'train.csv'}: all 2 texts have the label 'ham'; a classifier needs texts of two labels at "
            "least.", output, data_folder=folder)  # fmt: skip


def test_a_label_in_the_test_that_training_never_saw_is_told_before_the_training(output, tables):
    def change(rows: list[list[str]]) -> None:
        rows[5][1] = "eggs"

    folder = tables("test.csv", change)
    refused(f"{folder / 'test.csv'}, line 6: the label 'eggs' is none of the model's (ham, spam); correct the row, or "
            "train with texts of this label.", output, data_folder=folder)  # fmt: skip
    assert not (output / "save").exists() or not any((output / "save").iterdir())


def test_nothing_to_train_on_and_nothing_to_evaluate_on(output, finished):
    refused("train_splits is empty; name at least one CSV file to train on.", output, train_splits="[]")
    refused("test_splits is empty, so there is nothing to evaluate on; name at least one CSV file.", output,
            pretrained=finished / "model", test_only="True", test_splits="[]")  # fmt: skip


def test_a_long_text_is_cut_and_counted(output, tables):
    folder = tables("train.csv", lambda rows: rows.append(["word " * 500, "ham"]))
    ended = done(output, data_folder=folder, valid_share=0, **{"encoder_sizes.max_positions": 500})
    assert f"{folder / 'train.csv'}: 161 texts, " in ended.stderr and " unknown), 1 cut to 500 tokens; " in ended.stderr
    assert "valid at update" not in ended.stderr and "held out" not in ended.stderr


def test_the_held_out_part_is_told(finished):
    log = (finished / "log.txt").read_text(encoding="utf-8")
    assert (
        "validation: 16 texts held out of the training's, 144 left; a share 0.1 of each label, by seed 1234" in log
    )


# ---- token files and pretrained models -------------------------------------------------------------------------------


def test_token_files_that_are_missing(output, tmp_path):
    refused("bpe_folder is missing; give the folder of GPT-2's encoder.json and vocab.bpe.", output, bpe_folder="null")
    refused(f"the BPE folder {tmp_path} has no encoder.json; give the folder that holds GPT-2's encoder.json and "
            "vocab.bpe.", output, bpe_folder=tmp_path)  # fmt: skip
    where = tmp_path / "dict.txt"
    refused(f"the token file {where} cannot be read (No such file or directory); check the path.", output, dict=where)
    refused(f"{FAIRSEQ} does not carry its tokens; give the dict.txt that it was pretrained with (--dict), and the "
            "folder of GPT-2's encoder.json and vocab.bpe (--bpe_folder).", output, pretrained=FAIRSEQ)  # fmt: skip


def test_a_dictionary_of_another_size_and_one_that_fits(output, tmp_path):
    vocabulary = len(torch.load(FAIRSEQ, weights_only=False)["model"]["encoder.sentence_encoder.embed_tokens.weight"])
    own = vocabulary - 5  # <s> <pad> </s> <unk> and the mask stand in no file
    for size in (own, own + 3):
        symbols = [str(number) for number in range(size)]
        TextDictionary(symbols).save(tmp_path / f"{size}.txt")
    refused(f"{tmp_path / f'{own + 3}.txt'} holds {vocabulary + 3:,} tokens (the mask's included), but the model in "
            f"{FAIRSEQ} has {vocabulary:,}; give the dict.txt that it was pretrained with.", output,
            pretrained=FAIRSEQ, dict=tmp_path / f"{own + 3}.txt")  # fmt: skip
    ended = done(output, pretrained=FAIRSEQ, dict=tmp_path / f"{own}.txt")
    assert f"encoder: all 40 tensors from {FAIRSEQ}" in ended.stderr, ended.stderr[:2000]
    assert summary(output)["updates"] == 2


def test_a_model_of_speech_and_one_without_classes(output, tmp_path):
    speech = Wav2Vec2Encoder(
        conv_layers=[(8, 10, 5)], dim=8, num_layers=1, ffn_dim=8, num_heads=2, pos_kernel=4, pos_groups=2
    )
    folder = save_model_folder(tmp_path / "m", speech, kind="wav2vec2_encoder", sample_rate=16000, normalize=False)
    refused(f"{folder}: this is a model of speech, of kind 'wav2vec2_encoder'; give one of text.", output,
            pretrained=folder)  # fmt: skip
    refused(f"{folder}: this is a model of kind 'wav2vec2_encoder', which has no classes to evaluate; give the model/ "
            "folder of a classification run (kind 'text_classifier'), or train one without --test_only.", output,
            pretrained=folder, test_only="True")  # fmt: skip
    refused(f"{tmp_path / 'none'}: there is no such file or folder; check the path.", output,
            pretrained=tmp_path / "none")  # fmt: skip


def test_a_data2vec_folder_gives_its_encoder_and_its_tokens(output, tmp_path):
    tokenizer = Gpt2Tokenizer(
        Gpt2Bpe.from_folder(BPE), TextDictionary([str(number) for number in range(500)])
    )
    torch.manual_seed(3)
    encoder = TextEncoder(vocab_size=tokenizer.vocab_size, **SIZES)
    model = Data2VecText(encoder, mask_id=tokenizer.mask_id, top_layers=2)
    save_model_folder(
        tmp_path / "m", model, kind="data2vec_text", sample_rate=0, normalize=False, tokenizer=tokenizer
    )
    keys = {"pretrained": tmp_path / "m", "lr": "1e-12", "head_dropout": 0.0, "encoder_training.dropout": 0.0}
    ended = done(output, **keys)
    assert f"tokens: those of {tmp_path / 'm'} (bpe_folder does not count)" in ended.stderr
    found = load_file(output / "model" / "model.safetensors")
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(found[f"encoder.{name}"], value, rtol=0, atol=1e-6)
    assert (output / "model" / "dict.txt").read_bytes() == (tmp_path / "m" / "dict.txt").read_bytes()
    TextDictionary([str(number) for number in (0, 2, 1, *range(3, 500))]).save(tmp_path / "other.txt")
    refused(f"{tmp_path / 'other.txt'} is another dictionary than that in {tmp_path / 'm'}: id 5 is '1' there and '2' "
            "here; leave out --dict, for the model carries its own.", tmp_path / "again", pretrained=tmp_path / "m",
            dict=tmp_path / "other.txt")  # fmt: skip


@pytest.mark.parametrize("test_only", [False, True])
def test_pretraining_goes_on_with_the_same_symbols_only(output, tmp_path, test_only):
    prepared = FIXTURES / "fairseq_text" / "bin_own"
    other = Path(shutil.copytree(prepared, tmp_path / "other"))
    dictionary = TextDictionary.from_file(prepared / "dict.txt")
    own = dictionary.symbols[4:]
    TextDictionary(own).save(other / "dict.txt")  # with other counts
    keys = {"max_updates": 1, "valid_splits": "[]", "test_splits": "[valid]"}
    first = tmp_path / "text" / "model"
    assert run_here(TEXT, text_words(first.parent, data_folder=prepared, **keys)).code == 0
    # Evaluated is what lies in the output folder; another run begins with it.
    keys |= {"test_only": True} if test_only else {"pretrained": first}
    output = first.parent if test_only else output
    assert run_here(TEXT, text_words(output, data_folder=other, **keys)).code == 0
    TextDictionary([own[1], own[0], *own[2:]]).save(other / "dict.txt")
    ended = run_here(TEXT, text_words(output if test_only else tmp_path / "more", data_folder=other, **keys))
    assert ended.code == 2 and ended.error == (
        f"{first}: the model's dict.txt is another than that of the text: id 4 is {own[0]!r} there and {own[1]!r} "
        "here; prepare the text with the model's dict.txt (--dict), or leave the model out."
    )


@pytest.mark.parametrize("words_too", [False, True])
def test_a_model_of_prepared_text_carries_its_dictionary_and_needs_only_what_is_missing(output, tmp_path, words_too):
    prepared = FIXTURES / "fairseq_text" / ("bin_word" if words_too else "bin_own")
    keys = {"data_folder": prepared, "words": words_too, "max_updates": 1, "valid_splits": "[]"}
    ended = run_here(TEXT, text_words(tmp_path / "text", **keys))
    assert ended.code == 0, ended.stderr[-3000:]
    model = tmp_path / "text" / "model"
    assert (model / "dict.txt").read_bytes() == (prepared / "dict.txt").read_bytes()
    tokens = json.loads((model / "config.json").read_text(encoding="utf-8"))["tokens"]
    assert tokens == {"kind": "dictionary", "words": words_too, "file": "dict.txt"}
    keys = {"pretrained": model, "test_splits": "[]"}
    if not words_too:
        refused(f"{model} carries its dict.txt, and nothing says how text becomes its symbols; give the folder of "
                "GPT-2's encoder.json and vocab.bpe (--bpe_folder).", output, bpe_folder="null", **keys)  # fmt: skip
    done(output, **keys, **({"bpe_folder": "null"} if words_too else {}))
    kind = DictionaryTokenizer if words_too else Gpt2Tokenizer
    assert isinstance(load_tokenizer(output / "model"), kind)
    assert (output / "model" / "dict.txt").read_bytes() == (prepared / "dict.txt").read_bytes()
    evaluated = done(tmp_path / "eval", pretrained=output / "model", test_only="True", bpe_folder="null")
    assert f"model, tokens and labels: {output / 'model'}" in evaluated.stderr


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_a_finished_model_is_evaluated_without_training_data_and_token_files(finished, output, tmp_path):
    test_alone = tmp_path / "data"
    test_alone.mkdir()
    shutil.copy(TABLES / "test.csv", test_alone)
    keys = {"data_folder": test_alone, "bpe_folder": None, "test_only": "True"}
    done(output, pretrained=finished / "model", **keys)
    scores = {name: value for name, value in summary(finished).items() if name.startswith("test_")}
    assert {name: value for name, value in summary(output).items() if name.startswith("test_")} == scores
    copied = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copied / "test_predictions.jsonl").unlink()
    done(copied, **keys)
    predictions = (copied / "test_predictions.jsonl").read_text(encoding="utf-8")
    assert predictions == (finished / "test_predictions.jsonl").read_text(encoding="utf-8")


def test_scores_are_those_of_the_predictions(finished):
    rows = [json.loads(line) for line in (finished / "test_predictions.jsonl").read_text("utf-8").splitlines()]
    with open(TABLES / "test.csv", newline="", encoding="utf-8") as file:
        expected = {f"test.csv:{line}": row for line, row in enumerate(csv.DictReader(file), 2)}
    assert len(rows) == len(expected) == 48
    assert all(expected[row["id"]]["label"] == row["label"] for row in rows)
    assert all(expected[row["id"]]["text"].strip() == row["text"] for row in rows)
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert summary(finished)["test_accuracy"] == pytest.approx(100 * right / 48)
    each = []
    for label in ("ham", "spam"):
        hits = sum(row["label"] == row["predicted"] == label for row in rows)
        named = sum(row["label"] == label for row in rows) + sum(row["predicted"] == label for row in rows)
        each.append(200 * hits / named)
        assert summary(finished)[f"test_f1_{label}"] == pytest.approx(each[-1])
    assert summary(finished)["test_f1"] == pytest.approx(sum(each) / 2)


def test_several_test_sets_are_pooled(finished, output):
    done(output, pretrained=finished / "model", test_only="True", test_splits="[test.csv, train.csv]")
    found = summary(output)
    first, second = found["tests"]["test.csv"], found["tests"]["train.csv"]
    assert found["test_accuracy"] == pytest.approx((48 * first["accuracy"] + 160 * second["accuracy"]) / 208)
    assert 0 < found["test_f1"] <= 100 and {"f1", "f1_ham"} <= first.keys()


def test_two_processes_evaluate_as_one(finished, output):
    ended = run_forked(SCRIPT, words(output, pretrained=finished / "model", test_only="True"), processes=2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].stderr[-3000:]
    one, two = summary(finished), summary(output)
    assert two["world_size"] == 2 and {"test_loss", "test_accuracy", "test_f1", "test_f1_spam"} <= two.keys()
    assert all(two[name] == pytest.approx(one[name], rel=1e-5) for name in one if name.startswith("test_"))


def test_two_processes_train(output):
    ended = run_forked(SCRIPT, words(output, max_updates=3), processes=2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].stderr[-3000:]
    assert "2 ranks, " in ended[0].stderr and summary(output)["updates"] == 3


def test_a_folder_whose_labels_were_lost(finished, output, tmp_path):
    folder = Path(shutil.copytree(finished / "model", tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["extra"]["labels"] = ["ham"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(f"{folder}: nothing says which labels the model's 2 outputs are; copy the folder again from the run that "
            "wrote it.", output, pretrained=folder, test_only="True")  # fmt: skip


def test_training_drops_and_validation_does_not(tmp_path):
    losses = []
    for share in (0.0, 0.5):
        folder = tmp_path / str(share)
        done(folder, max_updates=1, log_interval=1, lr="1e-12",
             **{"encoder_training.dropout": share, "encoder_training.attention_dropout": 0.0})  # fmt: skip
        losses.append([next(row["loss"] for row in rows_of(folder) if row["stage"] == stage) for stage in
                       ("train", "valid")])  # fmt: skip
    assert losses[0][0] != losses[1][0] and losses[0][1] == pytest.approx(losses[1][1], rel=1e-6)


# ---- exact resume ----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    keys = {"max_updates": UPDATES, "log_interval": 1, "ckpt_interval_updates": 2, "encoder_training.layerdrop": 0.3}

    def run(folder: Path, *, code: int = 0, stop: Stop | None = None, **more: Any) -> Ended:
        (ended,) = run_forked(SCRIPT, words(folder, **keys, **more), stop=stop)
        assert ended.code == code, ended.stderr[-3000:]
        return ended

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    run(parts, stop=Stop(1, 1, signal.SIGTERM), code=75)
    run(parts, stop=Stop(5, 0, signal.SIGKILL), code=-9, num_workers=2, async_save=False)  # 4 is complete then
    assert "resumed at update 4" in run(parts).stderr
    for name in ("model/model.safetensors", "model/config.json", "model/dict.txt", "test_predictions.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    assert rows_of(parts) == rows_of(whole)


def test_other_labels_are_noticed_on_resuming(tmp_path, tables):
    keys = {"valid_share": 0, "test_splits": "[]"}
    done(tmp_path / "run", **keys)
    folder = tables("train.csv", lambda rows: rows[9].__setitem__(1, "spam" if rows[9][1] == "ham" else "ham"))
    ended = run_here(SCRIPT, words(tmp_path / "run", data_folder=folder, max_updates=3, **keys))
    assert ended.code == 2 and "the data changed since the checkpoint" in ended.error, ended.stderr[-2000:]
