"""What a folder of shards says about itself: the plan it was begun with, its finished shards, its manifest and index.

While packing goes on this is ``progress.jsonl``, a line for each finished shard; at the end ``index.json``.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from toolkit.data.manifest import Manifest, whole_file
from toolkit.data.shard_rows import SHARD_COLUMNS
from toolkit.data.tar_format import tar_entries
from toolkit.errors import ConfigError, ManifestError

MANIFEST_NAME, INDEX_NAME, PROGRESS_NAME = "manifest.csv", "index.json", "progress.jsonl"

CHANGES = {
    "utterances": "it has another number of utterances",
    "fingerprint": "IDs, durations or transcripts have changed",
    "sizes": "audio files have another size, or have gone",
    "options": "the options differ",
    "format": "another version of the toolkit began",
}
"""What makes the shards of an earlier run useless, by the key of the plan."""


@dataclass(frozen=True)
class Shard:
    """A finished shard: what stands about it in the index, and (row, offset, size) of its utterances."""

    name: str
    bytes: int
    sha256: str
    left_out: tuple[tuple[str, str], ...]
    places: tuple[tuple[int, int, int], ...]

    def record(self) -> dict[str, Any]:
        """The entry of the index."""
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256, "left_out": self.left_out}


def entry_name(identity: str) -> str:
    """The name of an utterance in a shard: without dots, at which webdataset cuts, and without anything of a path.

    Example
    -------
    >>> entry_name("../book 1/utt.2")
    '%2E%2E%2Fbook%201%2Futt%2E2'
    """
    return quote(identity, safe="").replace(".", "%2E")


def shard_number(name: str) -> int:
    """7 of ``shard-000007.tar``."""
    return int(name[len("shard-") : -len(".tar")])


def finished_shards(
    folder: Path, plan: Mapping[str, Any], manifest: Manifest, say: Callable[[str], object]
) -> dict[int, Shard]:
    """The shards that an earlier run of the same plan finished and that are still whole, by number.

    Raises
    ------
    ConfigError : the folder holds something else. ManifestError : the plan was another one, or the index is damaged.
    """
    earlier = read_progress(folder) or read_index(folder)
    if earlier is None:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.endswith(".tmp"))
        if names:
            raise ConfigError(
                f"{folder} holds other files ({names[0]}) and no shards that were begun here; name a new folder."
            )
        return {}
    for key, what in CHANGES.items():
        if earlier["plan"].get(key) != plan[key]:
            raise ManifestError(
                f"{folder} was begun with another state of {manifest.source}: {what}; name a new folder, or delete "
                "this one to pack it again."
            )
    rows = {entry_name(identity): row for row, identity in enumerate(manifest.ids)} if earlier["shards"] else {}
    done = {}
    for record in earlier["shards"]:
        path = folder / record["name"]
        if not path.is_file():
            continue
        if path.stat().st_size != record["bytes"] or file_digest(path) != record["sha256"]:
            say(f"{path} has changed since it was written, and is written again.")
            continue
        entries = [entry for entry in tar_entries(path) if not entry.name.endswith(".json")]
        foreign = next((entry.name for entry in entries if entry.name.rpartition(".")[0] not in rows), None)
        if foreign is not None:
            say(f"{path} holds {foreign}, of which the manifest knows nothing, and is written again.")
            continue
        places = tuple((rows[entry.name.rpartition(".")[0]], entry.offset, entry.size) for entry in entries)
        left_out = tuple((identity, reason) for identity, reason in record["left_out"])
        done[shard_number(path.name)] = Shard(path.name, record["bytes"], record["sha256"], left_out, places)
    return done


def begin(folder: Path, plan: Mapping[str, Any], done: Mapping[int, Shard]) -> None:
    """Write down the plan and what is finished, and sweep up what a killed process left."""
    for rest in folder.glob(".*.tmp"):
        rest.unlink()
    lines = [{"plan": plan}, *(done[number].record() for number in sorted(done))]
    with whole_file(folder / PROGRESS_NAME) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def finish(folder: Path, plan: Mapping[str, Any], manifest: Manifest, shards: Sequence[Shard]) -> None:
    """Write the manifest, then the index; the progress is no longer needed then."""
    places: dict[int, tuple[str, int, int]] = {}
    for shard in shards:
        places.update((row, (shard.name, offset, size)) for row, offset, size in shard.places)
    if not places:
        raise ManifestError(f"{manifest.source}: no utterance could be packed; mend the files and pack again.")
    others = [name for name in manifest.columns if name not in ("ID", "duration", "wav")]
    with whole_file(folder / MANIFEST_NAME) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["ID", "duration", *SHARD_COLUMNS, *others])
        for row in sorted(places):
            values = manifest.row(row)
            writer.writerow([values["ID"], values["duration"], *places[row], *(values[name] for name in others)])
    index = {
        "plan": plan,
        "manifest": {"name": MANIFEST_NAME, "sha256": file_digest(folder / MANIFEST_NAME)},
        "shards": [shard.record() for shard in shards],
    }
    with whole_file(folder / INDEX_NAME) as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (folder / PROGRESS_NAME).unlink()


def read_progress(folder: Path) -> dict[str, Any] | None:
    """The plan and the finished shards of a run that has not ended; a line cut off by a kill is passed over."""
    values = []
    try:
        for line in (folder / PROGRESS_NAME).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                values.append(json.loads(line))
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    if not values or not isinstance(values[0], dict) or not isinstance(values[0].get("plan"), dict):
        return None
    return {"plan": values[0]["plan"], "shards": [record for record in values[1:] if _is_record(record)]}


def read_index(folder: Path) -> dict[str, Any] | None:
    """What ``index.json`` says, None where there is none.

    Raises
    ------
    ManifestError : it is damaged; what is returned has the whole structure that :func:`finish` writes.
    """
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        index = None
    wrong = _wrong_part(index)
    if wrong is not None:
        raise ManifestError(
            f"{path} is damaged ({wrong}); copy it again, or pack the shards into a new folder."
        )
    return index


def _wrong_part(index: Any) -> str | None:
    """What of an index is not as it was written, None where all is."""
    if not isinstance(index, dict):
        return "it is no JSON object"
    plan, manifest, shards = (index.get(key) for key in ("plan", "manifest", "shards"))
    if not isinstance(plan, dict):
        return "'plan' is missing or no object"
    if not isinstance(manifest, dict) or manifest.get("name") != MANIFEST_NAME or not _is_digest(manifest):
        return f"'manifest' does not give the name and the sha256 of {MANIFEST_NAME}"
    if not isinstance(shards, list):
        return "'shards' is missing or no list"
    bad = next((place for place, record in enumerate(shards) if not _is_record(record)), None)
    return None if bad is None else f"entry {bad} of 'shards' does not give name, bytes, sha256 and left_out of a shard"


def _is_record(value: Any) -> bool:
    """Whether it is what :meth:`Shard.record` makes."""
    if not isinstance(value, dict) or not re.fullmatch(r"shard-[0-9]{6,9}\.tar", str(value.get("name"))):
        return False
    left_out = value.get("left_out")
    pairs = isinstance(left_out, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in left_out
    )
    return pairs and isinstance(value.get("bytes"), int) and _is_digest(value)


def _is_digest(value: dict[str, Any]) -> bool:
    return isinstance(value.get("sha256"), str)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from packing into the folder at the same time."""
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl: no lock there, and nothing else depends on it
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is packing into {folder}; wait until it has ended.") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
