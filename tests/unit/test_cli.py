"""The toolkit's own command, as it is typed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit.__main__ import build_parser, main
from toolkit.data.manifest import write_manifest
from toolkit.errors import ConfigError, ToolkitError, run_main
from toolkit.models.encoder import Wav2Vec2Encoder
from toolkit.models.model_files import save_model_folder
from toolkit.training.checkpoint import Checkpointer

ROOT = Path(__file__).resolve().parents[2]


def said(capsys, *words) -> str:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def make_model_folder(folder: Path) -> Path:
    encoder = Wav2Vec2Encoder(
        conv_layers=[(8, 10, 5)], dim=16, num_layers=1, ffn_dim=32, num_heads=2, pos_kernel=4, pos_groups=2
    )
    save_model_folder(folder, encoder, kind="wav2vec2_encoder", sample_rate=8000, normalize=True)
    return folder


def make_checkpoint(folder: Path) -> Path:
    checkpointer = Checkpointer(folder, manifests={"train.csv": "aa"})
    checkpointer.add("model", torch.nn.Linear(3, 2))
    return checkpointer.save(7, {"epoch": 2}, {"wer": 12.5})


def test_devices_as_typed():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "toolkit", "devices"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("device") and "\ncpu " in done.stdout and "auto means " in done.stdout


def test_a_wrong_command_is_one_sentence(capsys):
    assert run_main(main, ["divices"]) == 2
    words = capsys.readouterr().err
    assert words.startswith("error: python -m toolkit: ") and "'divices'" in words and words.count("\n") == 1
    assert run_main(main, []) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_inspect_a_model_folder(tmp_path, capsys):
    folder = make_model_folder(tmp_path / "model")
    text = said(capsys, "inspect", folder)
    assert text.startswith(f"{folder}: a model of kind wav2vec2_encoder (toolkit)\n")
    assert "8000 Hz, normalized" in text and '"dim": 16' in text and "tensors    25, 3,060 values" in text


def test_inspect_a_checkpoint(tmp_path, capsys):
    path = make_checkpoint(tmp_path / "save")
    text = said(capsys, "inspect", path)
    assert f"{path}: a checkpoint after 7 updates" in text and "all checksums right" in text
    assert '{"wer": 12.5}' in text and "train.csv" in text and "2 tensors, 8 values" in text
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ToolkitError, match=r"is not valid: its model\.safetensors has 0 bytes"):
        main(["inspect", str(path)])


def test_inspect_a_run(tmp_path, capsys):
    make_checkpoint(tmp_path / "save")
    make_model_folder(tmp_path / "model")
    (tmp_path / "save" / "step_00000009").mkdir()
    (tmp_path / "summary.json").write_text(json.dumps({"updates": 7, "test_wer": 3.5}))
    text = said(capsys, "inspect", tmp_path)
    assert "the output folder of a run" in text and "checkpoint step_00000007  wer 12.5" in text
    assert "test_wer   3.5" in text and "wav2vec2_encoder" in text and "step_00000009 is passed over" in text


def test_inspect_a_manifest_a_yaml_and_tensors(tmp_path, capsys):
    rows = [{"ID": f"u{n}", "duration": 1.0 + n, "wav": f"/x/{n}.wav", "wrd": "A B"} for n in range(3)]
    write_manifest(tmp_path / "train.csv", rows)
    text = said(capsys, "inspect", tmp_path / "train.csv")
    assert "a manifest of 3 utterances, 0.00 hours" in text and "1.00 to 3.00 s, mean 2.00 s" in text
    (tmp_path / "x.yaml").write_text("# Peak rate.\nlr: 1.0\n")
    assert "--lr 1.0\n        Peak rate." in said(capsys, "inspect", tmp_path / "x.yaml")
    path = make_checkpoint(tmp_path / "save")
    text = said(capsys, "inspect", path / "model.safetensors")
    assert "weight  (2, 3) F32" in text


def test_inspect_prepared_text(tmp_path, capsys):
    folder = ROOT / "tests" / "fixtures" / "fairseq_text" / "bin_own"
    whole = said(capsys, "inspect", folder).splitlines()
    assert whole == [
        f"{folder}: text in fairseq's binary form",
        "  dict.txt   4,048 entries (with 4 special ones), the first 262, 29, 2954, 1279, 837",
        "  test       34 lines, 2,066 tokens, stored as uint16",
        "  train      316 lines, 23,671 tokens, stored as uint16",
        "  valid      45 lines, 3,278 tokens, stored as uint16",
    ]
    for end in (".idx", ".bin"):
        assert said(capsys, "inspect", folder / f"train{end}").splitlines()[1:] == [whole[1], whole[3]]
        (tmp_path / f"train{end}").write_bytes((folder / f"train{end}").read_bytes())
    assert said(capsys, "inspect", tmp_path).splitlines()[1:] == ["  no dict.txt beside it", whole[3]]


def test_inspect_what_is_not_there_or_nothing_known(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no .*; check the path"):
        main(["inspect", str(tmp_path / "nothing")])
    with pytest.raises(ConfigError, match="is none of these: a model, a checkpoint or the output folder"):
        main(["inspect", str(tmp_path)])
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    with pytest.raises(ToolkitError, match="cannot be read as safetensors"):
        main(["inspect", str(tmp_path / "x.safetensors")])


def test_recipes_are_listed_with_commands(capsys):
    text = said(capsys, "recipes")
    assert "python recipes/LibriSpeech/ASR/train.py recipes/LibriSpeech/ASR/hparams/ctc_tiny.yaml\n" in text
    for line in text.splitlines():
        if line.startswith("  python "):
            script, yaml = line.split()[1:3]
            assert (ROOT / script).is_file() and (ROOT / yaml).is_file()


def test_curves_of_a_run(tmp_path, capsys):
    rows = [{"update": n, "loss": 5.0 / n, "stage": "train"} for n in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said(capsys, "curves", tmp_path, "--output", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_subcommand_has_help(capsys):
    for command in ("devices", "inspect", "curves", "recipes"):
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args([command, "--help"])
        assert caught.value.code == 0 and "usage: python -m toolkit" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{broken", "[1, 2]", b"\xff\xfe"])
def test_inspect_a_run_with_a_damaged_summary(tmp_path, text):
    (tmp_path / "summary.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ToolkitError, match=r"summary\.json is damaged .*; delete it and run with --test_only True"):
        main(["inspect", str(tmp_path)])


# -------------------------------------------------------------------- how a script ends (run_main)


def raising(error):
    def main(argv):
        raise error

    return main


def test_memory_that_ran_out_is_one_sentence(capsys):
    host = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 400000 bytes. Error code 12 (Cannot allocate memory)"
    )
    device = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB.\nMore")
    found = {
        "MemoryError": MemoryError(),
        "Unable to allocate 7 TiB": MemoryError("Unable to allocate 7 TiB"),
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000 bytes": host,
        "CUDA out of memory. Tried to allocate 2.00 GiB": device,
    }
    for words, error in found.items():
        assert run_main(raising(error), []) == 2
        assert capsys.readouterr().err == (
            f"error: memory ran out ({words}); lower batch_seconds or batch_tokens (effective_batch may "
            "stay), set gradient_checkpointing to True where the YAML has it, or end what else uses the memory.\n"
        )
    with pytest.raises(MemoryError):
        np.empty(2**50)
    assert run_main(lambda argv: np.empty(2**50), []) == 2
    assert "memory ran out (Unable to allocate" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a defect"):
        run_main(raising(RuntimeError("a defect")), [])


def test_an_interrupt_promises_no_checkpoint(capsys):
    assert run_main(raising(KeyboardInterrupt()), []) == 130
    words = capsys.readouterr().err
    assert "checkpoint" not in words
    assert words == "\ninterrupted; the same command goes on from what is already saved, if anything.\n"


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_reader_that_has_gone_ends_a_command_in_silence(size):
    script = f"import sys; from toolkit.errors import run_main; sys.exit(run_main(lambda argv: print('x' * {size})))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_elsewhere_is_told(capsys):
    assert run_main(raising(BrokenPipeError(errno.EPIPE, "Broken pipe")), []) == 2
    assert "error: the operating system refused" in capsys.readouterr().err
