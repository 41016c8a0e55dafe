"""Tar files as shards of audio are made of: headers written, checked and walked through; nothing is ever extracted.

Only what a shard needs is known: regular files of under 2 GiB, names in ustar or pax headers. All else is refused.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from toolkit.errors import AudioError

BLOCK = 512
"""Bytes that everything in a tar begins at a multiple of."""

LARGEST_PAX = 1 << 16
"""Bytes of a pax header at most: ours hold a long name and nothing else."""

LONGEST_NAME = LARGEST_PAX - len("65536 path=\n")
"""Bytes of an entry's name at most: such a header has to hold it."""

LARGEST_ENTRY = (1 << 31) - 1
"""Bytes of an entry at most: hours of audio, and below what ustar headers and WAV can say."""

KINDS = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"5": "folder", b"6": "pipe"}


@dataclass(frozen=True)
class TarEntry:
    """A regular file in a tar: its name, where its bytes begin, and how many there are."""

    name: str
    offset: int
    size: int


def padded(size: int) -> int:
    """``size`` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def tar_header(name: str, size: int) -> bytes:
    """The header block of a regular file; a name that ustar cannot hold gets a pax header before it.

    Owner and time are 0, so that the same content always makes the same bytes.
    """
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def entry_size(header: bytes) -> int | None:
    """Size of the regular file whose header these 512 bytes are; None if they are no such header."""
    kind, size = _parsed(header)
    return size if kind in (b"0", b"\0") else None


def tar_entries(path: str | os.PathLike[str]) -> Iterator[TarEntry]:
    """The entries of a tar, front to back, by their headers alone.

    Raises
    ------
    AudioError : it is truncated or no tar; an entry is no regular file, claims more bytes than there are, or has a
        name that leads outside a folder. One sentence with the file and the byte.
    """
    with open(path, "rb") as file:
        yield from walk(file, os.fspath(path))


def walk(file: BinaryIO, path: str) -> Iterator[TarEntry]:
    """As :func:`tar_entries`, for an open file; between two entries it may be read from anywhere."""
    total = os.fstat(file.fileno()).st_size
    place, long_name = 0, None
    while True:
        file.seek(place)
        header = file.read(BLOCK)
        if header == bytes(BLOCK):
            return
        kind, size = _parsed(header)
        if kind is None or size is None:
            raise AudioError(
                f"{path} is truncated or no tar: at byte {place} there is neither an entry nor the end; copy or pack "
                "it again."
            )
        offset = place + BLOCK
        if offset + padded(size) > total:
            raise AudioError(
                f"{path}: the entry at byte {place} claims {size} bytes, more than there are left; copy or pack the "
                "file again."
            )
        place = offset + padded(size)
        if kind == b"x":
            long_name = _pax_name(file.read(min(size, LARGEST_PAX + 1)), path, offset)
            continue
        name = _name_of(header) if long_name is None else long_name
        long_name = None
        if kind not in (b"0", b"\0"):
            what = KINDS.get(kind, f"of the unknown kind {kind!r}")
            raise AudioError(f"{path}: the entry {name!r} is no regular file ({what}); pack the shard again.")
        if not _is_inside(name):
            raise AudioError(f"{path}: the name {name!r} leads outside the shard; pack the shard again.")
        yield TarEntry(name, offset, size)


def _parsed(header: bytes) -> tuple[bytes | None, int | None]:
    """Kind and size that a header block says; None for both if it is none (its checksum has to be right)."""
    if len(header) != BLOCK or header[257:262] != b"ustar":
        return None, None
    checksum, size = _octal(header[148:156]), _octal(header[124:136])
    # The checksum is taken with its own field as blanks.
    if checksum is None or size is None or checksum != sum(header) - sum(header[148:156]) + 8 * 32:
        return None, None
    return header[156:157], size


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits, 8) if re.fullmatch(b"[0-7]+", digits) else None


def _name_of(header: bytes) -> str:
    name, prefix = (field.split(b"\0", 1)[0] for field in (header[:100], header[345:500]))
    # GNU's own format keeps other things where ustar has the prefix.
    is_ustar = header[257:263] == b"ustar\0"
    return (prefix + b"/" + name if prefix and is_ustar else name).decode("utf-8", "surrogateescape")


def _pax_name(records: bytes, path: str, offset: int) -> str | None:
    """The path that a pax header's records, ``LENGTH KEY=VALUE``, give."""
    name, place = None, 0
    while len(records) <= LARGEST_PAX and place < len(records):
        found = re.match(rb"(\d{1,6}) ([^=]+)=", records[place:])
        end = place + int(found[1]) if found else place
        if found is None or end > len(records) or end <= place + found.end() or found[2] == b"size":
            break
        if found[2] == b"path":
            name = records[place + found.end() : end - 1].decode("utf-8", "surrogateescape")
        place = end
    else:
        if len(records) <= LARGEST_PAX:
            return name
    raise AudioError(f"{path}: the pax header at byte {offset} is broken or of a kind not in use; pack the file again.")


def _is_inside(name: str) -> bool:
    return bool(name) and not name.startswith(("/", "\\")) and ".." not in re.split(r"[/\\]", name) and "\0" not in name
