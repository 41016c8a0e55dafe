"""What people give a training script by mistake, or strangers on purpose: one sentence, an exit code, nothing lost."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile

from tests.faults.real_runs import (
    ASR,
    DIGITS,
    FIXTURES,
    ODD_AUDIO,
    PRETRAINING,
    ROOT,
    TEMPLATE,
    Ended,
    asr_words,
    contents,
    digits,
    digits_words,
    pretraining_words,
    run_here,
    run_script,
    write_rows,
)
from toolkit.models.model_files import KINDS

YAML = TEMPLATE.with_name("train.yaml")


def line_of(key: str) -> int:
    """Where a key stands in the template's YAML."""
    lines = YAML.read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, start=1) if line.strip().startswith(f"{key}:"))


def refused(script: Path, words: list[str], sentence: str) -> Ended:
    """The run ends with exit code 2, and the sentence is the last thing it says."""
    ended = run_here(script, words)
    assert ended.code == 2 and "Traceback" not in ended.stderr, ended.stderr[-3000:]
    assert ended.error == sentence
    return ended


def first_row(**changes: Any) -> Callable[[list[dict[str, str]]], None]:
    """A change of the first row of the training manifest."""
    return lambda rows: rows[0].update({name: str(value) for name, value in changes.items()})


@pytest.fixture
def manifest(tmp_path) -> Callable[..., Path]:
    """Writes the digits' training manifest with a changed first row."""
    return lambda **changes: write_rows(tmp_path / "changed.csv", digits(first_row(**changes)))


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 2 updates with a checkpoint after each, made once; tests take copies."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ended = run_here(TEMPLATE, digits_words(folder, ckpt_interval_updates=1))
    assert ended.code == 0, ended.stderr
    return folder


@pytest.fixture
def begun(finished, output) -> Path:
    """A copy of the finished run in this test's folder."""
    shutil.copytree(finished, output)
    return output


# ---- missing files and folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["train_manifest", "valid_manifest", "test_manifest"])
def test_a_missing_manifest(output, tmp_path, key):
    path = tmp_path / "nowhere.csv"
    refused(TEMPLATE, digits_words(output, **{key: path}), f"the manifest {path} does not exist; check the path, or "
            "prepare the data first.")  # fmt: skip


def test_a_missing_file_by_the_command_itself(output, tmp_path):
    path = tmp_path / "nowhere.csv"
    ended = run_script(TEMPLATE, digits_words(output, train_manifest=path))
    assert ended.code == 2 and "Traceback" not in ended.stderr
    sentence = f"error: the manifest {path} does not exist; check the path, or prepare the data first."
    assert ended.stderr.splitlines()[-1] == sentence


def test_a_missing_corpus_a_corpus_without_speech_and_a_missing_split(output, tmp_path):
    where = tmp_path / "nowhere"
    refused(ASR, asr_words(output, data_folder=where),
            f"data_folder '{where}' does not exist; give the folder that holds dev-clean/ etc.")  # fmt: skip
    where.mkdir()
    refused(PRETRAINING, pretraining_words(output, data_folder=where),
            f"data_folder '{where}' holds none of train-clean-100, train-clean-360, train-other-500, dev-clean, "
            "dev-other, test-clean, test-other; give the folder that LibriSpeech's archives unpack to "
            "(SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac).")  # fmt: skip
    refused(ASR, asr_words(output, train_splits="[train-clean-360]"),
            f"train-clean-360: not in '{FIXTURES / 'librispeech_tiny'}', which holds dev-clean, train-clean-100; "
            "subsets are train-10min, train-1h, train-10h, train-100h, train-960h.")  # fmt: skip


def test_nothing_to_train_on(output):
    for script, words in ((ASR, asr_words), (PRETRAINING, pretraining_words)):
        refused(script, words(output, train_splits="[]"),
                "train_splits is empty; name at least one split or manifest to train on.")  # fmt: skip
    refused(TEMPLATE, digits_words(output, train_splits="[]"),
            "train_splits is empty; name at least one manifest to train on.")  # fmt: skip


def test_a_missing_yaml(tmp_path):
    path = tmp_path / "train.yaml"
    refused(TEMPLATE, [str(path)], f"the YAML file {path} does not exist; check the path.")
    refused(TEMPLATE, [], "no YAML file was given; write `python train.py hparams/NAME.yaml --key value ...`.")


