"""Time one pretraining step of the toolkit, in turn with the same step of transformers.

    python benchmarks/step.py --peer transformers
    python benchmarks/step.py --model data2vec_text --precision bf16 --save

Each variant is a process that stays alive; they are asked in turn for one step, so that all see the same machine.
Reported are medians, and the ratio is the median of the rounds' ratios. The peer runs twice: as installed, and
with the process settings (allocator, float32 products) that the toolkit makes for its own runs. The last line is one
JSON object.

transformers pretrains wav2vec 2.0 only. Beside data2vec of speech stands a plain implementation on its encoder; beside
data2vec of text (student and teacher) a step of masked language modelling (student and a head over the vocabulary),
on the same tokens with the same masks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from checks import check_device, check_numbers
from step_variants import MODELS

from toolkit.errors import run_main

HERE = Path(__file__).resolve().parent
PEERS = ("peer", "tuned_peer")
WORDS = {"ours": "this toolkit", "peer": "{}, as installed", "tuned_peer": "{}, our process settings"}


class Variant:
    """A process of `step_variants.py` that makes one step when asked."""

    def __init__(self, name: str, options: argparse.Namespace, errors: IO[str] | None = None) -> None:
        command = [sys.executable, str(HERE / "step_variants.py"), "--variant", name]
        for key in ("model", "size", "device", "precision", "batch", "seconds", "length", "threads", "compile_mode",
                    "parallel", "layerdrop"):  # fmt: skip
            value = getattr(options, key, None)
            command += [f"--{key}", str(value)] if value is not None else []
        self.name = name
        # What importing the toolkit sets before torch is loaded; a user's own process of the peer does without.
        waiting = {} if name == "peer" else {"GOMP_SPINCOUNT": "3000"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, **waiting},
        )  # fmt: skip
        self.about = self._read()
        self.steps: list[dict[str, float]] = []

    def ask(self, line: str) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        while True:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit(f"error: the process of {self.name!r} ended; its message is above.")
            if line.startswith("{"):
                return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def median(self, key: str) -> float:
        """Median of a figure over the measured steps."""
        return statistics.median(step[key] for step in self.steps)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="w2v2")
    parser.add_argument("--peer", choices=["transformers", "none"], default="transformers")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=["base", "tiny"], default="base")
    parser.add_argument("--batch", type=int, help="utterances in the batch (2), or blocks of text (4)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each utterance")
    parser.add_argument("--length", type=int, default=512, help="tokens of each block of text")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each variant")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, not measured")
    parser.add_argument("--threads", type=int, help="threads of each process; default: torch's own choice")
    parser.add_argument("--profile", action="store_true", help="also print where our step's time goes")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results")
    options = parser.parse_args(argv)
    if options.batch is None:
        options.batch = MODELS[options.model].batch
    check_numbers(options, batch=1, seconds=0.1, length=1, rounds=1, warmup=0, threads=1)
    check_device(options.device)
    return options


def measure(options: argparse.Namespace) -> tuple[list[Variant], float]:
    """Run all variants in turn; returns them and the rate of matrix products in GFLOP/s."""
    variants = [Variant("ours", options)]
    if options.peer != "none":
        variants += [Variant(name, options) for name in PEERS]
    rates = []
    for number in range(options.warmup + options.rounds):
        rates.append(variants[0].ask("products")["gflops"])
        for variant in variants:
            step = variant.ask("step")
            if number >= options.warmup:
                variant.steps.append(step)
        seen = "  ".join(f"{v.name} {v.steps[-1]['wall']:.2f} s" for v in variants if v.steps)
        print(f"round {number + 1}/{options.warmup + options.rounds}  {seen or 'warm-up'}", file=sys.stderr, flush=True)
    if options.profile:
        variants[0].ask("profile 3")
    for variant in variants:
        variant.close()
    return variants, max(rates)


def summarize(options: argparse.Namespace, variants: Sequence[Variant], product_rate: float) -> dict[str, Any]:
    """The JSON object of the last line."""
    measured = MODELS[options.model]
    amount = measured.amount(options)
    rates = {v.name: amount / v.median("wall") for v in variants}
    ours = variants[0]
    ratios = {
        v.name: statistics.median(theirs["wall"] / own["wall"] for theirs, own in zip(v.steps, ours.steps, strict=True))
        for v in variants[1:]
    }
    memory = {v.name: max(step["peak_memory_gb"] for step in v.steps) for v in variants}
    gflop = measured.gflop(options)
    return {
        "model": options.model,
        "ours": rates["ours"],
        "peer": rates.get("peer"),
        "ratio": ratios.get("peer"),
        "tuned_peer": rates.get("tuned_peer"),
        "tuned_ratio": ratios.get("tuned_peer"),
        "unit": f"{measured.unit}s per second",
        "precision": options.precision,
        "peak_memory_gb": memory["ours"],
        "peer_peak_memory_gb": memory.get("peer"),
        "tuned_peer_peak_memory_gb": memory.get("tuned_peer"),
        "product_gflops": product_rate,
        "share_of_products": gflop / ours.median("wall") / product_rate,
        f"gflop_per_{measured.unit.replace(' ', '_')}": gflop / amount,
        "device": ours.about["device"],
        "threads": ours.about["threads"],
        "size": options.size,
        "batch": options.batch,
        **({"length": options.length} if measured.is_text else {"seconds": options.seconds}),
        "rounds": options.rounds,
        "walls": {v.name: [step["wall"] for step in v.steps] for v in variants},
    }


def table(options: argparse.Namespace, variants: Sequence[Variant], result: dict[str, Any]) -> str:
    """The figures for people."""
    measured = MODELS[options.model]
    amount, unit = measured.amount(options), measured.unit
    length = f"{options.length} tokens" if measured.is_text else f"{options.seconds:g} s"
    lines = [
        f"{options.model} {options.size}, {options.batch} x {length}, {options.precision}, {result['device']}, "
        f"{result['threads']} threads, {options.rounds} rounds",
        f"{'':46}{measured.short_unit:>10}{'best':>8}{'step s':>8}{'user s':>8}{'kernel s':>9}{'peak GB':>9}"
        f"{'ours is':>9}",
    ]
    digits = 0 if measured.is_text else 2
    for variant in variants:
        ratio = {"peer": result["ratio"], "tuned_peer": result["tuned_ratio"]}.get(variant.name)
        best = min(step["wall"] for step in variant.steps)
        lines.append(
            f"{WORDS[variant.name].format(measured.peer_words):46}{amount / variant.median('wall'):10.{digits}f}"
            f"{amount / best:8.{digits}f}"
            f"{variant.median('wall'):8.2f}{variant.median('user'):8.2f}{variant.median('kernel'):9.2f}"
            f"{max(step['peak_memory_gb'] for step in variant.steps):9.2f}"
            + (f"{ratio:8.2f}x" if ratio is not None else "")
        )
    lines.append(
        f"matrix products: {measured.gflop(options) / amount:.3g} GFLOP per {unit}; this machine makes "
        f"{result['product_gflops']:.0f} GFLOP/s of them; our step uses "
        f"{100 * result['share_of_products']:.0f} % of that"
    )
    lines += [f"settings: {sentence}" for sentence in variants[0].about["said"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and save if asked."""
    options = parse(argv)
    variants, product_rate = measure(options)
    result = summarize(options, variants, product_rate)
    print(table(options, variants, result))
    if options.save:
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        kind = options.device.split(":")[0]
        name = options.size if options.model == "w2v2" else f"{options.model}_{options.size}"
        path = folder / f"step_{name}_{kind}_{options.precision}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"saved: {path}")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_main(main))
