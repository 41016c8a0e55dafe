"""What the loader delivers from loose files, shards and PCM shards, beside a plain torch DataLoader with soundfile.

    python benchmarks/loader.py --data_folder /corpora/LibriSpeech --save

The same utterances (every .flac below the folder, up to `--utterances`, repeated by copies) go through our loader from
loose files, from shards of FLAC and from shards of 16-bit PCM, and through a torch DataLoader whose dataset reads each
file whole with soundfile and whose collation pads, as SpeechBrain's recipes do. All in turn in one process, several
rounds; a pass counts from the second epoch on, with workers that run. `pad`: whole utterances. `crop`: crops of
`--crop_seconds`, where the peer has to read the whole file. Files are in the page cache.

Then a manifest of `--rows` rows (281,241 are LibriSpeech's 960 hours), its audio the packed utterances again and again,
is opened in a process of its own: seconds until the first batch, and the memory (PSS) of it and of two workers beyond
what the imports take; and beside it a list of rows with the torch DataLoader. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from checks import check_numbers
from torch.utils.data import DataLoader, Dataset

from toolkit.data.audio import audio_info
from toolkit.data.dataset import DynamicItemDataset, speech_items
from toolkit.data.loader import PREFETCH, Loader
from toolkit.data.manifest import Manifest, read_manifest, write_manifest
from toolkit.data.sampler import BucketSampler
from toolkit.data.shards import pack
from toolkit.errors import ConfigError, WorkerError, run_main

HERE = Path(__file__).resolve().parent
RATE = 16000
WORDS = "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG AND RUNS INTO THE WOODS BEFORE ANYBODY CAN SAY A WORD ABOUT IT "
WORKERS_OF_NODE = 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_folder", required=True, help="folder of .flac files")
    parser.add_argument("--utterances", type=int, default=200, help="utterances of a pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch_seconds", type=float, default=100.0)
    parser.add_argument("--crop_seconds", type=float, default=4.0)
    parser.add_argument("--rows", type=int, default=281_241, help="rows of the large manifest; 0 leaves it out")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results")
    parser.add_argument("--measure", nargs=2, metavar=("WHICH", "MANIFEST"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    check_numbers(options, utterances=1, rounds=1, workers=0, batch_seconds=0.1, crop_seconds=0.1, rows=0)
    return options


# -------------------------------------------------------------------- the peer


class WholeFiles(Dataset):
    """What a recipe on a plain torch Dataset does: rows as dictionaries, each file read whole."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        row = self.rows[index]
        return row["ID"], torch.from_numpy(soundfile.read(row["wav"], dtype="float32")[0])


def pad_batch(items: list[tuple[str, torch.Tensor]], crop: int | None) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """IDs, waveforms padded to the longest (or cropped at random), and lengths."""
    names, waveforms = zip(*items, strict=True)
    if crop is not None:
        starts = [int(torch.randint(max(1, len(w) - crop), (1,))) for w in waveforms]
        waveforms = [w[start : start + crop] for w, start in zip(waveforms, starts, strict=True)]
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    return list(names), torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True), lengths


class Collate:
    """`pad_batch` with its crop length."""

    def __init__(self, crop: int | None) -> None:
        self.crop = crop

    def __call__(self, items: list[tuple[str, torch.Tensor]]) -> Any:
        return pad_batch(items, self.crop)


# -------------------------------------------------------------------- throughput


def make_sampler(manifest: Manifest, options: argparse.Namespace, mode: str) -> BucketSampler:
    limits = {"max_seconds": options.crop_seconds} if mode == "crop" else {}
    return BucketSampler(manifest.durations, batch_seconds=options.batch_seconds, mode=mode, seed=1, **limits)


def ours(manifest: Manifest, options: argparse.Namespace, mode: str, workers: int) -> Iterator[float]:
    """Endless epochs of our loader; each item is the seconds of audio in a batch."""
    dataset = DynamicItemDataset(manifest, speech_items(RATE), ["id", "waveform"])
    loader = Loader(dataset, make_sampler(manifest, options, mode), num_workers=workers)
    try:
        for epoch in itertools.count():
            for micro in loader.epoch(epoch):
                yield float(micro.batch.lengths.sum()) / RATE
            yield -1.0
    finally:
        loader.close()


