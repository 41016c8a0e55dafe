"""The real scripts on the small fixtures with a very small model: in this process, or each run as its own process."""

from __future__ import annotations

import csv
import importlib.util
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from toolkit.errors import run_main
from toolkit.training.brain import Brain

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
DIGITS = FIXTURES / "fsdd_tiny"
ODD_AUDIO = FIXTURES / "odd_audio"
TEMPLATE = ROOT / "templates" / "speech_recognition" / "train.py"
PRETRAINING = ROOT / "recipes" / "LibriSpeech" / "wav2vec2" / "train.py"
DATA2VEC = ROOT / "recipes" / "LibriSpeech" / "data2vec" / "train.py"
TEXT = ROOT / "recipes" / "WikiText" / "data2vec" / "train.py"
ASR = ROOT / "recipes" / "LibriSpeech" / "ASR" / "train.py"

CONV_LAYERS = "[[8, 10, 5], [8, 8, 4], [8, 4, 4], [16, 4, 2]]"
SIZES = {"conv_layers": CONV_LAYERS, "dim": 16, "num_layers": 2, "ffn_dim": 32, "num_heads": 2, "pos_kernel": 8,
         "pos_groups": 4}  # fmt: skip
COMMON = {"device": "cpu", "precision": "fp32", "num_workers": 0, "log_interval": 2, "noprogressbar": "True",
          "ckpt_interval_minutes": "null", "fast_allocator": "False", "fast_products": "False"}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code and all that it printed."""

    code: int
    stderr: str
    stdout: str = ""

    @property
    def error(self) -> str:
        """The line (or lines) behind "error: "."""
        return f"\n{self.stderr}".rpartition("\nerror: ")[2].rstrip("\n")


def words_of(*sources: Mapping[str, Any]) -> list[str]:
    """``--key=value`` of several sources, the later winning; None leaves a key out."""
    merged: dict[str, Any] = {}
    for source in sources:
        merged.update(source)
    return [f"--{key}={value}" for key, value in merged.items() if value is not None]


def digits_words(output: Path, **keys: Any) -> list[str]:
    """The template on the spoken digits: 50 utterances, 0.3 to 0.8 s at 8 kHz."""
    base = {
        "train_manifest": DIGITS / "train.csv", "valid_manifest": DIGITS / "test.csv",
        "test_manifest": DIGITS / "test.csv", "output_folder": output,
        **{f"encoder_sizes.{name}": value for name, value in SIZES.items()},
        "max_updates": 2, "effective_batch": 12, "batch_seconds": 6, "valid_interval_updates": 2,
    }  # fmt: skip
    return [str(TEMPLATE.with_name("train.yaml")), *words_of(COMMON, base, keys)]


def asr_words(output: Path, **keys: Any) -> list[str]:
    """The LibriSpeech recipe on the small tree: some 20 utterances of at most 5 s."""
    base = {
        "data_folder": FIXTURES / "librispeech_tiny", "output_folder": output, "train_splits": "[train-clean-100]",
        "valid_splits": "[]", "test_splits": "[]", "max_updates": 2, "batch_seconds": 16, "effective_batch": 32,
        **{f"encoder_sizes.{name}": value for name, value in SIZES.items()},
    }  # fmt: skip
    return [str(ASR.parent / "hparams" / "ctc_tiny.yaml"), *words_of(COMMON, base, keys)]


def pretraining_words(output: Path, **keys: Any) -> list[str]:
    """wav2vec 2.0's pretraining on the same tree, in crops of at most 2 s."""
    return _crops_words(PRETRAINING.parent / "hparams" / "w2v2_tiny.yaml", output, keys)


def data2vec_words(output: Path, **keys: Any) -> list[str]:
    """data2vec's on the same."""
    keys = {"model.top_layers": 2, "model.encoder.pos_depth": 2, **keys}
    return _crops_words(DATA2VEC.parent / "hparams" / "data2vec_tiny.yaml", output, keys)


def text_words(output: Path, **keys: Any) -> list[str]:
    """data2vec of text on a small prepared folder."""
    base = {
        "data_folder": FIXTURES / "fairseq_text" / "bin_own", "output_folder": output, "max_updates": 2,
        "tokens_per_sample": 32, "batch_tokens": 256, "effective_batch": 1024, "valid_interval_updates": 2,
        "encoder.dim": 16, "encoder.num_layers": 2, "encoder.ffn_dim": 32, "encoder.num_heads": 2,
        "model.top_layers": 2,
    }  # fmt: skip
    return [str(TEXT.parent / "hparams" / "data2vec_tiny.yaml"), *words_of(COMMON, base, keys)]


def _crops_words(hparams: Path, output: Path, keys: Mapping[str, Any]) -> list[str]:
    base = {
        "data_folder": FIXTURES / "librispeech_tiny", "output_folder": output, "train_splits": "[train-clean-100]",
        "valid_splits": "[]", "test_splits": "[]", "max_updates": 2, "batch_seconds": 8, "effective_batch": 16,
        "crop_seconds": 2,
        **{f"model.encoder.{name}": value for name, value in SIZES.items()},
    }  # fmt: skip
    return [str(hparams), *words_of(COMMON, base, keys)]


