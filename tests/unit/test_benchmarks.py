"""The benchmarks run and say what they promise; what they measure is not looked at."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from toolkit.errors import ConfigError, run_main
from toolkit.training.devices import resolve_device

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"ours", "peer", "ratio", "tuned_peer", "tuned_ratio", "unit", "precision", "peak_memory_gb"}


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--size", "tiny", "--seconds", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)


def test_last_line_is_the_result():

    done = run("--peer", "transformers", "--rounds", "1", "--warmup", "1", "--precision", "bf16", "--threads", "1")
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) >= KEYS | {"peer_peak_memory_gb"}
    assert result["precision"] == "bf16"
    for key in ("ours", "peer", "tuned_peer", "ratio", "tuned_ratio", "peak_memory_gb", "peer_peak_memory_gb"):
        assert result[key] > 0
    assert "transformers, as installed" in done.stdout


@pytest.mark.parametrize(
    ("model", "words", "unit"),
    [
        ("data2vec_audio", "data2vec on transformers, as installed", "audio seconds per second"),
        ("data2vec_text", "transformers' masked LM, as installed", "tokens per second"),
    ],
)
def test_data2vec_beside_its_peers(model, words, unit):
    done = run("--model", model, "--length", "40", "--rounds", "1", "--warmup", "0", "--threads", "1")
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["model"], result["unit"]) == (model, unit) and words in done.stdout
    for key in ("ours", "peer", "tuned_peer", "ratio", "tuned_ratio", "peak_memory_gb", "peer_peak_memory_gb"):
        assert result[key] > 0


def test_without_a_peer():
    result = json.loads(run("--peer", "none", "--rounds", "1", "--warmup", "0").stdout.splitlines()[-1])
    assert result["ours"] > 0 and result["peer"] is None and result["ratio"] is None


@pytest.fixture
def models(monkeypatch) -> ModuleType:
    """The modules of the steps, which lie beside the script that imports them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("step_data2vec")


def test_work_of_base(models):
    """Counted by hand, without layerdrop: 14.7 GFLOP a second for the convolutions, 29.7 for the rest at 499 frames."""
    speech = models.SpeechSize(layerdrop=0.0)
    assert speech.gflop(1, 160000) / 10 == pytest.approx(44.4, rel=0.005)
    # In the paper's crops of 15.6 s attention has more to do.
    assert speech.gflop(1, 250000) / 15.625 == pytest.approx(46.0, rel=0.005)
    # The teacher's pass is a third of the rest; 7.08 M multiplications a token and layer, and 0.79 M of attention.
    taught = models.SpeechSize(layerdrop=0.0, teacher=True)
    assert taught.gflop(1, 160000) / 10 == pytest.approx(44.4 + 29.7 / 3, rel=0.005)
    assert models.TextSize().gflop(2, 512) == pytest.approx(2 * 512 * 12 * (7.08e6 + 0.79e6) * 8 / 1e9, rel=0.005)


def test_the_plain_data2vec_is_data2vec(models):
    """It learns at the masked frames alone, from a teacher that moves towards the student and is given no gradient."""
    device = resolve_device("cpu")
    torch.manual_seed(0)
    peer = models.PeerData2VecAudio(models.DATA2VEC_AUDIO_SIZES["tiny"], device, "fp32")
    waveforms = torch.randn(2, 16000, generator=torch.Generator().manual_seed(1))
    before = [parameter.clone() for parameter in peer.teacher.parameters()]
    losses = [float(peer.prepare(waveforms)()) for _ in range(8)]
    assert all(parameter.grad is None for parameter in peer.teacher.parameters())
    students = list(peer.model.encoder.encoder.parameters())
    # 8 moves by a thousandth of the way each: far less than the student went
    for own, first, student in zip(peer.teacher.parameters(), before, students, strict=True):
        way, moved = (student - first).abs().max().item(), (own - first).abs().max().item()
        assert 0 < moved < 0.01 * way
    # channels of unit variance, summed and divided by the root of their number: sqrt(32) where nothing is known
    assert losses[0] == pytest.approx(32**0.5, rel=0.5) and losses[-1] < losses[0]


def test_both_sides_of_text_hide_the_same_tokens(models):
    device, size = resolve_device("cpu"), models.TEXT_SIZES["tiny"]
    ours, peer = (kind(size, device, "fp32") for kind in (models.OurData2VecText, models.PeerMaskedLM))
    tokens = torch.randint(4, size.vocab_size - 1, (2, 64), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        (shown, whole), (_, source, labels) = ours.prepare(tokens).args, peer.prepare(tokens).args
        hidden = shown == size.vocab_size - 1
        assert torch.equal(shown, source) and torch.equal(whole, tokens) and 20 <= hidden.sum() <= 60
        assert torch.equal(labels, tokens.masked_fill(~hidden, -100))


def test_the_loop_of_the_recipe_beside_the_bare_step():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "loop.py"), "--size", "tiny", "--hparams", "w2v2_tiny.yaml",
               "--seconds", "1", "--updates", "2", "--warmup", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["walls"]["loop"]) == len(result["walls"]["step"]) == 2
    assert result["loop"] > 0 and result["step"] > 0 and 0 < result["share"]


