"""The main job from nothing: synthesize a corpus, prepare, pretrain, fine-tune, decode. Started by ``make demo``.

Every step is the command that a user of real LibriSpeech types, printed before it runs. The same command again
goes on where it stopped, or says that all is done.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script from any folder, installed or not

from toolkit.curves import RunCurves, draw_picture, read_curves, write_tables
from toolkit.errors import INTERRUPTED, TrainingError, run_main

PREPARE = "recipes/LibriSpeech/librispeech_prepare.py"
PRETRAIN = "recipes/LibriSpeech/wav2vec2/train.py", "recipes/LibriSpeech/wav2vec2/hparams/w2v2_tiny.yaml"
FINETUNE = "recipes/LibriSpeech/ASR/train.py", "recipes/LibriSpeech/ASR/hparams/ctc_tiny.yaml"
SPLITS = ("--train_splits", "[train]", "--valid_splits", "[dev]")

# What the tiny YAMLs are changed in for ten minutes of clean, short sentences; the reasons are in demo/README.md.
PRETRAIN_CHANGES = {
    "max_updates": 100000, "min_duration": 1.0, "effective_batch": 20.0, "batch_seconds": 20.0, "crop_seconds": 4.0,
    "valid_interval_updates": 200, "lr": 0.002,
}  # fmt: skip
FINETUNE_CHANGES = {
    "max_updates": 100000, "effective_batch": 30.0, "batch_seconds": 30.0, "valid_interval_updates": 300,
    "lr": 0.001, "encoder_training.mask_prob": 0.1, "encoder_training.mask_length": 5,
    "encoder_training.dropout": 0.05,
}  # fmt: skip
PICTURE = (
    ("pretrain", ("loss", "accuracy", "code_perplexity", "grad_norm")),
    ("finetune", ("loss", "wer", "grad_norm", "lr")),
)


@dataclass(frozen=True)
class Step:
    """One command: its name, what it does in words, and the file that stands when it is done."""

    name: str
    title: str
    command: tuple[str, ...]
    result: Path


def flags(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(text for key, value in values.items() for text in (f"--{key}", str(value)))


def steps(folder: Path, arguments: argparse.Namespace) -> list[Step]:
    """The whole job, in order."""
    corpus, manifests = folder / "corpus", folder / "manifests"
    data = ("--data_folder", str(corpus / "LibriSpeech"), "--manifest_folder", str(manifests))
    pretrain, finetune = folder / "pretrain", folder / "finetune"
    counts = ("--train", str(arguments.sentences)) if arguments.sentences else ()
    make = ("demo/make_corpus.py", "--output_folder", str(corpus), *counts)
    prepare = (PREPARE, *data[:2], "--output_folder", str(manifests), "--splits", "train", "dev", "test")
    pretraining = (
        *PRETRAIN, *data, "--output_folder", str(pretrain), *SPLITS, *flags(PRETRAIN_CHANGES),
        "--max_minutes", f"{arguments.pretrain_minutes:g}", *arguments.both,
    )  # fmt: skip
    finetuning = (
        *FINETUNE, *data, "--output_folder", str(finetune), *SPLITS, "--test_splits", "[test]",
        "--pretrained", str(pretrain / "model"), *flags(FINETUNE_CHANGES),
        "--max_minutes", f"{arguments.finetune_minutes:g}", *arguments.both,
    )  # fmt: skip
    return [
        Step("corpus", "synthesize speech in LibriSpeech's layout (espeak-ng)", make, corpus / "corpus.json"),
        Step("prepare", "from the tree to manifests", prepare, manifests / "test.csv"),
        Step("pretrain", "wav2vec 2.0 without transcripts", pretraining, pretrain / "summary.json"),
        Step("finetune", "CTC on the pretrained encoder; decode the test part", finetuning, finetune / "summary.json"),
    ]


class Ledger:
    """Which command is done and how long it took, kept in ``demo.json`` so that a second run need not ask again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "demo.json"
        self.entries: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def is_done(self, step: Step) -> bool:
        return self.entries.get(step.name, {}).get("command") == list(step.command) and step.result.exists()

    def seconds(self, step: Step) -> float:
        return float(self.entries.get(step.name, {}).get("seconds", 0.0))

    def close(self, step: Step, seconds: float) -> None:
        self.entries[step.name] = {"command": list(step.command), "seconds": round(self.seconds(step) + seconds, 1)}
        self._write()

    def pause(self, step: Step, seconds: float) -> None:
        """Remember the time of a step that did not end; its command is not written, so it is not done."""
        self.entries[step.name] = {"seconds": round(self.seconds(step) + seconds, 1)}
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.entries, indent=1) + "\n")
        os.replace(temporary, self.path)