def run_here(script: Path, words: Iterable[Any]) -> Ended:
    """The script's own ``main`` through ``run_main`` in this process, as ``python script ...`` would call it."""
    module = load_script(script)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = run_main(module.main, [str(word) for word in words])
        except SystemExit as ended:
            code = ended.code
    return Ended(code, err.getvalue(), out.getvalue())


def command_line(script: Path, words: Iterable[Any], processes: int = 1) -> list[str]:
    """What a person types: ``python script ...``, or torchrun for several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(script), *(str(word) for word in words)]


def environment() -> dict[str, str]:
    """One thread a process, and a traceback only where there is a defect."""
    values = {**os.environ, "OMP_NUM_THREADS": "1"}
    values.pop("TOOLKIT_TRACEBACK", None)
    return values


def run_script(script: Path, words: Iterable[Any], *, processes: int = 1, **options: Any) -> Ended:
    """The command as its own process."""
    done = subprocess.run(
        command_line(script, words, processes), env=environment(), capture_output=True, text=True, timeout=300,
        **options,
    )  # fmt: skip
    return Ended(done.returncode, done.stderr, done.stdout)


def run_until(script: Path, words: Iterable[Any], reached: Callable[[], bool], signal_number: int) -> Ended:
    """The command as its own process, sent a signal as soon as ``reached()``."""
    process = subprocess.Popen(
        command_line(script, words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while process.poll() is None and not reached():
        assert time.monotonic() < deadline, "the run did not come so far"
        time.sleep(0.005)
    if process.poll() is None:
        process.send_signal(signal_number)
    stdout, stderr = process.communicate(timeout=120)
    return Ended(process.returncode, stderr, stdout)


@dataclass(frozen=True)
class Stop:
    """A signal that a run sends itself in the forward pass of a micro-batch: exactly there, at any speed.

    In an update with fewer micro-batches it comes with the next update. Of several ranks the first sends it to itself.
    """

    update: int
    micro: int
    signal: signal.Signals


def run_forked(
    script: Path, words: Iterable[Any], *, stop: Stop | None = None, processes: int = 1, threads: int = 1
) -> list[Ended]:
    """The script's ``main`` in fresh processes forked from one that has only imported torch: quicker than a command.

    With several ``processes`` they are ranks of one run, as torchrun would start them. Returns how each ended.
    """
    with tempfile.TemporaryDirectory() as logs:
        ranks = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(processes):
            places = {"OMP_NUM_THREADS": str(threads)}
            if processes > 1:
                places |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                           "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            ranks.append(start_forked(script, words, Path(logs) / str(rank), stop=stop, places=places))
        return [process_ended(process, Path(logs) / str(rank)) for rank, process in enumerate(ranks)]


def start_forked(
    script: Path, words: Iterable[Any], log: Path, *, stop: Stop | None = None, places: Mapping[str, str] | None = None,
    own_group: bool = False,
) -> BaseProcess:
    """Start one such process; its words go to ``log``. ``own_group``: it leads a process group, as a job of a shell."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "toolkit.training.experiment", "toolkit.models.build"])
    arguments = (script, [str(word) for word in words], stop, dict(places or {"OMP_NUM_THREADS": "1"}), str(log))
    process = context.Process(target=_forked_main, args=(*arguments, own_group))
    process.start()
    return process


def process_ended(process: BaseProcess, log: Path, seconds: float = 240) -> Ended:
    """Wait for a process of `start_forked` (it is killed when it takes longer)."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return Ended(process.exitcode, log.read_text(encoding="utf-8") if log.exists() else "")


def _forked_main(
    script: Path, words: Sequence[str], stop: Stop | None, places: dict[str, str], log: str, own_group: bool
) -> None:
    """What a forked process does: the script's main, its words in a file, its own signal where one is asked for."""
    if own_group:
        os.setpgid(0, 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(places)
    module = load_script(script)
    if stop is not None:
        forward = Brain.fit_batch

        def stopped(self: Brain, micro: Any) -> None:
            if (self.update, micro.micro) >= (stop.update, stop.micro) and self.world.is_main:
                os.kill(os.getpid(), stop.signal)
            forward(self, micro)

        Brain.fit_batch = stopped
    code = run_main(module.main, words)
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]  # none where it is not Linux
    print(f"threads of the process group left: {sorted(name for name in names if 'gloo' in name)}", flush=True)
    sys.exit(code)


SCRIPT = "faults_script"
"""Module name of a script that is loaded here."""


def load_script(script: Path) -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(SCRIPT, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits(change: Callable[[list[dict[str, str]]], None] | None = None) -> list[dict[str, str]]:
    """The rows of the digits' training manifest with whole paths, changed by ``change``."""
    with open(DIGITS / "train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["wav"] = str(DIGITS / row["wav"])
    if change is not None:
        change(rows)
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows as a CSV manifest."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes, and every folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}
