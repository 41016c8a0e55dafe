"""Models of other programs in the real scripts: fine-tuned, evaluated, pretrained on, converted and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.real_runs import (
    DATA2VEC,
    FIXTURES,
    PRETRAINING,
    ROOT,
    TEMPLATE,
    Ended,
    data2vec_words,
    digits_words,
    environment,
    pretraining_words,
    run_here,
)

MODELS = FIXTURES / "fairseq_models"
PRETRAINED = MODELS / "w2v2_pretrain_groupnorm" / "checkpoint.pt"
FINE_TUNED = MODELS / "w2v2_ctc_from_groupnorm" / "checkpoint_args.pt"
# Upper case as in the dictionary of the fixture; the digits' transcripts are that already.
SHORT = {"max_updates": 2, "reset_layers": 0}


def command(*words: object) -> Ended:
    """``python -m toolkit ...``."""
    ended = subprocess.run(
        [sys.executable, "-m", "toolkit", *map(str, words)],
        capture_output=True, text=True, cwd=ROOT, env=environment(), check=False,
    )  # fmt: skip
    return Ended(ended.returncode, ended.stderr, ended.stdout)


def done(script: Path, words: list[str]) -> Ended:
    ended = run_here(script, words)
    assert ended.code == 0, ended.stderr[-3000:]
    return ended


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> dict[str, Path]:
    """The recorded models as Hugging Face folders, by the command."""
    root = tmp_path_factory.mktemp("hugging_face")
    for name, source in (("pretrained", PRETRAINED), ("fine_tuned", FINE_TUNED)):
        ended = command("convert", source, root / name, "--to", "huggingface")
        assert ended.code == 0 and f"written: {root / name} (huggingface)" in ended.stdout, ended.stderr
    return {"pretrained": root / "pretrained", "fine_tuned": root / "fine_tuned"}


@pytest.mark.parametrize("kind", ["fairseq", "fairseq, fine-tuned", "data2vec", "hugging face"])
def test_a_model_of_elsewhere_is_fine_tuned(kind, hugging_face, tmp_path):
    path = {
        "fairseq": PRETRAINED,
        "fairseq, fine-tuned": FINE_TUNED,
        "data2vec": MODELS / "data2vec_audio" / "checkpoint.pt",
        "hugging face": hugging_face["pretrained"],
    }[kind]
    ended = done(TEMPLATE, digits_words(tmp_path / "run", pretrained=path, lr=0.0, **SHORT))
    assert f"tensors from {path}" in ended.stderr and "audio: 16000 Hz" in ended.stderr
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["kind"] == "ctc" and config["sample_rate"] == 16000
    assert config["architecture"]["encoder"]["norm_over_padding"] is False  # an utterance gets what it gets alone
    # With a rate of 0 the encoder is what the file held, bit for bit.
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    original = torch.load(PRETRAINED if kind == "hugging face" else path, weights_only=False)["model"]
    for name in ("layer_norm.weight", "encoder.layers.1.fc1.weight"):
        theirs = original[("w2v_encoder.w2v_model." if kind == "fairseq, fine-tuned" else "") + name]
        ours = {"layer_norm.weight": "encoder.feature_norm.weight",
                "encoder.layers.1.fc1.weight": "encoder.transformer.layers.1.fc1.weight"}[name]  # fmt: skip
        assert torch.equal(saved[ours], theirs), name


@pytest.mark.parametrize("kind", ["fairseq", "hugging face"])
def test_a_fine_tuned_model_of_elsewhere_is_scored(kind, hugging_face, tmp_path):
    path = FINE_TUNED if kind == "fairseq" else hugging_face["fine_tuned"]
    words = digits_words(tmp_path / "run", pretrained=path, test_only="True", train_manifest=None, valid_manifest=None)
    done(TEMPLATE, words)  # as the README has it: nothing of a training is named
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_wer"] > 0 and summary["test_cer"] > 0
    assert (tmp_path / "run" / "test_hypotheses.jsonl").read_text().count("\n") > 1


def test_without_its_letters_a_fine_tuned_model_cannot_be_scored(tmp_path):
    shutil.copy(FINE_TUNED, tmp_path / "model.pt")
    ended = run_here(TEMPLATE, digits_words(tmp_path / "run", pretrained=tmp_path / "model.pt", test_only="True"))
    assert ended.code == 2 and ended.error == (
        f"{tmp_path / 'model.pt'}: nothing says which letters the model's 32 outputs are; put its dictionary beside it "
        "(dict.ltr.txt of fairseq's, or vocab.json in a Hugging Face folder)."
    )


def test_data2vec_goes_to_fairseq_and_on_from_there(tmp_path):
    """With a rate of 0 and a teacher that stays, student, head and teacher are what the file held, bit for bit."""
    wider = {"model.encoder.dim": 24}  # than the convolutions: fairseq's data2vec always projects their features
    done(DATA2VEC, data2vec_words(tmp_path / "first", **wider))
    ended = command("convert", tmp_path / "first" / "model", tmp_path / "x.pt", "--to", "fairseq")
    assert ended.code == 0 and "left out" not in ended.stdout, ended.stderr
    keys = {"pretrained": tmp_path / "x.pt", "lr": 0.0, "model.ema_decay": "[1.0, 1.0, 1]",
            "model.ema_layers_only": "False"}  # fmt: skip
    ended = done(DATA2VEC, data2vec_words(tmp_path / "second", **wider, **keys))
    assert f"tensors from {tmp_path / 'x.pt'}" in ended.stderr
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and any(name.startswith("teacher.module.") for name in first)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_pretraining_goes_on_from_fairseq(tmp_path):
    sizes = {
        "conv_layers": "[[32,10,5],[32,3,2],[32,3,2],[32,3,2],[32,3,2],[32,2,2],[32,2,2]]", "dim": 48,
        "num_layers": 2, "ffn_dim": 96, "num_heads": 4, "pos_kernel": 128, "pos_groups": 4,
    }  # fmt: skip
    words = pretraining_words(
        tmp_path / "run", pretrained=PRETRAINED, max_updates=2,
        **{f"model.encoder.{name}": value for name, value in sizes.items()},
        **{"model.num_codes": 16, "model.final_dim": 16},
    )  # fmt: skip
    ended = done(PRETRAINING, words)
    assert f" tensors from {PRETRAINED} (kind wav2vec2_pretraining)" in ended.stderr, ended.stderr[:3000]
    ended = run_here(PRETRAINING, pretraining_words(tmp_path / "other", pretrained=PRETRAINED))
    assert ended.code == 2 and "Traceback" not in ended.stderr and str(PRETRAINED) in ended.error


def test_there_and_back_by_the_command(hugging_face, tmp_path):
    assert command("convert", hugging_face["fine_tuned"], tmp_path / "own", "--to", "toolkit").code == 0
    assert command("convert", tmp_path / "own", tmp_path / "back" / "model.pt", "--to", "fairseq").code == 0
    theirs = torch.load(FINE_TUNED, weights_only=False)["model"]
    ours = torch.load(tmp_path / "back" / "model.pt", weights_only=True)["model"]
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    dictionaries = [(folder / "dict.ltr.txt").read_text() for folder in (FINE_TUNED.parent, tmp_path / "back")]
    symbols = [[line.split()[0] for line in text.splitlines()] for text in dictionaries]
    assert symbols[0] == symbols[1]


def test_what_cannot_be_converted_is_told(tmp_path):
    ended = command("convert", tmp_path / "nothing", tmp_path / "out", "--to", "toolkit")
    assert (ended.code, ended.error) == (2, f"{tmp_path / 'nothing'}: there is no such file or folder; check the path.")
    ended = command("convert", PRETRAINED, FIXTURES, "--to", "toolkit")
    assert ended.error == f"{FIXTURES} is there already; name a new path, nothing is overwritten."
    (tmp_path / "model.pt").write_bytes(PRETRAINED.read_bytes()[:5000])
    ended = command("inspect", tmp_path / "model.pt")
    assert ended.code == 2 and ended.error.startswith(f"{tmp_path / 'model.pt'}: ") and "Traceback" not in ended.stderr
    weights = torch.load(PRETRAINED, weights_only=False)
    del weights["model"]["final_proj.bias"]
    torch.save(weights, tmp_path / "model.pt")
    ended = command("convert", tmp_path / "model.pt", tmp_path / "out", "--to", "toolkit")
    assert ended.code == 2
    assert "the tensors do not match, 1 of the model are missing and 0 of the file unexpected" in ended.stderr
    assert "final_projection.bias" in ended.stderr and not (tmp_path / "out").exists()
    words = ("convert", tmp_path / "model.pt", tmp_path / "out", "--to", "toolkit", "--allow_missing", "final_*")
    assert command(*words).code == 0 and (tmp_path / "out" / "model.safetensors").is_file()
