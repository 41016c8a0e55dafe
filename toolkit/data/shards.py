"""Packed audio: a manifest's utterances in a few large tar files, which file systems and copies like better.

A folder of shards holds ``shard-000000.tar``, ...; ``manifest.csv``, whose rows name shard, offset and size in place of
a path, for random access by anything that takes a manifest; and ``index.json`` with a SHA-256 of each file. In a shard
each utterance is its audio and, under the same name, a ``.json`` of its row: :func:`iterate` reads them front to back,
and so does the webdataset library.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toolkit.data.audio import ENTRY, AudioFile, open_entry
from toolkit.data.manifest import Manifest, read_manifest, whole_file
from toolkit.data.pcm import HEADER, encode_wav
from toolkit.data.shard_index import (
    INDEX_NAME,
    MANIFEST_NAME,
    PROGRESS_NAME,
    Shard,
    begin,
    entry_name,
    file_digest,
    finish,
    finished_shards,
    locked,
    read_index,
    shard_number,
)
from toolkit.data.shard_rows import SHARD_COLUMNS
from toolkit.data.table import shortened
from toolkit.data.tar_format import BLOCK, LARGEST_ENTRY, LONGEST_NAME, padded, tar_header, walk
from toolkit.errors import AudioError, ConfigError, ManifestError
from toolkit.seeds import Randomness

__all__ = ["PackReport", "iterate", "pack", "verify"]

FORMAT = 1
"""Of the folder; another number means that its bytes are made in another way."""

ROW_BYTES = 2 * BLOCK
"""What an utterance's ``.json`` is taken to need when the shards are planned."""

LARGEST_ROW = 1 << 24
"""Bytes of an utterance's ``.json`` at most."""

LONGEST_KEY = LONGEST_NAME - len(".") - 15
"""Bytes of an utterance's name in a shard at most; what is left is for the suffix."""

NAMED = 5
"""Bad utterances that the error message quotes in full."""

SUFFIXES = {"WAVEX": "wav", "RF64": "wav", "MPEG": "mp3"}
"""Suffixes that are not libsndfile's name of the format in small letters."""


@dataclass(frozen=True)
class PackOptions:
    """What, besides the manifest, decides about the bytes of the shards; see :func:`pack`."""

    shard_mb: float
    pcm: int | None
    shuffle: int | None
    check: str


@dataclass(frozen=True)
class PackReport:
    """What stands in a folder of shards now.

    Arguments
    ---------
    manifest : its path.
    utterances, shards, bytes : numbers of them.
    kept : shards that an earlier run had finished.
    left_out : ID and reason of each utterance whose audio is bad.
    """

    manifest: Path
    utterances: int
    shards: int
    bytes: int
    kept: int
    left_out: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Task:
    """One shard to be written: the rows of the manifest as dictionaries, by their index."""

    name: str
    folder: str
    rows: tuple[tuple[int, dict[str, Any]], ...]
    options: PackOptions