def test_a_yaml_that_lacks_a_key_of_the_script(tmp_path, output):
    words = digits_words(output)
    words[0] = str(tmp_path / "mine.yaml")
    text = YAML.read_text(encoding="utf-8")
    Path(words[0]).write_text("\n".join(line for line in text.splitlines() if not line.startswith("freeze_updates")))
    refused(TEMPLATE, words, f"{words[0]} has no key 'freeze_updates', which the script asks for; add it to the file.")


# ---- audio -----------------------------------------------------------------------------------------------------------

BAD_AUDIO = {
    "empty_file.wav": (1.0, "is empty (0 bytes); copy or download the file again."),
    "text_renamed.flac": (1.0, "is not an audio file that can be read (WAV, FLAC, Ogg, Opus, MP3); convert it or copy "
                               "it again."),
    "zero_samples.wav": (1.0, "holds no samples; remove it from the manifest or record it again."),
    "one_sample.wav": (1.0, "lasts 0.00 s where the manifest says 1.00 s; prepare the manifest again."),
    "missing.wav": (1.0, "does not exist; check the paths in the manifest and the data folder."),
}  # fmt: skip


@pytest.mark.parametrize(("name", "workers"), [*((name, 0) for name in BAD_AUDIO), ("empty_file.wav", 2)])
def test_audio_that_cannot_be_used(output, manifest, name, workers):
    duration, words = BAD_AUDIO[name]
    path = manifest(wav=ODD_AUDIO / name, duration=duration)
    sentence = f"{ODD_AUDIO / name} {words}"
    keys = {"train_manifest": path, "max_updates": 4, "num_workers": workers}
    refused(TEMPLATE, digits_words(output, **keys),
            "1 of 50 utterances have bad audio, more than max_bad_share 0.01 allows; mend the files or raise "
            "max_bad_share to go on, or remove them from the manifest and take another output_folder. "
            f"utterance 0_jackson_5: {sentence}")  # fmt: skip
    tolerated = run_here(TEMPLATE, digits_words(output, **keys, max_bad_share=0.02))
    assert tolerated.code == 0
    assert tolerated.stderr.splitlines().count(f"left out 0_jackson_5: {sentence}") == 1


def test_audio_that_ends_early(output, manifest):
    path, header = ODD_AUDIO / "truncated.flac", soundfile.info(str(ODD_AUDIO / "truncated.flac"))
    ended = run_here(TEMPLATE, digits_words(output, train_manifest=manifest(wav=path, duration=header.duration),
                                            max_updates=4))  # fmt: skip
    assert ended.code == 2 and f" utterance 0_jackson_5: {path} is truncated or corrupt: it " in ended.error
    assert ended.error.endswith("; copy or download the file again.")


def test_every_utterance_is_bad(output, tmp_path):
    path = write_rows(tmp_path / "all.csv", digits(lambda rows: [row.update(wav="/nowhere.wav") for row in rows]))
    ended = run_here(TEMPLATE, digits_words(output, train_manifest=path))
    assert ended.code == 2 and "Traceback" not in ended.stderr
    assert re.match(r"\d+ of 50 utterances have bad audio, more than max_bad_share 0.01 allows; ", ended.error)
    # a few are quoted, not fifty
    assert ended.error.count("/nowhere.wav does not exist") == 5 and re.search(r" \(and \d+ more\)$", ended.error)


@pytest.mark.parametrize("name", ["mono_8000.mp3", "mono_8000_ulaw.wav", "stereo_44100.wav"])
def test_another_rate_and_two_channels_are_no_mistakes(output, tmp_path, name):
    changed = first_row(wav=ODD_AUDIO / name, duration=soundfile.info(str(ODD_AUDIO / name)).duration)
    # few others, so that the odd one is in every epoch's first updates
    path = write_rows(tmp_path / "few.csv", digits(changed)[:3])
    ended = run_here(TEMPLATE, digits_words(output, train_manifest=path, max_bad_share=0, max_updates=3))
    assert ended.code == 0 and "left out" not in ended.stderr, ended.stderr
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] > 0 for row in rows if row["stage"] == "train"] == [True, True]