def test_the_loader_from_files_and_shards_beside_the_peer():
    corpus = ROOT / "tests" / "fixtures" / "librispeech_tiny" / "dev-clean"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "loader.py"), "--data_folder", str(corpus), "--rounds", "1",
               "--utterances", "12", "--rows", "3000", "--workers", "0", "1", "--batch_seconds", "16"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["throughput"]) == {f"{mode}, {count} workers" for mode in ("pad", "crop") for count in (0, 1)}
    for ways in result["throughput"].values():
        assert set(ways) == {"loose", "shards", "pcm", "torch_dataloader"}
        # The same audio goes through all of them; crops of the peer are of the same length.
        totals = [way["audio_seconds_per_second"] * way["walls"][0] for way in ways.values()]
        assert max(totals) < 1.2 * min(totals)
    for which in ("ours", "torch_dataloader"):
        assert result["large"][which]["seconds_to_first_batch"] > 0 and result["large"][which]["node_growth_mb"] > 0


def test_what_a_checkpoint_costs(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint.py"), "--size", "tiny", "--seconds", "1",
               "--batch", "1", "--rounds", "2", "--folder", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["walls"]["waits_held"]) == len(result["walls"]["background_held"]) == 2
    for way in ("waits", "background"):
        assert result[way]["held_seconds"] > 0 and 0 < result[way]["share_15_minutes"] < 1
        assert 0 < result[way]["share_100_updates"] < 1
    assert result["checkpoint_bytes"] > 0 and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> dict:
    """`accelerator.py` on the CPU in tiny sizes: a case of each kind; all of them would take two minutes."""
    kinds = ("large bf16 compiled", "reduce-overhead", "fsdp2 compiled")
    return run_smoke(tmp_path_factory.mktemp("smoke") / "smoke.json", "--cases", *kinds)


def run_smoke(output: Path, *arguments: str, **environment: str) -> dict:
    """The saved document of a smoke run."""
    script = ROOT / "benchmarks" / "accelerator.py"
    command = [sys.executable, str(script), "--smoke", "--output", str(output), *arguments]
    values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=values, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(output.read_text())


def test_cases_for_an_accelerator_run_here_in_small(smoke):
    names = [result["case"]["name"] for result in smoke["cases"]]
    assert smoke["smoke"] and smoke["not_run"] == [] and len(names) == 3
    for result in smoke["cases"]:
        for name in ("ours", "peer") if result["case"]["peer"] else ("ours",):
            side = result[name]
            assert "error" not in side, (result["case"]["name"], side)
            assert side["audio_seconds_per_second"] > 0 and side["peak_memory_gb"] > 0 and side["tflops"] > 0
            assert len(side["profile"]["largest"]) == 3
        assert result["ours"]["share_of_products"] > 0 and ("ratio" in result) == bool(result["case"]["peer"])