def run_step(step: Step, ledger: Ledger, place: str) -> None:
    """Run one command with its output on our screen.

    Raises
    ------
    TrainingError : it ended with an error, which it has printed itself.
    """
    if ledger.is_done(step):
        print(f"\n[{place}] {step.title}: done before ({ledger.seconds(step):.0f} s)", flush=True)
        return
    print(f"\n[{place}] {step.title}\n$ python {shlex.join(step.command)}", flush=True)
    started = time.monotonic()
    try:
        code = subprocess.run([sys.executable, *step.command], cwd=ROOT, check=False).returncode
    except KeyboardInterrupt:
        ledger.pause(step, time.monotonic() - started)
        raise
    if code:
        ledger.pause(step, time.monotonic() - started)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        raise TrainingError(
            f"the step {step.name!r} ended with exit code {code}; what it printed says why. "
            "The same command again goes on from there."
        )
    ledger.close(step, time.monotonic() - started)


def draw(folder: Path) -> Path:
    """Pretraining and fine-tuning in one picture and one table."""
    series, shown = {}, []
    for part, metrics in PICTURE:
        run = read_curves(folder / part)
        for (stage, metric), curve in run.series.items():
            series[stage, f"{part}: {metric}"] = curve
        shown += [f"{part}: {metric}" for metric in metrics if metric in run.metrics]
    both = RunCurves("demo", series)
    references = {"pretrain: accuracy": 1 / 101, "pretrain: contrastive": 4.615}  # chance among 101 candidates
    write_tables([both], folder / "curves.md", metrics=shown)
    return draw_picture([both], folder / "curves.png", metrics=shown, references=references, title="make demo")


def report(folder: Path, plan: Sequence[Step], ledger: Ledger) -> float:
    """Print what came out; returns the test WER in percent."""
    summary = json.loads((folder / "finetune" / "summary.json").read_text())
    text = (folder / "finetune" / "test_hypotheses.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    wrong = [row for row in rows if row["reference"] != row["hypothesis"]]
    right = [row for row in rows if row["reference"] == row["hypothesis"]]
    hours = json.loads((folder / "corpus" / "corpus.json").read_text())["hours"]
    picture = draw(folder)
    print("\n" + "-" * 100)
    print(
        f"Trained on {60 * hours['train']:.0f} minutes of synthetic speech; tested on {len(rows)} sentences "
        f"({60 * hours['test']:.0f} minutes) of voices and sentences that training never saw.\n"
        f"WER {summary['test_wer']:.2f} %, CER {summary['test_cer']:.2f} %; {len(right)} of {len(rows)} sentences "
        "without any error."
    )
    print("\nSome of them (reference, hypothesis):")
    for row in [*right[:: max(1, len(right) // 3)][:3], *wrong[:: max(1, len(wrong) // 5)][:5]]:
        print(f"  {row['id']}\n    {row['reference']}\n    {row['hypothesis']}")
    print("\nWhere everything lies:")
    for what, path in (
        ("corpus", folder / "corpus" / "LibriSpeech"),
        ("manifests", folder / "manifests"),
        ("pretrained encoder", folder / "pretrain" / "model"),
        ("recognizer", folder / "finetune" / "model"),
        ("transcripts", folder / "finetune" / "test_hypotheses.jsonl"),
        ("summaries", folder / "{pretrain,finetune}" / "summary.json"),
        ("logs", folder / "{pretrain,finetune}" / "log.txt"),
        ("curves", picture),
        ("curves as a table", folder / "curves.md"),
    ):
        print(f"  {what:<20} {path}")
    print("\nTime: " + ", ".join(f"{step.name} {ledger.seconds(step):.0f} s" for step in plan))
    print(
        "\nNext, the same with real speech: unpack train-clean-100 and dev-clean of LibriSpeech "
        "(openslr.org/12), then\n"
        f"  .venv/bin/python {PRETRAIN[0]} {PRETRAIN[1]} --data_folder /path/to/LibriSpeech "
        "--output_folder results/w2v2_tiny --max_minutes 60\n"
        f"  .venv/bin/python {FINETUNE[0]} {FINETUNE[1]} --data_folder /path/to/LibriSpeech "
        "--output_folder results/ctc_tiny --pretrained results/w2v2_tiny/model --max_minutes 60\n"
    )
    return float(summary["test_wer"])


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_folder", type=Path, default=ROOT / "demo_run", help="gets everything")
    parser.add_argument("--pretrain_minutes", type=float, default=1.5, help="time for pretraining")
    parser.add_argument("--finetune_minutes", type=float, default=5.5, help="time for fine-tuning")
    parser.add_argument("--sentences", type=int, default=None, help="training sentences; default: 4000")
    parser.add_argument("both", nargs="*", metavar="--key value", help="behind --: options for both training scripts")
    arguments = parser.parse_args(argv)
    folder = arguments.output_folder.resolve()
    if folder.is_relative_to(ROOT):
        os.chdir(ROOT)
        folder = folder.relative_to(ROOT)  # commands are easier to read, and to type again
    folder.mkdir(parents=True, exist_ok=True)
    ledger, plan = Ledger(folder), steps(folder, arguments)
    if all(ledger.is_done(step) for step in plan):
        print(f"the demo is done already; remove {folder} to see it again from the start.")
    for place, step in enumerate(plan, start=1):
        run_step(step, ledger, f"{place}/{len(plan)}")
    print(f"demo: test WER {report(folder, plan, ledger):.2f} %", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