def test_a_bad_file_in_the_validation_costs_nothing_of_the_training(output, manifest, tmp_path):
    rows = sorted(digits()[:12], key=lambda row: float(row["duration"]))
    # not in the one batch that is looked at before the training: that takes the longest
    rows[0]["wav"] = "/nowhere/last.flac"
    path = write_rows(tmp_path / "valid.csv", rows)
    keys = {"valid_manifest": path, "batch_seconds": 3, "effective_batch": 6, "max_updates": 3,
            "valid_interval_updates": 50}  # fmt: skip
    sentence = (
        "1 of 12 utterances have bad audio, more than max_bad_share 0.01 allows; mend the files or raise max_bad_share "
        "to go on, or remove them from the manifest and take another output_folder. "
        f"utterance {rows[0]['ID']}: /nowhere/last.flac does not exist; check the "
        "paths in the manifest and the data folder."
    )
    ended = run_here(TEMPLATE, digits_words(output, **keys))
    assert (ended.code, ended.error) == (2, sentence)
    assert [path.name for path in (output / "save").iterdir()] == ["step_00000003"]
    mended = run_here(TEMPLATE, digits_words(output, **keys, max_bad_share=0.5))
    assert mended.code == 0 and "valid at update 3" in mended.stderr


def test_of_two_processes_one_alone_meets_the_bad_file(output, manifest, tmp_path):
    rows = sorted(digits()[:12], key=lambda row: float(row["duration"]))
    rows[0]["wav"] = "/nowhere/last.flac"
    path = write_rows(tmp_path / "valid.csv", rows)
    words = digits_words(output, valid_manifest=path, batch_seconds=1.5, effective_batch=6, max_updates=3,
                         valid_interval_updates=50)  # fmt: skip
    ended = run_script(TEMPLATE, words, processes=2)
    assert ended.code != 0, ended.stderr
    assert f"utterance {rows[0]['ID']}: /nowhere/last.flac does not exist" in ended.stderr
    assert [path.name for path in (output / "save").iterdir()] == ["step_00000003"]


# ---- transcripts -----------------------------------------------------------------------------------------------------


def test_a_transcript_too_long_for_its_audio_is_told(output, manifest):
    path = manifest(wrd="ZERO " * 100)
    ended = run_here(TEMPLATE, digits_words(output, train_manifest=path))
    assert ended.code == 0
    assert (
        "warning: " in ended.stderr and "1 of 50 utterances has more tokens than the model has frames for "
        "(0_jackson_5), which CTC cannot spell: nothing is learned from them;" in ended.stderr
    )  # fmt: skip


def test_an_empty_transcript_counts_as_silence_and_is_told(output, manifest):
    path = manifest(wrd="")
    ended = run_here(TEMPLATE, digits_words(output, train_manifest=path))
    assert ended.code == 0
    assert (
        f"warning: {path}: 1 of 50 utterances has an empty transcript (0_jackson_5) and counts as silence; complete "
        "the row if words are spoken."
    ) in ended.stderr.splitlines()


def test_no_transcript_at_all(output, tmp_path):
    path = write_rows(tmp_path / "none.csv", digits(lambda rows: [row.update(wrd=" ") for row in rows]))
    refused(TEMPLATE, digits_words(output, train_manifest=path),
            "there are no letters in the transcripts; check the column 'wrd' of the training manifest.")  # fmt: skip
    write_rows(path, digits(lambda rows: [row.pop("wrd") for row in rows]))
    refused(TEMPLATE, digits_words(output, train_manifest=path),
            f"{path} has no column 'wrd'; it has ID, duration, wav, spk_id: add the column, or correct its name in the "
            "header.")  # fmt: skip


def test_a_character_that_is_not_in_the_vocabulary(output, manifest):
    path = manifest(wrd="ZÉRO")
    sentence = (
        "utterance 0_jackson_5: the transcript 'ZÉRO' holds the character 'É' (U+00C9, LATIN CAPITAL LETTER E WITH "
        "ACUTE), which is not among the tokenizer's 16 symbols; build the tokens from all training transcripts, set "
        "case to 'upper' or 'lower' where only the case differs, or set unknown to 'drop' or 'unk'."
    )
    keys = {"valid_manifest": path, "max_updates": 3}
    refused(TEMPLATE, digits_words(output, **keys, **{"tokenizer.unknown": "error"}), sentence)
    counted = run_here(TEMPLATE, digits_words(output, **keys))
    assert counted.code == 0, counted.stderr