def test_a_side_that_fails_does_not_end_the_others(tmp_path):
    """Here transformers is missing; what is noted is the process's last line."""
    (tmp_path / "transformers.py").write_text("raise ImportError('none of that here')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    document = run_smoke(tmp_path / "out.json", "--cases", "base fp32", PYTHONPATH=path)
    (result,) = document["cases"]
    assert result["ours"]["audio_seconds_per_second"] > 0 and "ratio" not in result
    assert result["peer"] == {"error": "ImportError: none of that here"}


@pytest.fixture
def accelerator(models) -> ModuleType:
    return importlib.import_module("accelerator")


def test_a_smoke_run_leaves_measured_figures_alone(accelerator, tmp_path):
    assert accelerator.parse([]).output == accelerator.RESULT
    assert accelerator.parse(["--smoke", "--output", str(tmp_path / "a.json")]).output == tmp_path / "a.json"
    output = accelerator.parse(["--smoke"]).output
    assert output.parent != accelerator.RESULT.parent and output.parent.is_dir()
    output.parent.rmdir()


def test_a_part_of_a_name_is_first_the_model(accelerator):
    def names(*parts: str) -> list[str]:
        return [case.name for case in accelerator.chosen_cases(accelerator.parse(["--cases", *parts]))]

    assert names("large") == ["large bf16 compiled", "large bf16"]
    assert names("large batch", "fp16") == ["base bf16 compiled, large batch", "base fp16 with scale"]
    assert len(names()) == len(accelerator.CASES)
    with pytest.raises(ConfigError, match=r"'none of them' is in no case's name; the cases are: base bf16; base"):
        names("large", "none of them")


def refused(script: str, *arguments: str, **environment: str) -> tuple[str, str]:
    """The sentence of a benchmark that ends with 2, without its "error: ", and what it said before."""
    values = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=values, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last.removeprefix("error: "), done.stdout


FIGURES = '{"cases": ["measured on a card"]}'


def test_when_the_time_is_over_the_rest_is_named_and_kept_figures_stay(tmp_path):
    output = tmp_path / "out.json"
    output.write_text(FIGURES)
    said, shown = refused("accelerator.py", "--smoke", "--output", str(output), "--minutes", "0")
    assert said.startswith(f"nothing was measured, so {output} is left as it was: there was no time; raise --minutes")
    assert shown.startswith("the time was over before: base bf16, ") and output.read_text() == FIGURES


def test_where_every_case_fails_nothing_is_saved(tmp_path):
    """Also where the peer has figures: without ours they say nothing."""
    # It stands before the system's own, and only the sides' processes need it.
    (tmp_path / "resource.py").write_text(
        "import sys\nif 'ours' in sys.argv: raise ImportError('none of that here')\n"
        "from types import SimpleNamespace\nRUSAGE_SELF = 0\n"
        "def getrusage(who): return SimpleNamespace(ru_utime=0.0, ru_stime=0.0, ru_maxrss=1)\n"
    )
    output, path = tmp_path / "out.json", os.pathsep.join([str(tmp_path), str(ROOT)])
    output.write_text(FIGURES)
    words = ["--smoke", "--output", str(output), "--cases", "base fp32"]
    said, shown = refused("accelerator.py", *words, PYTHONPATH=path)
    assert "is left as it was: every case failed as said above" in said
    assert "ours failed: ImportError: none of that here  peer " in shown and "audio s/s" in shown
    assert output.read_text() == FIGURES


@pytest.mark.parametrize("device", ["nonsense", "hpu"])
def test_a_device_that_is_not_there_ends_before_any_case(tmp_path, device):
    said, shown = refused("accelerator.py", "--device", device, "--output", str(tmp_path / "out.json"))
    assert device in said and shown == "" and not list(tmp_path.iterdir())


CORPUS = ["--data_folder", str(ROOT / "tests" / "fixtures" / "librispeech_tiny" / "dev-clean")]


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("accelerator", ["--smoke", "--cases", "nonsense"], "'nonsense' is in no case's name; the cases are: base"),
        ("accelerator", ["--smoke", "--minutes", "0", "--rounds", "0"], "--rounds is 0, expected a number of at least"),
        ("accelerator", ["--smoke", "--minutes", "0", "--warmup", "0"], "--warmup is 0, expected a number of at least"),
        ("accelerator", ["--smoke", "--minutes", "nan"], "--minutes is nan, expected a number of at least 0."),
        ("accelerator", ["--smoke", "--output", f"{__file__}/x/a.json"], "Not a directory"),
        ("accelerator", ["--smoke", "--output", str(ROOT)], "is a folder; name a file."),
        ("checkpoint", ["--rounds", "0"], "--rounds is 0, expected a number of at least 1"),
        ("checkpoint", ["--batch", "0"], "--batch is 0, expected a number of at least 1."),
        ("checkpoint", ["--threads", "-1"], "--threads is -1, expected a number of at least 1."),
        ("checkpoint", ["--seconds", "0"], "--seconds is 0.0, expected a number of at least 0.1."),
        ("checkpoint", ["--folder", "/nonexistent"], "--folder /nonexistent is no folder; name one that exists"),
        ("loader", [*CORPUS, "--utterances", "0"], "--utterances is 0, expected a number of at least 1."),
        ("loader", [*CORPUS, "--workers", "1", "-1"], "--workers is -1, expected a number of at least 0."),
        ("loader", [*CORPUS, "--batch_seconds", "inf"], "--batch_seconds is inf, expected a number of at least 0.1."),
        ("loader", ["--data_folder", "/nonexistent"], "there is no .flac file below /nonexistent; check"),
        ("step", ["--rounds", "0"], "--rounds is 0, expected a number of at least 1."),
        ("step", ["--device", "hpu"], "--device hpu: there is none here"),
        ("loop", ["--updates", "0"], "--updates is 0, expected a number of at least 1."),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(models, capsys, name, words, said):
    script = importlib.import_module(name)
    assert run_main(script.main, words) == 2
    shown, error = capsys.readouterr()
    assert shown == "" and error.startswith("error: ") and error.count("\n") == 1 and said in error


@pytest.mark.parametrize(
    ("script", "words"),
    [("checkpoint.py", ["--device", "hpu"]), ("loader.py", ["--data_folder", "/nonexistent"])],
)
def test_the_scripts_themselves_end_without_a_traceback(script, words):
    said, shown = refused(script, *words)
    assert words[1] in said and shown == ""