def plain(manifest: Manifest, options: argparse.Namespace, mode: str, workers: int) -> Iterator[float]:
    """The same batches of a torch DataLoader."""
    rows = [manifest.row(row) for row in range(len(manifest))]
    sampler = make_sampler(manifest, options, mode)
    counts: list[int] = []

    def batches() -> Iterator[list[int]]:
        for epoch in range(100):
            plan = sampler.plan(epoch)
            counts.append(plan.num_batches)
            yield from (plan.batch_rows(batch).tolist() for batch in range(plan.num_batches))

    crop = round(options.crop_seconds * RATE) if mode == "crop" else None
    prefetch = {"prefetch_factor": PREFETCH} if workers else {}
    stream = iter(
        DataLoader(WholeFiles(rows), batch_sampler=batches(), num_workers=workers, collate_fn=Collate(crop), **prefetch)
    )
    for epoch in range(100):
        made = 0
        while made == 0 or made < counts[epoch]:
            yield float(next(stream)[2].sum()) / RATE
            made += 1
        yield -1.0


def seconds_of_an_epoch(stream: Iterator[float]) -> tuple[float, float]:
    """Wall seconds of the second epoch, and the seconds of audio in it."""
    for audio in stream:
        if audio < 0:
            break
    started, total = time.perf_counter(), 0.0
    for audio in stream:
        if audio < 0:
            break
        total += audio
    wall = time.perf_counter() - started
    stream.close()
    return wall, total


def throughput(options: argparse.Namespace, manifests: dict[str, Manifest]) -> dict[str, Any]:
    """Median audio seconds and utterances per second of each way, by mode and number of workers."""
    result: dict[str, Any] = {}
    for mode in ("pad", "crop"):
        for workers in options.workers:
            ways: dict[str, Callable[[], Iterator[float]]] = {
                name: (lambda m=manifest, w=workers, o=mode: ours(m, options, o, w))
                for name, manifest in manifests.items()
            }
            ways["torch_dataloader"] = lambda w=workers, o=mode: plain(manifests["loose"], options, o, w)
            walls: dict[str, list[float]] = {name: [] for name in ways}
            audio = dict.fromkeys(ways, 0.0)
            for _ in range(options.rounds):
                for name, make in ways.items():
                    gc.collect()
                    wall, audio[name] = seconds_of_an_epoch(make())
                    walls[name].append(wall)
            count = len(manifests["loose"])
            result[f"{mode}, {workers} workers"] = {
                name: {
                    "audio_seconds_per_second": audio[name] / statistics.median(found),
                    "utterances_per_second": count / statistics.median(found),
                    "walls": found,
                }
                for name, found in walls.items()
            }
            line = ", ".join(
                f"{name} {audio[name] / statistics.median(found):,.0f}" for name, found in walls.items()
            )
            print(f"{mode}, {workers} workers: {line} audio s/s", flush=True)
    return result


# -------------------------------------------------------------------- the large manifest


def memory(others: Sequence[int] = ()) -> float:
    """MB of this process and of ``others``, each shared page once (PSS)."""
    total = 0
    for process in (os.getpid(), *others):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1000