def pack(
    manifest: Manifest,
    folder: str | os.PathLike[str],
    *,
    shard_mb: float = 500,
    pcm: int | None = None,
    shuffle: int | None = None,
    check: Literal["decode", "header"] = "decode",
    max_bad_share: float = 0.01,
    num_workers: int = 1,
    say: Callable[[str], object] = print,
) -> PackReport:
    """Pack a manifest into shards. Interrupted, the same call goes on, keeps what is finished and ends the same.

    The manifest of the shards has the rows of the given one in the same order, so plans, batches and the rule of
    resuming are the same for both. The bytes depend on the manifest, the audio and the options, not on the workers.

    Arguments
    ---------
    manifest : what to pack; it may itself be of shards or of zip entries.
    folder : a new one, or that of an earlier call.
    shard_mb : megabytes (1e6 bytes) of a shard, about; a longer utterance has a shard for itself.
    pcm : None copies the audio's bytes as they are. A number of Hz decodes, mixes down and resamples to it, and stores
        16-bit WAV: two to three times the size of FLAC, and no decoder in training.
    shuffle : a seed: utterances stand in the shards in a random order, for readers that go front to back. None keeps
        the manifest's order. The rows of the new manifest keep it in both cases.
    check : "decode" reads all audio to its end, "header" believes the header (faster; misses truncated files).
    max_bad_share : share of the utterances whose audio may be bad; they are left out, and named in the index.
    num_workers : processes that pack.
    say : takes sentences about what is left out.

    Raises
    ------
    ConfigError : an option is out of range; the folder is a file or holds something else, or another process packs into
        it.
    ManifestError : the manifest or its audio has changed since the folder was begun, its index is damaged, or an ID or
        a row is too long for a shard.
    AudioError : more audio is bad than ``max_bad_share`` allows.
    OSError : the folder cannot be written, or the disk is full.
    """
    options = PackOptions(float(shard_mb), pcm, shuffle, check)
    _check_options(options, max_bad_share, num_workers)
    taken = [name for name in SHARD_COLUMNS if name in manifest.columns]
    if taken:
        raise ManifestError(f"{manifest.source} has a column {taken[0]!r}, which shards need; give it another name.")
    _check_ids(manifest)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{folder} is a file or lies under one; name a new folder for the shards.") from error
    with locked(folder):
        sizes = _source_sizes(manifest)
        plan = {
            "format": FORMAT,
            "utterances": len(manifest),
            "fingerprint": manifest.fingerprint(),
            "sizes": hashlib.sha256(np.ascontiguousarray(sizes, dtype="<i8")).hexdigest(),
            "options": asdict(options),
        }
        groups = _groups(manifest, sizes, options)
        done = {n: shard for n, shard in finished_shards(folder, plan, manifest, say).items() if n in groups}
        kept = len(done)
        allowed = max_bad_share * len(manifest)
        # What an earlier run left out counts too, also where nothing is left to do; before anything is written.
        _check_share(_bad_of(done.values()), allowed, manifest)
        begin(folder, plan, done)
        todo = [number for number in groups if number not in done]
        tasks = (_task(manifest, folder, number, groups[number], options) for number in todo)
        with open(folder / PROGRESS_NAME, "a", encoding="utf-8") as progress:
            for shard in _packed(tasks, min(num_workers, len(todo))):
                done[shard_number(shard.name)] = shard
                progress.write(json.dumps(shard.record()) + "\n")
                progress.flush()
                _check_share(_bad_of(done.values()), allowed, manifest)
        shards = [done[number] for number in sorted(done)]
        finish(folder, plan, manifest, shards)
        for identity, reason in _bad_of(shards):
            say(f"left out: utterance {identity}: {reason}")
        return _report(folder, shards, kept)


def verify(folder: str | os.PathLike[str]) -> PackReport:
    """Compare a folder of shards with its index: every file's SHA-256, and every row with its entry in the shard.

    Raises
    ------
    ManifestError : there is no index, it is damaged, or a file is missing, damaged or does not fit; all of these are
        named.
    """
    folder = Path(folder)
    index = read_index(folder)
    if index is None:
        raise ManifestError(f"{folder} has no {INDEX_NAME}; name a folder of shards, or pack them again.")
    names = [shard["name"] for shard in index["shards"]]
    problems = []
    for record in [index["manifest"], *index["shards"]]:
        path = folder / record["name"]
        if not path.is_file():
            problems.append(f"{path.name} is missing")
        elif file_digest(path) != record["sha256"]:
            problems.append(f"{path.name} has changed since it was written")
    if problems:
        raise ManifestError(f"{folder}: {'; '.join(problems)}; run the same packing again to mend it.")
    manifest = read_manifest(folder / MANIFEST_NAME)
    wanted = dict(zip(manifest.column("wav"), manifest.ids, strict=True))
    base = os.path.abspath(folder)
    for name in names:
        for row, _ in iterate(os.path.join(base, name)):
            if wanted.pop(row["wav"], None) != row["ID"]:
                raise ManifestError(f"{folder}: {name} holds utterance {row['ID']}, which the manifest has elsewhere.")
    if wanted:
        raise ManifestError(f"{folder}: no shard holds utterance {next(iter(wanted.values()))} where its row says.")
    left_out = tuple((identity, reason) for shard in index["shards"] for identity, reason in shard["left_out"])
    size = sum(shard["bytes"] for shard in index["shards"])
    return PackReport(folder / MANIFEST_NAME, len(manifest), len(names), size, len(names), left_out)


