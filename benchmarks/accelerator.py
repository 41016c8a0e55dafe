"""Measure wav2vec 2.0 pretraining on one accelerator, in turn with transformers' model: one command, one file.

    python benchmarks/accelerator.py --output benchmarks/results/h200.json
    python benchmarks/accelerator.py --smoke          # tiny sizes of every case on the CPU: does the script run?
                                                      # without --output, into a temporary file

Cases come in order of importance and are saved one by one from the first with figures of ours, so that a machine that
is taken away leaves what was measured. Each side of a case is a process of `step_variants.py`: one that fails (out of
memory, an operation that is missing) is noted in its case, and the next case goes on. The audio is noise. A figure is
the median over rounds; a round is some steps of ours, then as many of theirs, without a wait within. Peak memory is
the allocator's. The use of the machine is our arithmetic (`SpeechSize.gflop`: products, forward and both backward
directions) per second, over the rate of large products that the same process measured, and over the data sheet's where
the card is known.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from checks import check_device, check_numbers
from step import Variant
from step_models import WAV2VEC2_SIZES

from toolkit.errors import ConfigError, TrainingError, run_main

AIM = 6900.0
"""Audio seconds per second of BASE on an H200 that the project aims for."""

RESULT = Path(__file__).parent / "results" / "accelerator.json"

DATA_SHEET_TFLOPS = (("H200", 989.0), ("H100", 989.0), ("A100", 312.0), ("L40S", 362.0))
"""Dense 16-bit TFLOP/s of the SXM cards, by a word in their name."""


@dataclass(frozen=True)
class Case:
    """One configuration: a size, a precision, how it is compiled and shared, the batch, and how the peer runs beside
    it ("eager", as its users run it, "compiled", or "" for not at all)."""

    name: str
    size: str = "base"
    precision: str = "bf16"
    compile_mode: str = "none"
    parallel: str = "ddp"
    batch: int = 6
    seconds: float = 15.6
    peer: str = "eager"
    layerdrop: float | None = None  # None: the size's own


# 6 x 15.6 s are a fairseq GPU's 1.4 M samples; with four times that, launches no longer decide.
CASES = (
    Case("base bf16"),
    Case("base bf16 compiled", compile_mode="default"),
    Case("base bf16 compiled, large batch", compile_mode="default", batch=24),
    Case("large bf16 compiled", size="large", compile_mode="default", batch=4, seconds=20.0),
    # CUDA graphs: with layerdrop each choice of layers would be recorded.
    Case("base bf16 reduce-overhead", compile_mode="reduce-overhead", peer="", layerdrop=0.0),
    Case("large bf16", size="large", batch=4, seconds=20.0),
    Case("base fp16 with scale", precision="fp16"),
    Case("base bf16 fsdp2", parallel="fsdp2", peer=""),
    Case("base bf16 fsdp2 compiled", parallel="fsdp2", compile_mode="default", peer=""),
    Case("base fp32", precision="fp32"),
    Case("base bf16, both compiled", compile_mode="default", peer="compiled"),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help=f"default: {RESULT}; with --smoke a temporary file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="limit for everything; cases that are left wait")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each case")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--warmup", type=int, default=8, help="steps before, which also compile")
    parser.add_argument("--cases", nargs="*", help="only these: how names begin, else parts of names")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes of every case, on the CPU; no figures")
    options = parser.parse_args(argv)
    check_numbers(options, minutes=0, rounds=1, steps=1, warmup=1)
    for part in options.cases or ():
        named(part)  # refused before a folder is made
    if options.smoke:
        options.device, options.rounds, options.steps, options.warmup = "cpu", 1, 1, 1
    if options.output is None:
        # Tiny sizes must not take the place of figures that a card was lent for.
        options.output = Path(tempfile.mkdtemp(prefix="accelerator_smoke_")) / RESULT.name if options.smoke else RESULT
    return options


def named(part: str) -> list[str]:
    """The cases that ``part`` means: those whose names begin with it ("large": the model), else those that hold it.

    Raises ConfigError where there are none.
    """
    names = [case.name for case in CASES]
    found = [name for name in names if name.startswith(part)] or [name for name in names if part in name]
    if not found:
        raise ConfigError(f"--cases {part!r} is in no case's name; the cases are: {'; '.join(names)}.")
    return found


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases to run, made small for ``--smoke``."""
    wanted = {name for part in options.cases for name in named(part)} if options.cases else {c.name for c in CASES}
    cases = [case for case in CASES if case.name in wanted]
    if not options.smoke:
        return cases
    # A CPU has no fp16 products, and inductor's start is most of a minute there.
    return [
        replace(
            case,
            size="tiny_large" if case.size == "large" else "tiny",
            precision="fp32" if case.precision == "fp16" else case.precision,
            compile_mode="none",
            batch=2,
            seconds=1.0,
        )
        for case in cases
    ]