# ---- keys and values -------------------------------------------------------------------------------------------------

WRONG_KEYS = {
    "max_update=4": f"{YAML} has no key 'max_update', and no run option has that name; did you mean --max_updates?",
    "encoder_sizes.num_layer=4": f"{YAML}: 'encoder_sizes' has no key 'num_layer'; did you mean "
                                 "--encoder_sizes.num_layers?",
    "opt_class.beta=[0, 1]": f"{YAML}: 'opt_class' has no key 'beta'; did you mean --opt_class.betas?",
    "max_updates=many": "--max_updates must be a whole number or null, but is the text 'many'.",
    "max_updates=-3": "--max_updates must be 0 or more, but is -3.",
    "precision=int8": "--precision must be one of auto, fp32, bf16, fp16, but is the text 'int8'.",
    "encoder_sizes.dim=wide": f"--encoder_sizes.dim must be a number, but is the text 'wide' ({YAML}, line "
                              f"{line_of('dim')}, key 'encoder_sizes.dim').",
    "encoder_sizes.dim=16.5": "encoder_sizes.dim must be a whole number, but is 16.5.",
    "encoder_sizes.dim=-16": "encoder_sizes and encoder_training: no Wav2Vec2Encoder with these settings: Trying to "
                             "create tensor with negative dimension -16: [-16, 16] (RuntimeError).",
    "encoder_sizes.num_heads=3": "the transformer's dim 16 is no multiple of its num_heads 3.",
    "encoder_training.dropout=null": "--encoder_training.dropout must be a number, but is null "
                                     f"({YAML}, line {line_of('dropout')}, key 'encoder_training.dropout').",
    "lr=fast": f"--lr must be a number, but is the text 'fast' ({YAML}, line {line_of('lr')}, key 'lr').",
    "lr=-1": "opt_class: AdamW cannot be made with these settings (Invalid learning rate: -1.0); correct them.",
    "batch_seconds=null": f"--batch_seconds must be a number, but is null ({YAML}, line {line_of('batch_seconds')}, "
                          "key 'batch_seconds').",
    "batch_seconds=0": "batch_seconds is 0.0, expected a number greater than 0.",
    "num_buckets=few": "num_buckets is 'few', expected a number greater than 0.",
    "train_splits=null": f"--train_splits must be a list such as [a, b], but is null ({YAML}, line "
                         f"{line_of('train_splits')}, key 'train_splits').",
    "max_grad_norm=0": "--max_grad_norm must be above 0, but is 0.0; write null to switch it off.",
    "pretrained=7": "7: there is no such file or folder; check the path.",
}  # fmt: skip


@pytest.mark.parametrize("word", WRONG_KEYS)
def test_unknown_keys_and_values_of_a_wrong_type(output, word):
    # the key given last counts
    refused(TEMPLATE, [*digits_words(output), f"--{word}"], WRONG_KEYS[word])
    assert not (output / "save").exists() and not (output / "model").exists()


def test_a_key_that_holds_nothing_gets_a_wrong_type(output):
    refused(PRETRAINING, pretraining_words(output, max_duration="long"),
            "max_duration is 'long', expected seconds, or null for no limit.")  # fmt: skip


def test_several_mistakes_are_told_together(output):
    refused(TEMPLATE, [*digits_words(output), "--max_update=4", "--encoder_sizes.num_layer=4"],
            f"2 values cannot be set:\n  {WRONG_KEYS['max_update=4']}\n  {WRONG_KEYS['encoder_sizes.num_layer=4']}"
            )  # fmt: skip


def test_a_wrong_type_in_a_yaml_of_ones_own(tmp_path, output):
    words = [word for word in digits_words(output) if not word.startswith("--encoder_sizes")]
    words[0] = str(tmp_path / "mine.yaml")
    text = YAML.read_text(encoding="utf-8")
    assert "  num_layers: 4\n" in text
    Path(words[0]).write_text(text.replace("  num_layers: 4\n", "  num_layers: four\n"), encoding="utf-8")
    refused(TEMPLATE, words, "encoder_sizes.num_layers must be a whole number, but is the text 'four'.")


