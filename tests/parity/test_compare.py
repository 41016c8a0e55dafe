"""compare.py by its real command on all recordings, and that it fails where it should."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.compare import BF16, main
from tests.parity.recording import RecordingError, Tolerance, read_recording

HERE = Path(__file__).parent
FIXTURES = HERE.parents[0] / "fixtures" / "fairseq_models"
CASES = (
    "w2v2_pretrain_groupnorm", "w2v2_pretrain_layernorm", "w2v2_ctc_from_groupnorm", "w2v2_ctc_from_data2vec",
    "data2vec_audio", "data2vec_text",
)  # fmt: skip
ROW = re.compile(r"^  (\S+) +(\S+e\S+|inf|nan)? +(\S+e\S+|inf|nan)? +(.*?)  (ok|went in)$")
RECOMMENDED = {"activation": 1e-4, "logits": 2e-4, "loss": 1e-5, "gradient": 1e-3, "ema": 1e-6,
               "schedule": 1e-12}  # fmt: skip
"""The limits that the recordings' README gives for another machine; see ABSOLUTE."""
ABSOLUTE = ("activation", "logits", "ema")
"""The others are relative."""


def command(*arguments):
    """(exit code, standard output, standard error) of the real command."""
    run = [sys.executable, str(HERE / "compare.py"), *map(str, arguments)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=HERE, timeout=600)
    return done.returncode, done.stdout, done.stderr


def what(name):
    """Which of the recommended limits is a name's."""
    if name.startswith("grad") or "grad_norms" in name:
        return "gradient"
    if any(word in name for word in ("logits", "log_probs", "encoder_out")):
        return "logits"
    if name.startswith("ema"):
        return "ema"
    if "decay" in name:
        return "schedule"
    is_loss = name.startswith(("scalars", "float64", "out.total_loss")) or name.endswith("out.loss")
    return "loss" if is_loss else "activation"


def rows_by_folder(text):
    """Folder name to {recorded name: (absolute, relative or None)}, of the rows that are well."""
    found, folder = {}, None
    for line in text.splitlines():
        if line.startswith("/"):
            folder = found.setdefault(Path(line.split(":")[0]).name, {})
        elif match := ROW.match(line):
            numbers = [None if value is None else float(value) for value in match.groups()[1:3]]
            folder[match[1]] = tuple(numbers)
    return found


def test_everything_recorded_is_near_by_the_real_command():
    code, text, errors = command(*(FIXTURES / case for case in CASES))
    assert code == 0, text[-3000:] + errors
    assert "OUTSIDE" not in text and "NOT COMPARED" not in text
    found = rows_by_folder(text)
    for case in CASES:
        recording = read_recording(FIXTURES / case)
        names = {*recording.tensors, *recording.scalars}
        assert len(names) > 80 and found[case].keys() >= names, names - found[case].keys()
        for name in names:
            absolute, relative = found[case][name]
            kind = what(name)
            if name.endswith("k_proj.bias") or relative is None or "gumbel_argmax_margin" in name:
                continue
            assert (absolute if kind in ABSOLUTE else relative) <= RECOMMENDED[kind], (case, name)
    # the second file of the same weights, of the argparse generation
    assert "weights of checkpoint_args.pt" in text


@pytest.mark.parametrize("options", [["--plain"], ["--precision", "bf16"]], ids=["plain", "bf16"])
def test_plain_forms_and_bfloat16(options, capsys):
    assert main([*(str(FIXTURES / case) for case in CASES), "--only-outside", *options]) == 0
    assert capsys.readouterr().out.count(" 0 outside, 0 not compared") == len(CASES)


def test_compiled_forms():
    """In a process of its own: compiling changes the model's classes for good. It needs a C compiler."""
    code, text, errors = command(FIXTURES / "w2v2_pretrain_groupnorm", "--compile", "--only-outside")
    assert code == 0, text + errors
    assert ", compiled" in text and " 0 outside, 0 not compared" in text