def iterate(shard: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The utterances of a shard, front to back, one in memory at a time.

    Arguments
    ---------
    shard : a tar that :func:`pack` made; nothing of it is written anywhere.

    Yields
    ------
    The row as a dictionary (``wav`` is what :func:`~toolkit.data.audio.read_audio` takes), and the audio's bytes.

    Raises
    ------
    AudioError : the tar is truncated, or holds anything else than audio with its row; see
        :func:`~toolkit.data.tar_format.tar_entries`.
    """
    path = os.path.abspath(shard)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise AudioError(f"the shard {path} cannot be opened: {error.strerror}; check the path.") from error
    with file:
        entries = walk(file, path)
        for entry in entries:
            row = next(entries, None)
            key = entry.name.rpartition(".")[0]
            if row is None or row.name != f"{key}.json":
                raise AudioError(f"{path}: no {key}.json follows {entry.name!r}; pack the shard again.")
            if entry.size > LARGEST_ENTRY or row.size > LARGEST_ROW:
                raise AudioError(f"{path}: {entry.name!r} or its row is too large to be an utterance.")
            file.seek(entry.offset)
            audio = file.read(entry.size)
            file.seek(row.offset)
            try:
                values = json.loads(file.read(row.size).decode("utf-8"))
                identity = values["ID"]
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise AudioError(f"{path}: {row.name!r} is no utterance's row; pack the shard again.") from error
            if not isinstance(identity, str) or entry_name(identity) != key:
                raise AudioError(f"{path}: {row.name!r} is the row of another utterance; pack the shard again.")
            yield values | {"wav": f"{path}:{entry.offset}:{entry.size}"}, audio


# -------------------------------------------------------------------- what goes where


def _check_options(options: PackOptions, max_bad_share: float, num_workers: int) -> None:
    if not 0 < options.shard_mb <= 1e6:
        raise ConfigError(f"shard_mb is {options.shard_mb:g}, expected megabytes greater than 0 and at most a million.")
    if options.pcm is not None and not 1000 <= options.pcm <= 400_000:
        raise ConfigError(f"pcm is {options.pcm}, expected a sample rate from 1000 to 400000 Hz, as 16000.")
    if options.check not in ("decode", "header"):
        raise ConfigError(f"check is {options.check!r}; take 'decode' or 'header'.")
    if not 0 <= max_bad_share <= 1:
        raise ConfigError(f"max_bad_share is {max_bad_share!r}, expected a share from 0 to 1 (0.01 = 1 %).")
    if num_workers < 1:
        raise ConfigError(f"workers is {num_workers}, expected at least 1.")


def _check_ids(manifest: Manifest) -> None:
    """Refuse IDs that make longer names than a tar's reader takes; packed, they could not be read again."""
    # A byte becomes three at most, so that hardly an ID has to be encoded to know.
    for row in np.flatnonzero(3 * np.diff(manifest.ids.offsets.astype(np.int64)) > LONGEST_KEY).tolist():
        identity = manifest.ids[row]
        length = len(entry_name(identity))
        if length > LONGEST_KEY:
            raise ManifestError(
                f"{manifest.source}, row {row + 1}: the ID {shortened(identity)!r} needs {length:,} bytes as a name in "
                f"a shard, which may have {LONGEST_KEY:,}; give the utterance a shorter ID."
            )


def _source_sizes(manifest: Manifest) -> np.ndarray:
    """(rows,) bytes of each audio file, -1 where it is missing: packing will say why."""
    sizes = np.empty(len(manifest), dtype=np.int64)
    for row, wav in enumerate(manifest.column("wav")):
        entry = ENTRY.fullmatch(wav)
        try:
            sizes[row] = os.stat(wav).st_size if entry is None else min(int(entry["length"]), LARGEST_ENTRY)
        except (OSError, ValueError):
            sizes[row] = -1
    return sizes


def _groups(manifest: Manifest, sizes: np.ndarray, options: PackOptions) -> dict[int, np.ndarray]:
    """The rows of each shard, in their order there; a function of the manifest, the sizes and the options."""
    if options.pcm is not None:
        sizes = HEADER + 2 * np.rint(manifest.durations * options.pcm).astype(np.int64)
    needed = -(-np.maximum(sizes, 0) // BLOCK) * BLOCK + 2 * BLOCK + ROW_BYTES
    order = np.arange(len(manifest))
    if options.shuffle is not None:
        order = Randomness(options.shuffle).numpy("shards").permutation(len(manifest))
    limit, filled, first = options.shard_mb * 1e6, 0, 0
    starts = [0]
    for place, size in enumerate(needed[order].tolist()):
        if filled + size > limit and place > first:
            starts.append(place)
            first, filled = place, 0
        filled += size
    return dict(enumerate(np.split(order, starts[1:])))


def _task(manifest: Manifest, folder: Path, number: int, rows: np.ndarray, options: PackOptions) -> _Task:
    values = tuple((row, manifest.row(row)) for row in rows.tolist())
    return _Task(f"shard-{number:06d}.tar", str(folder), values, options)


# -------------------------------------------------------------------- writing


def _packed(tasks: Iterator[_Task], num_workers: int) -> Iterator[Shard]:
    """Write the shards, in this process or in several, and give each as it is finished."""
    if num_workers < 2:
        yield from map(_write_shard, tasks)
        return
    # spawn: the caller may hold threads (torch), which fork would copy in a broken state
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _end_with_parent) as pool:
        try:
            # A task holds its rows, so only few are made ahead.
            pending: set[Future[Shard]] = {pool.submit(_write_shard, task) for task in islice(tasks, 2 * num_workers)}
            while pending:
                ended, pending = wait(pending, return_when=FIRST_COMPLETED)
                pending |= {pool.submit(_write_shard, task) for task in islice(tasks, len(ended))}
                for future in ended:
                    yield future.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                "a packing process was killed, most likely because memory ran out; lower --workers and run the same "
                "command again to go on."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Let a worker end when the process that it works for has been killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all of them; the parent speaks for all

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(task: _Task) -> Shard:
    """Write one shard under a temporary name, and give it its own when all of it is on the disk."""
    path = Path(task.folder) / task.name
    digest, place = hashlib.sha256(), 0
    left_out, places = [], []
    with whole_file(path) as temporary, _named(path), open(temporary, "wb") as file:

        def write(content: bytes) -> None:
            nonlocal place
            file.write(content)
            digest.update(content)
            place += len(content)

        def add(name: str, content: bytes) -> None:
            write(tar_header(name, len(content)))
            write(content)
            write(bytes(padded(len(content)) - len(content)))

        for number, row in task.rows:
            wav = str(row.pop("wav"))
            try:
                suffix, audio = _audio_of(wav, task.options)
            except AudioError as error:
                left_out.append((str(row["ID"]), str(error)))
                continue
            key = entry_name(str(row["ID"]))
            add(f"{key}.{suffix}", audio)
            places.append((number, place - padded(len(audio)), len(audio)))
            values = json.dumps(row, ensure_ascii=False).encode("utf-8")
            if len(values) > LARGEST_ROW:
                identity = shortened(str(row["ID"]))
                raise ManifestError(
                    f"row {number + 1} of the manifest (utterance {identity}) has {len(values):,} bytes of text, more "
                    f"than the {LARGEST_ROW:,} that a shard takes; leave columns out or cut the utterance."
                )
            add(f"{key}.json", values)
        write(bytes(2 * BLOCK))
    return Shard(task.name, place, digest.hexdigest(), tuple(left_out), tuple(places))


def _audio_of(wav: str, options: PackOptions) -> tuple[str, bytes]:
    """Suffix and bytes of an utterance as they will stand in the shard; raises AudioError."""
    with AudioFile(wav) as audio:
        if options.pcm is not None:
            content = encode_wav(audio.read(sample_rate=options.pcm), options.pcm)
            if len(content) > LARGEST_ENTRY:
                raise AudioError(f"{wav} is longer than a shard can hold; cut it into utterances.")
            return "wav", content
        if options.check == "decode":
            audio.read()
        suffix = SUFFIXES.get(audio.format, audio.format.lower())
    try:
        with open_entry(wav) or open(wav, "rb") as file:
            content = file.read(LARGEST_ENTRY + 1)
    except OSError as error:
        raise AudioError(f"{wav} cannot be read: {error.strerror}; copy the file again.") from error
    if len(content) > LARGEST_ENTRY:
        raise AudioError(f"{wav} is larger than a shard can hold; cut it into utterances.")
    return suffix, content


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give errors of writing the name of the file, which the system leaves out."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _bad_of(shards: Iterable[Shard]) -> list[tuple[str, str]]:
    return [bad for shard in shards for bad in shard.left_out]


def _check_share(bad: Sequence[tuple[str, str]], allowed: float, manifest: Manifest) -> None:
    if len(bad) <= allowed + 1e-9:
        return
    first = " ".join(f"utterance {identity}: {reason}" for identity, reason in bad[:NAMED])
    raise AudioError(
        f"{manifest.source}: {len(bad)} of {len(manifest)} utterances have bad audio so far, more than max_bad_share "
        "allows; mend the files and pack into a new folder, or raise --max_bad_share and run the same command again "
        f"to leave them out. {first}"
    )


def _report(folder: Path, shards: Sequence[Shard], kept: int) -> PackReport:
    left_out = tuple(_bad_of(shards))
    utterances = sum(len(shard.places) for shard in shards)
    return PackReport(
        folder / MANIFEST_NAME, utterances, len(shards), sum(shard.bytes for shard in shards), kept, left_out
    )