def test_missing_placeholders_are_all_listed_with_their_meaning(output, tmp_path):
    refused(TEMPLATE, digits_words(output, train_manifest=None),
            f"{YAML} needs a value that only you know; add to the command line:\n"
            "  --train_manifest VALUE    Manifest of the training recordings: CSV with ID, duration (seconds), wav "
            "(path) and wrd (transcript), or JSON, JSONL, fairseq tsv. Several: "
            "--train_manifest a.csv --train_splits \"[a.csv, b.csv]\"."
            )  # fmt: skip
    words = digits_words(output, train_manifest=None)
    words[0] = str(tmp_path / "mine.yaml")
    text = YAML.read_text(encoding="utf-8").replace("valid_manifest: null", "valid_manifest: !PLACEHOLDER")
    Path(words[0]).write_text(text, encoding="utf-8")
    ended = run_here(TEMPLATE, [word for word in words if not word.startswith("--valid_manifest")])
    listed = [line.split()[0] for line in ended.error.splitlines()[1:]]
    assert ended.code == 2 and listed == ["--train_manifest", "--valid_manifest"]
    assert ended.error.startswith(f"{words[0]} needs 2 values that only you know; add to the command line:\n")


# ---- devices and places ----------------------------------------------------------------------------------------------


def test_an_accelerator_that_is_not_there(output):
    for device in ("npu", "npu:1"):
        ended = run_here(TEMPLATE, digits_words(output, device=device))
        assert ended.code == 2 and "Traceback" not in ended.stderr
        assert ended.error.startswith(f"--device {device}: there is none here, because torch_npu cannot be imported (")
        assert "; npu needs Ascend CANN, then pip install " in ended.error
    refused(TEMPLATE, digits_words(output, device="tpu9"),
            "--device 'tpu9' is no device known here; choose auto or one of cpu, cuda, npu, hpu, xpu, mps."
            )  # fmt: skip
    assert not output.exists()


def test_no_gpu_where_one_is_named(output):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    ended = run_here(TEMPLATE, digits_words(output, device="cuda:1"))
    assert ended.code == 2 and ended.error == (
        f"--device cuda:1: there is none here, because torch {torch.__version__} finds no such device; here are: cpu; "
        "cuda needs an NVIDIA driver and a CUDA build of torch, or an AMD driver and a ROCm build: see pytorch.org."
    )


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(TEMPLATE, digits_words(place),
                f"--output_folder {place} lies at or under a file, not a folder; choose another name.")  # fmt: skip
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can write")
def test_an_output_folder_without_the_right_to_write(tmp_path):
    refused(TEMPLATE, digits_words(Path("/proc/run")), "--output_folder /proc/run cannot be made there; choose "
            "another folder.")  # fmt: skip
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        refused(TEMPLATE, digits_words(tmp_path / "run"),
                f"--output_folder {tmp_path / 'run'} cannot be written: no permission to use '{tmp_path / 'run'}': "
                "Permission denied; choose another folder or change its rights.")  # fmt: skip


def checkpoints(folder: Path) -> dict[str, bytes]:
    return contents(folder / "save")