@pytest.fixture(params=["w2v2_pretrain_layernorm", "w2v2_ctc_from_groupnorm"])
def folder(request, tmp_path):
    """A copy that may be spoiled."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param, copy_function=shutil.copyfile))


def outcome(folder, capsys, code=1):
    """What the command says, its exit code being ``code``."""
    assert main([str(folder), "--only-outside"]) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def change_tensors(folder, change):
    tensors = load_file(folder / "tensors.safetensors")
    change(tensors)
    save_file(tensors, folder / "tensors.safetensors")


def change_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def test_the_copy_is_well(folder, capsys):
    assert " 0 outside, 0 not compared" in outcome(folder, capsys, code=0)


@pytest.mark.parametrize("weight", ["encoder.layers.1.fc2.weight", "encoder.pos_conv.0.weight_g", "layer_norm.bias"])
def test_a_weight_changed_by_one_percent(weight, tmp_path, capsys):
    folder = tmp_path / "case"
    shutil.copytree(FIXTURES / "w2v2_pretrain_groupnorm", folder, copy_function=shutil.copyfile)
    with torch.serialization.safe_globals([argparse.Namespace]):
        contents = torch.load(folder / "checkpoint.pt", weights_only=True)
    contents["model"][weight] *= 1.01
    torch.save(contents, folder / "checkpoint.pt")
    text = outcome(folder, capsys)
    assert "OUTSIDE" in text and "scalars.total_loss " in text
    # what lies before the weight is untouched, so the first row that fails says where to look
    assert "mid.conv6_out" not in text


def test_a_second_file_of_other_weights(tmp_path, capsys):
    folder = tmp_path / "case"
    shutil.copytree(FIXTURES / "w2v2_ctc_from_groupnorm", folder, copy_function=shutil.copyfile)
    with torch.serialization.safe_globals([argparse.Namespace]):
        contents = torch.load(folder / "checkpoint_args.pt", weights_only=True)
    contents["model"]["w2v_encoder.proj.bias"] += 1e-6
    torch.save(contents, folder / "checkpoint_args.pt")
    assert "weights of checkpoint_args.pt" in (text := outcome(folder, capsys)) and "OTHER WEIGHTS (1 tensors)" in text


def test_a_renamed_tensor_is_not_compared(folder, capsys):
    old = "mid.layer0" if "pretrain" in folder.name else "eval.layer0"
    change_tensors(folder, lambda tensors: tensors.update({"mid.layer_zero": tensors.pop(old)}))
    change_meta(folder, lambda meta: meta["tensors"].pop(old))
    text = outcome(folder, capsys)
    assert re.search(r"mid\.layer_zero +NOT COMPARED", text) and "1 not compared" in text


def test_a_layer_too_many_is_not_compared(folder, capsys):
    source = "mid.layer0" if "pretrain" in folder.name else "eval.layer0"
    change_tensors(folder, lambda tensors: tensors.update({source[:-1] + "7": tensors[source].clone()}))
    assert re.search(re.escape(source[:-1]) + r"7 +NOT COMPARED", outcome(folder, capsys))


def test_an_unknown_scalar_is_not_compared(folder, capsys):
    change_meta(folder, lambda meta: meta["scalars"].update({"depth": {"of_thought": 3.5}}))
    assert re.search(r"scalars\.depth\.of_thought +NOT COMPARED", outcome(folder, capsys))


def test_an_entry_outside_the_tolerance(folder, capsys):
    name = "mid.layer0" if "pretrain" in folder.name else "eval.layer0"

    def change(tensors):
        tensors[name][0, 0, 0] += 2e-3

    change_tensors(folder, change)
    text = outcome(folder, capsys)
    assert re.search(re.escape(name) + r" +2\.0e-03 .*OUTSIDE \(1 of \d+\)", text) and "1 outside" in text


def test_an_infinity_elsewhere_and_a_number_that_is_none(folder, capsys):
    name = "out.logits" if "pretrain" in folder.name else "eval.logits"

    def change(tensors):
        place = tensors[name].isfinite().nonzero()[0].tolist()
        tensors[name][tuple(place)] = float("-inf")

    change_tensors(folder, change)
    assert "OUTSIDE (1 infinities elsewhere)" in outcome(folder, capsys)

    def spoil(tensors):
        tensors[name] = torch.full_like(tensors[name], float("nan"))

    change_tensors(folder, spoil)
    assert "OUTSIDE" in outcome(folder, capsys)


def test_a_scalar_outside_its_tolerance(folder, capsys):
    group, name = ("scalars", "total_loss") if "pretrain" in folder.name else ("scalars.train", "loss_sum")

    def change(meta):
        place = meta["scalars"].get("train", meta["scalars"])
        place[name] *= 1 + 1e-4

    change_meta(folder, change)
    text = outcome(folder, capsys)
    assert re.search(rf"{group}\.{name} +\S+ +1\.0e-04 .*OUTSIDE", text)


def test_a_count_that_is_off_by_one(folder, capsys):
    name = "correct" if "pretrain" in folder.name else "c_errors"

    def change(meta):
        meta["scalars"].get("eval", meta["scalars"])[name] += 1

    change_meta(folder, change)
    assert f"{name} " in (text := outcome(folder, capsys)) and "OUTSIDE (1 of 1 differ)" in text


def test_a_tighter_tolerance_in_meta_json_holds(folder, capsys):
    change_meta(folder, lambda meta: meta["suggested_tolerance"].update({"activations": "atol 1e-9"}))
    assert "OUTSIDE" in outcome(folder, capsys)


@pytest.mark.parametrize("name", ["checkpoint.pt", "tensors.safetensors", "meta.json"])
def test_a_missing_file_is_one_sentence(folder, name, capsys):
    (folder / name).unlink()
    assert outcome(folder, capsys) == (
        f"{folder}: {name} is missing; a recording is checkpoint.pt, tensors.safetensors and meta.json.\n"
    )


def test_other_failures_are_one_sentence(folder, capsys):
    assert outcome(folder / "nothing", capsys).startswith(f"{folder / 'nothing'}: there is no such folder; give")
    change_meta(folder, lambda meta: meta["suggested_tolerance"].update({"activations": "about right"}))
    assert "the tolerance 'about right' is not understood; expected words such as" in outcome(folder, capsys)
    change_meta(folder, lambda meta: meta.update(suggested_tolerance={}, tensors={"in.other": {"shape": [1]}}))
    assert "in.other is missing, which meta.json lists; copy the file again." in outcome(folder, capsys)
    change_meta(folder, lambda meta: meta.update(tensors={"in.source": {"shape": [1, 2]}}))
    assert "in.source has the shape" in outcome(folder, capsys)
    key = "model_config" if "pretrain" in folder.name else "ctc_model_config"
    change_meta(folder, lambda meta: meta.update({"tensors": {"in.source": {}}, key: {"_name": "hubert"}}))
    text = outcome(folder, capsys)
    assert "the model is 'hubert', which is no kind of case known here; known are wav2vec2, wav2vec_ctc, " in text
    (folder / "meta.json").write_text("[1")
    assert "meta.json: this is no whole JSON file" in outcome(folder, capsys)
    (folder / "meta.json").write_text("[1]")
    assert "expected an object with scalars and tensors, found a list." in outcome(folder, capsys)


def test_the_files_must_belong_together(tmp_path, capsys):
    folder = tmp_path / "mixed"
    shutil.copytree(FIXTURES / "w2v2_pretrain_groupnorm", folder, copy_function=shutil.copyfile)
    shutil.copyfile(FIXTURES / "w2v2_ctc_from_groupnorm" / "checkpoint.pt", folder / "checkpoint.pt")
    assert "meta.json says wav2vec2, but the file holds a CTCModel." in outcome(folder, capsys)


def test_damaged_files_are_one_sentence(folder, capsys):
    (folder / "tensors.safetensors").write_bytes(b"no tensors")
    assert "tensors.safetensors: this is no whole safetensors file" in outcome(folder, capsys)
    shutil.copyfile(FIXTURES / folder.name / "tensors.safetensors", folder / "tensors.safetensors")
    (folder / "checkpoint.pt").write_bytes(b"no checkpoint")
    text = outcome(folder, capsys)
    assert str(folder / "checkpoint.pt") in text and "Traceback" not in text


def test_an_input_that_is_missing_is_named(folder, capsys):
    name = "rand.gumbel_noise" if "pretrain" in folder.name else "in.target"
    change_tensors(folder, lambda tensors: tensors.pop(name))
    change_meta(folder, lambda meta: meta["tensors"].pop(name))
    assert f"{name} is missing, and the model cannot be run without it." in outcome(folder, capsys)


def test_inputs_that_do_not_fit_each_other_are_one_sentence(tmp_path, capsys):
    folder = tmp_path / "case"
    shutil.copytree(FIXTURES / "w2v2_ctc_from_groupnorm", folder, copy_function=shutil.copyfile)
    name = "in.target_lengths"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:2].clone()}))
    change_meta(folder, lambda meta: meta["tensors"].pop(name))
    text = outcome(folder, capsys)
    assert "the model does not run on the recorded inputs" in text and text.strip().endswith("of one recording?")


def test_tolerances_are_read_as_they_are_written():
    assert Tolerance.parse("atol 1e-4") == Tolerance("atol 1e-4", absolute=1e-4)
    both = Tolerance.parse("rtol 2e-3, atol 2e-4 * max|grad|")
    assert (both.relative, both.of_largest, both.absolute) == (2e-3, 2e-4, 0)
    assert Tolerance.parse("rtol 2e-3 of max").of_largest == 2e-3
    assert Tolerance.parse("rtol 2e-3").alone_of_largest().of_largest == 2e-3
    for words in ("", "1e-4", "atol much", "atol 1e-4 rtol 1e-5", "atol -1", "rtol 5"):
        with pytest.raises(RecordingError, match="is not understood"):
            Tolerance.parse(words)
    assert all(Tolerance.parse(words) for words in BF16.values())
