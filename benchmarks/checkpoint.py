"""What a checkpoint costs the training loop, written while training waits and written beside it.

    python benchmarks/checkpoint.py --save
    python benchmarks/checkpoint.py --size tiny --seconds 1 --batch 1 --rounds 1

The pretraining model of `step.py` with its AdamW state is saved with and without waiting, in turn. Measured are the
seconds that `Checkpointer.save` holds the loop, the seconds until the folder is complete, and how much longer updates
take while the thread writes. The share of training time follows from these for two intervals: 15 minutes (the
default) and 100 updates. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from checks import check_numbers
from step_models import WAV2VEC2_SIZES, OurWav2Vec2

from toolkit.errors import ConfigError, run_main
from toolkit.training.checkpoint import Checkpointer
from toolkit.training.devices import resolve_device

HERE = Path(__file__).resolve().parent
RATE = 16000
MINUTES, UPDATES = 15, 100
"""The intervals for which the share is worked out."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=WAV2VEC2_SIZES, default="base")
    parser.add_argument("--batch", type=int, default=2, help="utterances in the batch")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each utterance")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind that are measured")
    parser.add_argument("--threads", type=int, help="threads for products on the CPU; torch's own choice without")
    parser.add_argument("--folder", type=Path, help="where to write (that disk is measured); a temporary one without")
    parser.add_argument("--note", default="", help="kept with the result: what else ran on the machine")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results")
    options = parser.parse_args(argv)
    check_numbers(options, batch=1, seconds=0.1, rounds=1, threads=1)
    if options.folder is not None and not options.folder.is_dir():
        raise ConfigError(f"--folder {options.folder} is no folder; name one that exists, on the disk to be measured.")
    return options


def clocked(function: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of every update and save, by kind."""
    device = resolve_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    ours = OurWav2Vec2(WAV2VEC2_SIZES[options.size], device, options.precision)
    step = ours.prepare(torch.randn(options.batch, round(options.seconds * RATE)).to(device.torch_device))
    checkpointer = Checkpointer(folder)
    checkpointer.add("model", ours.model)
    checkpointer.add("optimizer", ours.step.optimizer)

    def update() -> None:
        step()
        device.synchronize()

    update()  # makes the optimizer's state
    first = clocked(lambda: checkpointer.save(ours.update, wait=False))  # makes the buffers
    checkpointer.wait()
    walls: dict[str, list[float]] = {
        "update": [], "waits_held": [], "background_held": [], "background_complete": [], "update_beside": [],
        "slower": [],
    }  # fmt: skip
    for _ in range(options.rounds):
        walls["update"].append(clocked(update))
        walls["waits_held"].append(clocked(lambda: checkpointer.save(ours.update)))
        walls["update"].append(clocked(update))
        began = time.perf_counter()
        walls["background_held"].append(clocked(lambda: checkpointer.save(ours.update, wait=False)))
        checkpointer.wait()
        walls["background_complete"].append(time.perf_counter() - began)
        checkpointer.save(ours.update, wait=False)
        beside = []
        while checkpointer.is_writing:
            beside.append(clocked(update))
        checkpointer.wait()
        walls["update_beside"] += beside
        walls["slower"].append(sum(beside) - len(beside) * statistics.median(walls["update"][-2:]))
    path = checkpointer.find_latest()
    size = sum(file.stat().st_size for file in path.iterdir())
    threads = torch.get_num_threads()
    return {"walls": walls, "first_background_held": first, "checkpoint_bytes": size, "threads": threads}


def shares(lost: float, update: float) -> dict[str, float]:
    """Share of the training time that goes into saving, by interval, where a save costs ``lost`` seconds."""
    return {
        f"share_{MINUTES}_minutes": lost / (60 * MINUTES + lost),
        f"share_{UPDATES}_updates": lost / (UPDATES * update + lost),
    }


def summarize(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, and the shares of both ways."""
    median = {name: statistics.median(seconds) for name, seconds in measured["walls"].items() if seconds}
    # Beside the wait for the copy, an update that shares the machine with the writing thread takes longer.
    lost = median["background_held"] + max(0.0, median["slower"])
    return {
        "update_seconds": median["update"],
        "waits": {"held_seconds": median["waits_held"], "complete_seconds": median["waits_held"],
                  **shares(median["waits_held"], median["update"])},
        "background": {"held_seconds": median["background_held"], "complete_seconds": median["background_complete"],
                       "slower_seconds": median["slower"], "lost_seconds": lost, **shares(lost, median["update"])},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and save if asked."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured = measure(options, Path(folder) / "save")
        disk = shutil.disk_usage(folder)
    result = {
        **summarize(measured),
        **measured,
        "unit": "seconds",
        "command": " ".join(["python benchmarks/checkpoint.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": {"device": options.device, "cpu": platform.processor() or platform.machine(),
                    "cores": os.cpu_count(), "load": os.getloadavg()[0], "disk_gb": round(disk.total / 1e9),
                    "torch": torch.__version__},
        "note": options.note,
        **{name: getattr(options, name) for name in ("precision", "size", "batch", "seconds", "rounds")},
    }  # fmt: skip
    print(f"\n{measured['checkpoint_bytes'] / 1e9:.2f} GB; an update takes {result['update_seconds']:.2f} s")
    for way in ("waits", "background"):
        row = result[way]
        print(
            f"{way}: the loop is held {row['held_seconds']:.2f} s, complete after {row['complete_seconds']:.2f} s; "
            f"{100 * row[f'share_{MINUTES}_minutes']:.3f} % of the time at {MINUTES} minutes, "
            f"{100 * row[f'share_{UPDATES}_updates']:.2f} % at {UPDATES} updates"
        )
    if options.save:
        path = HERE / "results" / f"checkpoint_{options.size}_{options.device.split(':')[0]}_{options.precision}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"saved: {path}")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_main(main))
