"""What the preparation of a corpus looks up and remembers: files, what is in them, and what was written before.

Nothing that is remembered is believed blindly: a damaged line or file is passed over, and its work done again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from toolkit.data.audio import audio_info, read_audio
from toolkit.errors import AudioError

AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".oga", ".opus", ".mp3")
FEW_FILES = 1000  # below this, starting processes costs more than it saves


def list_tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of change (ns) of every audio and transcript file, by path relative to ``folder``."""
    tree = {}
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    pending.append(entry.path)
                elif entry.name.endswith(".trans.txt") or entry.name.lower().endswith(AUDIO_SUFFIXES):
                    status = entry.stat()
                    tree[os.path.relpath(entry.path, folder)] = (status.st_size, status.st_mtime_ns)
    return tree


def inspect_file(path: str, check: str) -> dict:
    """Frames and sample rate of one file, or the error that reading it gave."""
    try:
        info = audio_info(path)
        frames = info.num_samples
        if check == "decode":
            frames = len(read_audio(path, sample_rate=info.sample_rate))
        if frames == 0:
            return {"error": "no samples"}
        return {"frames": int(frames), "rate": int(info.sample_rate)}
    except AudioError as error:
        return {"error": str(error)}


def scan(folder: Path, tree: Mapping[str, tuple[int, int]], memory: Path, check: str,
         num_workers: int | None) -> dict[str, dict]:
    """Facts about every audio file, taken from ``memory`` where the file is unchanged; new ones are added to it."""
    audio = sorted(name for name in tree if not name.endswith(".trans.txt"))
    known = read_memory(memory, check)
    facts = {name: known[name] for name in audio if name in known and known[name]["stamp"] == list(tree[name])}
    todo = [name for name in audio if name not in facts]
    if not todo:
        return facts
    memory.parent.mkdir(parents=True, exist_ok=True)
    workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
    paths = [str(folder / name) for name in todo]
    inspect = partial(inspect_file, check=check)
    with open(memory, "a", encoding="utf-8") as stream:
        def keep(results: Iterable[dict]) -> None:
            bar = tqdm(results, total=len(todo), desc=f"{folder.name} ({check})", unit="file", disable=None)
            for count, (name, found) in enumerate(zip(todo, bar, strict=True)):
                facts[name] = {"file": name, "stamp": list(tree[name]), "check": check, **found}
                stream.write(json.dumps(facts[name], ensure_ascii=False) + "\n")
                if count % 100 == 0:
                    stream.flush()

        if len(todo) < FEW_FILES or workers < 2:
            keep(map(inspect, paths))
        else:  # spawn: the caller may hold threads (torch), which fork would copy in a broken state
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                try:
                    keep(pool.map(inspect, paths, chunksize=64))
                finally:  # told to stop, it ends without the files that are left
                    pool.shutdown(cancel_futures=True)
    return facts


def read_memory(memory: Path, check: str) -> dict[str, dict]:
    """What an earlier run learned; a line cut off by a kill is passed over. Headers do not stand in for decoding."""
    known = {}
    if memory.is_file():
        for line in memory.read_bytes().split(b"\n"):
            try:
                fact = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                continue
            if is_fact(fact) and fact["check"] in ("decode", check):
                known[fact["file"]] = fact
    return known


def is_fact(value: object) -> bool:
    """Whether ``value`` is what :func:`scan` writes about a file."""
    if not (isinstance(value, dict) and isinstance(value.get("file"), str) and isinstance(value.get("stamp"), list)):
        return False
    counted = all(type(value.get(name)) is int and value[name] > 0 for name in ("frames", "rate"))
    return isinstance(value.get("check"), str) and (counted or isinstance(value.get("error"), str))


def read_summary(path: Path) -> dict[str, dict]:
    """The summary of an earlier run, or an empty one where there is none or it is damaged."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
        # what cannot be written again is not worth keeping either
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return {name: entry for name, entry in value.items() if isinstance(entry, dict)} if isinstance(value, dict) else {}


def is_unchanged(manifest: Path, entry: dict | None, key: str) -> bool:
    """Whether ``manifest`` is what an earlier run with the same options wrote from the same files."""
    if not entry or entry.get("key") != key or not manifest.is_file():
        return False
    return manifest.stat().st_size == entry.get("bytes") and file_digest(manifest) == entry.get("sha256")


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
