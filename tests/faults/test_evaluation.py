"""What is evaluated, with which tokens, and what of a run stays as it was: by the real scripts on small fixtures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.real_runs import (
    ASR,
    COMMON,
    DIGITS,
    FIXTURES,
    ODD_AUDIO,
    PRETRAINING,
    ROOT,
    SIZES,
    TEMPLATE,
    Ended,
    asr_words,
    digits,
    digits_words,
    pretraining_words,
    run_here,
    words_of,
    write_rows,
)

SELF_SUPERVISED = ROOT / "templates" / "self_supervised" / "train.py"


def self_supervised_words(output: Path, **keys: Any) -> list[str]:
    """The pretraining template on the spoken digits."""
    base = {
        "train_manifest": DIGITS / "train.csv", "valid_manifest": DIGITS / "test.csv", "output_folder": output,
        **{f"model.encoder.{name}": value for name, value in SIZES.items()}, "min_duration": 0.3,
        "max_updates": 2, "effective_batch": 12, "batch_seconds": 6, "crop_seconds": 1,
    }  # fmt: skip
    return [str(SELF_SUPERVISED.with_name("train.yaml")), *words_of(COMMON, base, keys)]


def done(script: Path, words: list[str]) -> Ended:
    """The run ends well."""
    ended = run_here(script, words)
    assert ended.code == 0, ended.stderr[-3000:]
    return ended


def refused(script: Path, words: list[str], sentence: str) -> Ended:
    """The run ends with exit code 2 and the sentence."""
    ended = run_here(script, words)
    assert ended.code == 2 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert ended.error == sentence
    return ended


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def scores(folder: Path) -> dict[str, Any]:
    """Scores of the test; among them what follows from the update after which the weights were saved."""
    return {name: value for name, value in summary(folder).items() if name.startswith("test_")}


def updates_of_tests(folder: Path) -> list[int]:
    """The updates that the log names beside its tests."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["update"] for row in rows if row["stage"] == "test"]


def record(folder: Path) -> dict[str, bytes]:
    """What tells how a run was made."""
    return {name: (folder / name).read_bytes() for name in ("hyperparams.yaml", "train.py", "env.log")}