def children() -> list[int]:
    """Processes that this one has started."""
    return [int(word) for word in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def measure_large(options: argparse.Namespace, which: str, path: str) -> dict[str, float]:
    """Start-up and memory on a large manifest, in a process that has done nothing else."""
    gc.collect()
    base, started = memory(), time.perf_counter()
    batches: Iterable[Any]
    if which == "ours":
        manifest = read_manifest(path)
        read = time.perf_counter()
        dataset = DynamicItemDataset(manifest, speech_items(RATE), ["id", "waveform"])
        sampler = make_sampler(manifest, options, "crop")
        sampler.plan(0)
        planned = time.perf_counter()
        batches = Loader(dataset, sampler, num_workers=WORKERS_OF_NODE).epoch(0)
    else:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        read = time.perf_counter()
        size = max(1, round(options.batch_seconds / options.crop_seconds))
        collate = Collate(round(options.crop_seconds * RATE))
        batches = DataLoader(WholeFiles(rows), size, shuffle=True, num_workers=WORKERS_OF_NODE, collate_fn=collate,
                             prefetch_factor=PREFETCH)  # fmt: skip
        planned = time.perf_counter()
    main = memory()  # no worker shares it yet
    batches = iter(batches)
    next(batches)
    first = time.perf_counter()
    for _ in itertools.islice(batches, 100):
        pass
    node = memory(children())
    return {
        "seconds_to_read": read - started, "seconds_to_plan": planned - read, "seconds_to_first_batch": first - started,
        "imports_mb": base, "main_growth_mb": main - base, "node_growth_mb": node - base, "workers": WORKERS_OF_NODE,
    }  # fmt: skip


def large(options: argparse.Namespace, folder: Path, manifests: dict[str, Manifest]) -> dict[str, Any]:
    """Both kinds of loader on manifests of ``options.rows`` rows, each in a process of its own."""
    with open(folder / "pcm" / "manifest.csv", newline="", encoding="utf-8") as file:
        packed = list(csv.DictReader(file))
    loose = [manifests["loose"].row(row) for row in range(len(manifests["loose"]))]
    result: dict[str, Any] = {"rows": options.rows}
    for which, rows, path in (
        ("ours", packed, folder / "pcm" / "large.csv"),
        ("torch_dataloader", loose, folder / "large_loose.csv"),
    ):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for index, row in zip(range(options.rows), itertools.cycle(rows), strict=False):
                text = WORDS * 2
                writer.writerow(row | {"ID": f"{row['ID']}-{index:06d}", "wrd": text[: 100 + 37 * index % 160]})
        if which == "ours":
            result["manifest_mb"] = read_manifest(path).nbytes / 1e6
        words = ["--data_folder", options.data_folder, "--measure", which, str(path)]
        words += ["--batch_seconds", str(options.batch_seconds), "--crop_seconds", str(options.crop_seconds)]
        done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise WorkerError(f"the process that measures {which} ended with {done.returncode}; its message is above.")
        result[which] = json.loads(done.stdout.splitlines()[-1])
        print(f"{options.rows:,} rows, {which}: {json.dumps(result[which])}", flush=True)
    return result


# -------------------------------------------------------------------- all of it


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Manifest]:
    """Loose copies of the corpus's files, packed in both ways."""
    files = sorted(Path(options.data_folder).rglob("*.flac"))
    if not files:
        raise ConfigError(f"there is no .flac file below {options.data_folder}; check --data_folder.")
    (folder / "loose").mkdir()
    rows = []
    for index, source in zip(range(options.utterances), itertools.cycle(files), strict=False):
        path = folder / "loose" / f"{source.stem}-{index // len(files)}.flac"
        shutil.copy(source, path)
        text = WORDS[: 20 + index % 60]
        rows.append({"ID": path.stem, "duration": audio_info(path).duration, "wav": str(path), "wrd": text})
    loose = Manifest.from_rows(rows)
    write_manifest(folder / "loose.csv", loose)
    pack(loose, folder / "shards", shard_mb=50, check="header")
    pack(loose, folder / "pcm", shard_mb=50, pcm=RATE)
    packed = {name: read_manifest(folder / name / "manifest.csv") for name in ("shards", "pcm")}
    return {"loose": loose, **packed}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and save if asked."""
    options = parse(argv)
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(measure_large(options, *options.measure)))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifests = prepare(options, folder)
        result: dict[str, Any] = {
            # without the place of the corpus on this machine
            "command": "python benchmarks/loader.py "
            + " ".join(Path(word).name if "/" in word else word for word in (sys.argv[1:] if argv is None else argv)),
            "utterances": len(manifests["loose"]),
            "audio_seconds": float(np.sum(manifests["loose"].durations)),
            "rounds": options.rounds,
            "cores": os.cpu_count(),
            "peer": "torch DataLoader, soundfile, whole files, padded; SpeechBrain itself is not run",
            "throughput": throughput(options, manifests),
        }
        if options.rows:
            result["large"] = large(options, folder, manifests)
    # What ran beside: well above the number of busy processes here, other work shared the cores.
    result["load_before"], result["load_after"] = load, os.getloadavg()[0]
    if options.save:
        path = HERE / "results" / "loader_cpu.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"saved: {path}")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_main(main))