class Deadline:
    """Ends processes that still run when the time is over."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    @contextlib.contextmanager
    def over(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """While this is open, ``process`` is killed at the deadline."""
        timer = threading.Timer(max(self.left, 0.0), process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class Side:
    """One side of a case: its process, or a sentence on why there is none (any more)."""

    def __init__(self, name: str, case: Case, options: argparse.Namespace, deadline: Deadline, folder: Path) -> None:
        values = {**asdict(case), "model": "w2v2", "length": 0, "device": options.device}
        values["threads"] = 1 if options.smoke else None
        if name == "peer" and case.peer == "eager":
            values["compile_mode"] = "none"
        self.deadline = deadline
        self.error: str | None = None
        self.log: IO[str] = open(folder / f"{name}.log", "w+", encoding="utf-8")
        self.variant: Variant | None = None
        self.steps: list[dict[str, float]] = []
        try:
            # Its constructor waits for the first line; nothing else to kill it by.
            self.variant = Variant(name, argparse.Namespace(**values), errors=self.log)
        except SystemExit:
            self._note_error()

    def ask(self, line: str) -> dict[str, Any] | None:
        """The answer, or None after an error."""
        if self.variant is None:
            return None
        try:
            with self.deadline.over(self.variant.process):
                return self.variant.ask(line)
        except (SystemExit, BrokenPipeError):
            self._note_error()
            return None

    def close(self) -> None:
        """End the process."""
        if self.variant is not None:
            self.variant.close()
        self.log.close()

    def _note_error(self) -> None:
        self.variant = None
        if self.deadline.left <= 0:
            self.error = "ended by the time limit"
            return
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        self.error = lines[-1][:500] if lines else "ended without a word"


def run_case(case: Case, options: argparse.Namespace, deadline: Deadline) -> dict[str, Any]:
    """Measure a case; what failed is in its ``error``."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        names = ["ours", "peer"] if case.peer else ["ours"]
        sides = {name: Side(name, case, options, deadline, Path(folder)) for name in names}
        rate = sides["ours"].ask("products")
        for side in sides.values():
            side.ask(f"steps {options.warmup}")
        for _ in range(options.rounds):
            for side in sides.values():
                measured = side.ask(f"steps {options.steps}")
                if measured is not None:
                    side.steps.append(measured)
        result: dict[str, Any] = {"case": asdict(case)}
        for name, side in sides.items():
            profile = side.ask("profile 3")
            result[name] = summary(case, side, profile, rate if name == "ours" else None)
        about = sides["ours"].variant.about if sides["ours"].variant is not None else {}
        for side in sides.values():
            side.close()
    result["device"] = about.get("device")
    ours, peer = (result.get(name, {}).get("audio_seconds_per_second") for name in ("ours", "peer"))
    if ours and peer:
        rounds = zip(sides["ours"].steps, sides["peer"].steps, strict=False)
        result["ratio"] = statistics.median(theirs["wall"] / own["wall"] for own, theirs in rounds)
    result["took_seconds"] = round(time.monotonic() - began, 1)
    return result


def summary(case: Case, side: Side, profile: dict[str, Any] | None, rate: dict[str, Any] | None) -> dict[str, Any]:
    """The figures of one side."""
    if not side.steps:
        return {"error": side.error}
    wall = statistics.median(step["wall"] for step in side.steps)
    size = WAV2VEC2_SIZES[case.size]
    if case.layerdrop is not None:
        size = replace(size, layerdrop=case.layerdrop)
    gflop = size.gflop(case.batch, round(case.seconds * 16000))
    out: dict[str, Any] = {
        "audio_seconds_per_second": case.batch * case.seconds / wall,
        "step_seconds": wall,
        "walls": [step["wall"] for step in side.steps],
        "peak_memory_gb": max(step["peak_memory_gb"] for step in side.steps),
        "tflops": gflop / wall / 1000,
        "loss": side.steps[-1]["loss"],
    }
    if rate is not None:
        out["product_tflops"] = rate["gflops"] / 1000
        out["share_of_products"] = out["tflops"] / out["product_tflops"]
    device = side.variant.about["device"] if side.variant is not None else ""
    for word, peak in DATA_SHEET_TFLOPS:
        if word in device and case.precision != "fp32":
            out["model_flop_utilisation"] = out["tflops"] / peak
            break
    if profile is not None:
        out["profile"] = profile
    if side.error:
        out["error"] = side.error
    return out


def line_of(result: dict[str, Any]) -> str:
    """A case in one line."""
    words = f"{result['case']['name']:34}"
    for name in ("ours", "peer"):
        if name in result:
            figures = result[name]
            rate, error = figures.get("audio_seconds_per_second"), figures.get("error")
            words += f"  {name} " + (f"{rate:9.1f} audio s/s" if rate else f"failed: {error}")
            if rate and "share_of_products" in figures:
                words += f" ({100 * figures['share_of_products']:.0f} % of products)"
    return words + (f"  {result['ratio']:.2f}x" if "ratio" in result else "")


def is_measured(result: dict[str, Any]) -> bool:
    """Whether a case has figures of our side; the peer's alone say nothing about the toolkit."""
    return "audio_seconds_per_second" in result["ours"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases, saving after each; raises TrainingError where nothing was measured."""
    options = parse(argv)
    cases = chosen_cases(options)
    check_device(options.device)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.output.is_dir():
        raise ConfigError(f"--output {options.output} is a folder; name a file.")
    deadline = Deadline(60 * options.minutes)
    document: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/accelerator.py", *(sys.argv[1:] if argv is None else argv)]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "smoke": options.smoke,
        "aim_audio_seconds_per_second": AIM,
        "gflop_per_audio_second": WAV2VEC2_SIZES["base"].gflop(1, 250000) / 15.625,
        "cases": [],
        "not_run": [],
    }
    for case in cases:
        if deadline.left <= 0:
            document["not_run"].append(case.name)
        else:
            document["cases"].append(run_case(case, options, deadline))
            print(line_of(document["cases"][-1]), flush=True)
        # Errors alone must not take the place of figures that a card was lent for.
        if any(map(is_measured, document["cases"])):
            options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if document["not_run"]:
        print(f"the time was over before: {', '.join(document['not_run'])}")
    if not any(map(is_measured, document["cases"])):
        why = "every case failed as said above; mend it" if document["cases"] else "there was no time; raise --minutes"
        raise TrainingError(f"nothing was measured, so {options.output} is left as it was: {why} and run it again.")
    print(f"saved: {options.output}")


if __name__ == "__main__":
    sys.exit(run_main(main))