def without_letters(tmp_path: Path) -> Path:
    """The digits with other transcripts: other letters, so other tokens in another order."""

    def change(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row["wrd"] = "QQ XYZ" if row["wrd"] == "ZERO" else row["wrd"][::-1] + " K"

    return write_rows(tmp_path / "other.csv", digits(change))


def without_transcripts(tmp_path: Path) -> Path:
    def change(rows: list[dict[str, str]]) -> None:
        for row in rows:
            del row["wrd"]

    return write_rows(tmp_path / "silent.csv", digits(change))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs made once; tests take copies."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pretraining(runs) -> Path:
    """A pretraining of the template at 8 kHz, not normalized."""
    done(SELF_SUPERVISED, self_supervised_words(runs / "pretraining", sample_rate=8000, normalize=False))
    return runs / "pretraining"


@pytest.fixture(scope="module")
def scratch(runs) -> Path:
    """A recognizer from nothing."""
    done(TEMPLATE, digits_words(runs / "scratch"))
    return runs / "scratch"


@pytest.fixture(scope="module")
def tuned(runs, scratch) -> Path:
    """A recognizer with other letters than ``scratch``, from which its encoder is."""
    manifest = without_letters(runs)
    done(TEMPLATE, digits_words(runs / "tuned", train_manifest=manifest, pretrained=scratch / "model"))
    return runs / "tuned"


@pytest.fixture
def copied(tmp_path):
    """A copy of a run."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy


# ---- which model, which tokens ---------------------------------------------------------------------------------------


def test_a_run_is_evaluated_with_its_own_tokens_and_not_with_those_of_its_pretrained_model(tuned, scratch, copied):
    output = copied(tuned)
    before = summary(output), (output / "test_hypotheses.jsonl").read_bytes()
    # The same command once more, with another training manifest besides: neither decides about tokens any more.
    done(TEMPLATE, digits_words(output, pretrained=scratch / "model", test_only="True"))
    assert (summary(output), (output / "test_hypotheses.jsonl").read_bytes()) == before
    first, again = updates_of_tests(output)
    assert first == again == summary(output)["best"]["update"]


def test_tokens_do_not_come_from_whatever_manifest_is_given(scratch, copied, tmp_path):
    output = copied(scratch)
    before = summary(output)
    done(TEMPLATE, digits_words(output, train_manifest=without_letters(tmp_path), test_only="True"))
    assert summary(output) == before


def test_a_run_without_its_model_folder_is_built_as_it_was_and_gets_one(tuned, scratch, copied, tmp_path):
    output = copied(tuned)
    before = summary(output)
    shutil.rmtree(output / "model")
    manifest = without_letters(tmp_path)
    done(TEMPLATE, digits_words(output, train_manifest=manifest, pretrained=scratch / "model", test_only="True"))
    assert summary(output) == before
    same = (load_file(folder / "model" / "model.safetensors") for folder in (output, tuned))
    assert all(torch.equal(*pair) for pair in zip(*(tensors.values() for tensors in same), strict=True))


def test_a_run_of_which_only_the_model_folder_is_left(scratch, copied):
    output = copied(scratch)
    before = summary(output)
    shutil.rmtree(output / "save")
    done(TEMPLATE, digits_words(output, test_only="True"))
    assert summary(output) == before


def test_a_model_of_elsewhere_is_evaluated_whole_and_not_copied(scratch, tmp_path):
    output = tmp_path / "run"
    done(TEMPLATE, digits_words(output, pretrained=scratch / "model", test_only="True"))
    assert summary(output)["test_wer"] == summary(scratch)["test_wer"]
    assert not (output / "model").exists()


def test_a_pretraining_has_no_transcripts_to_score(pretraining, tmp_path):
    folder = pretraining / "model"
    for script, words in ((TEMPLATE, digits_words), (ASR, asr_words)):
        refused(script, words(tmp_path / "run", pretrained=folder, test_only="True"),
                f"{folder}: this is a model of kind 'wav2vec2_pretraining', which has no output layer to evaluate; "
                "give the model/ folder of a fine-tuning run (kind 'ctc'), or train one without --test_only."
                )  # fmt: skip
    assert not (tmp_path / "run" / "model").exists()


def test_the_output_folder_holds_one_run_and_pretrained_names_another(scratch, tuned, copied):
    output = copied(scratch)
    before = record(output), summary(output)
    refused(TEMPLATE, digits_words(output, pretrained=tuned / "model", test_only="True"),
            f"{output} holds a run of its own, and --pretrained names {tuned / 'model'}; leave out --pretrained to "
            "evaluate that run, or give another --output_folder to evaluate the pretrained model.")  # fmt: skip
    assert (record(output), summary(output)) == before


def test_the_model_folder_of_the_run_itself_is_no_other_run(scratch, copied):
    output = copied(scratch)
    before = summary(output)
    done(TEMPLATE, digits_words(output, pretrained=output / "model", test_only="True"))
    assert summary(output) == before


def test_damaged_checkpoints_are_not_replaced_by_what_the_run_began_with(tuned, scratch, copied):
    output = copied(tuned)
    before = summary(output)
    for weights in output.glob("save/*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    refused(TEMPLATE, digits_words(output, pretrained=scratch / "model", test_only="True"),
            f"none of the checkpoints in {output / 'save'} is sound; restore one from a copy, or give another "
            "--output_folder to evaluate the pretrained model alone.")  # fmt: skip
    assert summary(output) == before


def test_a_recognizer_is_no_pretraining(scratch, tmp_path):
    for script, words in ((SELF_SUPERVISED, self_supervised_words), (PRETRAINING, pretraining_words)):
        refused(script, words(tmp_path / "run", pretrained=scratch / "model"),
                f"{scratch / 'model'}: this is a model of kind 'ctc', expected 'wav2vec2_pretraining'; give the model/ "
                "folder of a run of that kind.")  # fmt: skip


# ---- what the pretrained model hears ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words"), [(SELF_SUPERVISED, self_supervised_words), (PRETRAINING, pretraining_words)]
)
def test_pretraining_goes_on_with_the_audio_that_the_model_knows(pretraining, tmp_path, script, words):
    output, folder = tmp_path / "run", pretraining / "model"
    sizes = {"model.final_dim": 128, "model.num_codes": 64, "model.num_groups": 2}
    keys = {} if script == SELF_SUPERVISED else sizes
    ended = done(script, words(output, pretrained=folder, sample_rate=16000, normalize=True, **keys))
    assert (f"audio: 8000 Hz, normalize False, as in {folder} (the settings sample_rate 16000, normalize True do not "
            "count)") in ended.stderr  # fmt: skip
    config = json.loads((output / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["sample_rate"], config["normalize"]) == (8000, False)


def test_seconds_of_audio_are_counted_at_the_rate_of_the_model(pretraining, tmp_path):
    for name, keys in (("own", {"sample_rate": 8000}), ("from_folder", {"pretrained": pretraining / "model"})):
        done(TEMPLATE, digits_words(tmp_path / name, **keys))
    assert summary(tmp_path / "from_folder")["audio_seconds"] == summary(tmp_path / "own")["audio_seconds"] > 0


# ---- found before the training ---------------------------------------------------------------------------------------


def test_which_weights_to_evaluate_is_checked_at_once(tmp_path):
    refused(TEMPLATE, digits_words(tmp_path / "run", evaluate="bset"),
            "the weights to evaluate are 'bset', expected one of best, last, average.")  # fmt: skip
    assert not (tmp_path / "run" / "save").exists()


@pytest.mark.parametrize(("script", "words"), [(ASR, asr_words), (PRETRAINING, pretraining_words)])
def test_a_missing_test_manifest_of_a_recipe_is_told_at_once(tmp_path, script, words):
    path = tmp_path / "nowhere.csv"
    refused(script, words(tmp_path / "run", test_splits=f"[{path}]"),
            f"the manifest {path} does not exist; check the path, or prepare the data first.")  # fmt: skip
    assert not (tmp_path / "run" / "save").exists()


def test_a_test_manifest_without_transcripts_is_told_at_once(tmp_path):
    path, output = without_transcripts(tmp_path), tmp_path / "run"
    for script, words in (
        (TEMPLATE, digits_words(output, test_manifest=path)), (ASR, asr_words(output, test_splits=f"[{path}]"))
    ):  # fmt: skip
        ended = run_here(script, words)
        assert ended.code == 2 and ended.error.startswith(f"{path} has no column 'wrd'; it has ")
        assert not (output / "save").exists()


def test_a_bad_test_file_leaves_the_summary_of_the_training(tmp_path):
    def change(rows: list[dict[str, str]]) -> None:
        rows[0].update(wav=str(ODD_AUDIO / "empty_file.wav"))

    path, output = write_rows(tmp_path / "bad.csv", digits(change)), tmp_path / "run"
    assert run_here(TEMPLATE, digits_words(output, test_manifest=path)).code == 2
    left = summary(output)
    assert left["updates"] == 2 and "test_wer" not in left
    done(TEMPLATE, digits_words(output))
    assert summary(output)["test_wer"] > 0


# ---- what stays the run's --------------------------------------------------------------------------------------------


def test_an_evaluation_leaves_the_record_of_the_run(scratch, copied):
    output = copied(scratch)
    (output / "env.log").write_text("another machine\n")
    before = record(output)
    done(TEMPLATE, digits_words(output, test_only="True", batch_seconds=3))
    assert record(output) == before


def test_a_run_that_is_refused_leaves_the_record_of_the_one_that_is_there(scratch, copied):
    output = copied(scratch)
    before = record(output)
    assert run_here(SELF_SUPERVISED, self_supervised_words(output)).code == 2
    assert run_here(TEMPLATE, digits_words(output, max_updates=4, **{"encoder_sizes.dim": 32})).code == 2
    assert record(output) == before


def test_a_run_that_goes_on_records_what_it_goes_on_with(scratch, copied):
    output = copied(scratch)
    done(TEMPLATE, digits_words(output, max_updates=3))
    assert "max_updates: 3" in (output / "hyperparams.yaml").read_text(encoding="utf-8")


def test_debug_overwrites_no_run_whose_checkpoints_were_deleted(scratch, copied):
    output = copied(scratch)
    shutil.rmtree(output / "save")
    before = summary(output)
    refused(TEMPLATE, [*digits_words(output), "--debug"],
            f"{output} holds a run, which --debug would overwrite; give the debug run another --output_folder."
            )  # fmt: skip
    assert summary(output) == before and (output / "model" / "model.safetensors").exists()


# ---- what an evaluation needs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "words"), [(ASR, asr_words), (PRETRAINING, pretraining_words)])
def test_an_evaluation_needs_nothing_of_the_training_corpus(tmp_path, script, words):
    output, corpus = tmp_path / "run", tmp_path / "corpus"
    keys = {"test_splits": "[dev-clean]"}
    done(script, words(output, **keys))
    before = scores(output)
    shutil.copytree(FIXTURES / "librispeech_tiny" / "dev-clean", corpus / "dev-clean")
    shutil.rmtree(output / "manifests")
    keys |= {"data_folder": corpus, "valid_splits": "[train-clean-100]", "preset": "eval"}
    done(script, words(output, **keys))
    assert scores(output) == before
    elsewhere = tmp_path / "elsewhere"
    done(script, words(elsewhere, pretrained=output / "model", **keys))
    # A model folder does not say after which update it was written.
    begun = {"test_temperature": 2.0} if "test_temperature" in before else {}
    assert scores(elsewhere) == before | begun