def test_files_that_may_grow_no_further_leave_the_run_as_it_was(begun):
    before, soft = checkpoints(begun), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, soft[1]))  # less than the weights take
    try:
        ended = run_here(TEMPLATE, digits_words(begun, ckpt_interval_updates=1, max_updates=4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    place = begun / "save" / "step_00000003"
    assert ended.code == 2 and ended.error == (
        f"the checkpoint {place} could not be written (step_00000001, step_00000002 remain valid): the operating "
        f"system refused to use '{begun / 'save' / '.step_00000003.new' / 'model.safetensors'}': File too large."
    )
    assert checkpoints(begun) == before
    assert run_here(TEMPLATE, digits_words(begun, ckpt_interval_updates=1, max_updates=4)).code == 0


# A disk of one megabyte, seen by this process only: a run of 2 updates, then the disk is filled, then room is made.
FULL_DISK = """
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.faults.real_runs import TEMPLATE, contents, digits_words, run_here
disk = Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
def run(**keys):
    return run_here(TEMPLATE, digits_words(disk / "run", ckpt_interval_updates=1, **keys))
assert run().code == 0
before = contents(disk / "run" / "save")
with open(disk / "filler", "wb", buffering=0) as filler:
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write(bytes(free - 80_000))
ended = run(max_updates=4)
print(ended.code, ended.error)
assert "Traceback" not in ended.stderr, ended.stderr
assert contents(disk / "run" / "save") == before
(disk / "filler").unlink()
assert run(max_updates=4).code == 0
print("resumed")
"""


def test_a_full_disk_costs_nothing_that_was_saved(tmp_path):
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = [*alone, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no disk of its own can be mounted here")
    done = subprocess.run([*alone, sys.executable, "-c", FULL_DISK, str(ROOT), str(tmp_path)],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    place = tmp_path / "run" / "save"
    said, resumed = done.stdout.strip().rsplit("\n", 1)
    assert resumed == "resumed" and said.startswith(
        f"2 the checkpoint {place / 'step_00000003'} could not be written (step_00000001, step_00000002 remain valid): "
        "no space left on the device while writing '"
    )
    assert said.endswith("'; free some space and run the same command again.")


# ---- checkpoints and data that changed -------------------------------------------------------------------------------


def test_a_manifest_that_changed_between_two_parts_of_a_run(begun, manifest):
    before = checkpoints(begun)
    for change, words in (
        ({"wrd": "SEVEN"}, "1 row changed (first '0_jackson_5') of 50 before"),
        ({"duration": 0.58}, "1 row changed (first '0_jackson_5') of 50 before"),
        ({"ID": "new"}, "1 row added (first 'new'), 1 removed (first '0_jackson_5') of 50 before"),
    ):
        refused(TEMPLATE, digits_words(begun, train_manifest=manifest(**change), max_updates=4),
                f"the data changed since the checkpoint {begun / 'save' / 'step_00000002'}: train ({words}); its place "
                "in the epoch means other data now. Restore the former data to go on with this run, or give "
                "another --output_folder to begin one on the new data.")  # fmt: skip
        assert checkpoints(begun) == before
    # the same recordings in another folder are the same data
    assert run_here(TEMPLATE, digits_words(begun, train_manifest=manifest(), max_updates=4)).code == 0


def test_a_validation_set_that_changed_is_told(begun, manifest):
    words = "The validation set has changed since the checkpoint step_00000002: "
    for path, times in ((DIGITS / "test.csv", 0), (manifest(), 1)):
        ended = run_here(TEMPLATE, digits_words(begun, valid_manifest=path, max_updates=3))
        assert ended.code == 0 and ended.stderr.count(words) == times, ended.stderr[-3000:]
        for place in (begun / "save").glob("step_00000003"):
            shutil.rmtree(place)


def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(begun):
    place = begun / "save" / "step_00000002"
    weights = place / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[: size // 2])
    ended = run_here(TEMPLATE, digits_words(begun, ckpt_interval_updates=1))
    assert ended.code == 0
    said = ended.stderr.splitlines()
    words = f"its model.safetensors has {size // 2} bytes instead of {size}."
    assert f"The folder {place} is passed over: {words}" in said
    assert "resumed at update 1 (epoch 0.3333)." in said
    assert weights.stat().st_size == size


def test_checkpoints_all_of_which_are_damaged(begun):
    for folder in (begun / "save").iterdir():
        data = bytearray((folder / "optimizer.safetensors").read_bytes())
        data[-5] ^= 1
        (folder / "optimizer.safetensors").write_bytes(data)
    before = checkpoints(begun)
    ended = refused(TEMPLATE, digits_words(begun, max_updates=4),
                    f"none of the checkpoints in {begun / 'save'} is sound (step_00000001, step_00000002); restore one "
                    "from a copy, or delete the folder to begin anew.")  # fmt: skip
    assert (
        f"The checkpoint {begun / 'save' / 'step_00000002'} is not used: the checksum of its optimizer.safetensors is "
        "wrong: the file was changed or the disk damaged it; take another, or a copy of it."
    ) in ended.stderr.splitlines()
    assert checkpoints(begun) == before
    refused(TEMPLATE, digits_words(begun, test_only="True"),
            f"there is nothing to evaluate: {begun / 'save'} holds no sound checkpoint and no pretrained model was "
            "given; train first, or name the folder of a run with --output_folder.")  # fmt: skip


def test_a_checkpoint_of_another_model_or_another_program(begun, tmp_path):
    before = checkpoints(begun)
    ended = run_here(TEMPLATE, digits_words(begun, max_updates=4, **{"encoder_sizes.dim": 32}))
    assert ended.code == 2 and checkpoints(begun) == before
    assert ended.error.startswith(
        f"{begun / 'save' / 'step_00000002' / 'model.safetensors'} does not fit the model: 2 of 42 tensors are missing "
        "(model.encoder.projection.bias, model.encoder.projection.weight), 0 are not known (none), 28 have another "
    )
    assert ended.error.endswith("; use the architecture that the run began with.")
    foreign = tmp_path / "foreign" / "save" / "step_00000009"
    foreign.mkdir(parents=True)
    (foreign / "CKPT.yaml").write_text("end-of-epoch: true\n")
    fresh = run_here(TEMPLATE, digits_words(tmp_path / "foreign"))
    assert fresh.code == 0 and (foreign / "CKPT.yaml").exists()
    words = "it has no checksums.json, so it was never finished."
    assert f"The folder {foreign} is passed over: {words}" in fresh.stderr.splitlines()


def test_a_folder_with_files_of_ones_own_is_not_replaced(output):
    (output / "model").mkdir(parents=True)
    (output / "model" / "thesis.txt").write_text("mine")
    refused(TEMPLATE, digits_words(output), f"{output / 'model'}: the folder holds other files, which saving a model "
            "would delete; give an empty or new folder.")  # fmt: skip
    assert (output / "model" / "thesis.txt").read_text() == "mine"
    assert (output / "save" / "step_00000002").is_dir()


# ---- from strangers --------------------------------------------------------------------------------------------------


class Opened:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def truncate(folder: Path, mark: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])


def pickled(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Opened(mark)))


def only_pickled(folder: Path, mark: Path) -> None:
    pickled(folder, mark)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def configured(**changes: Any) -> Callable[[Path, Path], None]:
    def change(folder: Path, mark: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def written(name: str, text: str) -> Callable[[Path, Path], None]:
    return lambda folder, mark: (folder / name).write_text(text) and None


FOREIGN_MODELS = {
    "truncated": (truncate, "{}/model.safetensors: the file is truncated or no safetensors file (Error while "
                  "deserializing header: invalid header length); copy the folder again."),
    "pickle": (pickled, "{}/model.safetensors: the file is truncated or no safetensors file (Error while deserializing "
               "header: header too large); copy the folder again."),
    "pickle of torch": (only_pickled, "{}: model.safetensors is missing; give the model/ folder of a finished run."),
    "outside": (configured(tokens={"kind": "letters", "file": "../../secret.txt"}),
                "{}/config.json: the tokens' file '../../secret.txt' is not a plain file name in the folder; give the "
                "model/ folder of a run of this toolkit."),
    "absolute": (configured(tokens={"kind": "letters", "file": "/etc/hostname"}),
                 "{}/config.json: the tokens' file '/etc/hostname' is not a plain file name in the folder; give the "
                 "model/ folder of a run of this toolkit."),
    "of transformers": (written("config.json", '{"model_type": "bert"}'),
                        "{}/config.json: the model type 'bert' is not among the models of this toolkit; it reads "
                        "wav2vec2, data2vec-audio and data2vec-text: base models, Wav2Vec2ForPreTraining, and CTC "
                        "heads."),
    "code as kind": (configured(kind="os.system"),
                     "{}/config.json: the kind is 'os.system', known are " + ", ".join(KINDS) + "; give the model/ "
                     "folder of a run of this toolkit."),
    "code as setting": (configured(architecture={"encoder": {"_target_": "os.system"}}),
                        "{}: there is the setting '_target_' for the encoder, which this version cannot build."),
    "no number": (configured(architecture={"encoder": {"conv_layers": "x"}}),
                  "{}: its settings make no model of kind 'ctc' (invalid literal for int() with base 10: "
                  "'x'); was the folder written by another version?"),
    "half a config": (written("config.json", '{"kind": '),
                      "{}/config.json: this is no whole JSON file (Expecting value: line 1 column 10 (char 9)); copy "
                      "the folder again."),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN_MODELS)
def test_a_model_folder_of_a_stranger_runs_nothing(finished, output, tmp_path, name):
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(finished / "model", folder)
    change, sentence = FOREIGN_MODELS[name]
    change(folder, mark)
    for test_only in ("False", "True"):
        if name == "no number" and test_only == "True":
            continue
        refused(TEMPLATE, digits_words(output, pretrained=folder, test_only=test_only), sentence.format(folder))
    assert not mark.exists() and not (output / "model").exists()


def test_tokens_of_a_stranger(finished, output, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished / "model", folder)
    path = folder / "dict.ltr.txt"
    for text, sentence in (
        (b"\x80\x04\x95", f"{path} is not UTF-8 text (byte 0); save it as UTF-8."),
        (b"root:x:0:0:root\n", f"{path}, line 1: 'root:x:0:0:root' is not a symbol, a space and a count; correct the "
                               "line."),
    ):  # fmt: skip
        path.write_bytes(text)
        refused(TEMPLATE, digits_words(output, pretrained=folder, test_only="True"), sentence)


CODE = ["!apply:os.mkdir [{}]", "!!python/object/apply:os.mkdir ['{}']", "[!!python/object/apply:os.mkdir ['{}']]",
        "{{a: !new:subprocess.Popen [[mkdir, {}]]}}"]  # fmt: skip


@pytest.mark.parametrize("code", CODE)
def test_no_tag_on_the_command_line_runs(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    mark = "ran"
    for key in ("lr", "seed", "encoder_sizes", "encoder_sizes.dim", "opt_class", "tokenizer", "train_splits",
                "pretrained", "train_manifest"):  # fmt: skip
        ended = run_here(TEMPLATE, [*digits_words(tmp_path / "run"), f"--{key}={code.format(mark)}"])
        assert ended.code == 2 and "Traceback" not in ended.stderr, (key, ended.stderr)
        assert ended.error, key
        assert not (tmp_path / mark).exists(), key


def test_a_manifest_of_a_stranger_runs_nothing_and_shows_nothing(output, manifest, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("TOP SECRET")
    above = os.path.relpath(secret, tmp_path)
    # a folder for each run: one that ends for bad audio leaves a checkpoint, which another manifest may not go on from
    for number, (wav, place) in enumerate((
        (f"../{tmp_path.name}/{above}", secret),
        (f"touch {tmp_path}/ran |", tmp_path / f"touch {tmp_path}/ran |"),
        ("http://127.0.0.1/a.wav", tmp_path / "http:/127.0.0.1/a.wav"),
    )):  # fmt: skip
        folder = tmp_path / f"run{number}"
        ended = run_here(TEMPLATE, digits_words(folder, train_manifest=manifest(wav=wav), max_updates=4))
        assert ended.code == 2 and f" utterance 0_jackson_5: {place} " in ended.error
        assert "TOP SECRET" not in ended.stderr
    assert not (tmp_path / "ran").exists()
    # an ID is a name, not a path
    assert run_here(TEMPLATE, digits_words(output, train_manifest=manifest(ID="../../../above"))).code == 0
    assert not list(tmp_path.rglob("above*"))
    path = manifest(wav="$data_root/a.flac")
    refused(TEMPLATE, digits_words(output, train_manifest=path),
            f"{path}, line 2: the path '$data_root/a.flac' begins with the placeholder data_root, for which nothing "
            "was given; give the folder that it stands for (replacements, or data_root in the YAML).")  # fmt: skip
    foreign = tmp_path / "rows.csv"
    foreign.write_bytes(pickle.dumps(Opened(tmp_path / "ran")))
    refused(TEMPLATE, digits_words(output, train_manifest=foreign),
            f"{foreign}, line 1: the text is not UTF-8; save the file as UTF-8.")  # fmt: skip
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", ["-1", "0", "1.0"])
def test_a_share_for_validation_that_is_none(output, share):
    words = digits_words(output, valid_manifest="null", valid_share=share)
    refused(TEMPLATE, words, f"valid_share is {float(share)}; expected a share above 0 and below 1.")


def test_one_recording_is_too_few_to_hold_some_out(output, tmp_path):
    path = write_rows(tmp_path / "one.csv", digits()[:1])
    refused(TEMPLATE, digits_words(output, train_manifest=path, valid_manifest="null"),
            f"{path} has one utterance, too few to hold some out; give --valid_manifest.")  # fmt: skip
