"""fairseq's binary text: ``NAME.idx`` and ``NAME.bin`` of the "mmap" kind, read by memory map and written alike.

``.idx``: 9 bytes of magic, version (u64, 1), type code (u8), number of items N (u64), N sizes (i32, in tokens), N
pointers (i64, in bytes). ``.bin``: the items' tokens, nothing else. All little-endian.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.errors import TokenError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQ")

TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
"""Integers by fairseq's code; 6 and 7 are floats, in which no tokens are stored."""

FOREIGN = {
    b"TNTIDX\x00\x00": "fairseq's older lazy or cached kind",
    b"HUFFIDX\x00": "fairseq's huffman kind",
}
"""First 8 bytes of index files that are not read here."""

LOOK_AT = 1 << 22
"""Tokens that are looked at in one go: 32 MB as int64."""

MOST_LOOKED_AT = 1 << 27
"""Tokens of a file whose ids are all checked; of a longer one as many, in evenly spread pieces (the others are
checked as they are read)."""


class IndexedText:
    """Items (lines) of tokens in a pair of files; nothing is held in memory but the map.

    Arguments
    ---------
    prefix : path without ``.idx`` and ``.bin``.

    Raises
    ------
    TokenError : a file is missing, truncated, damaged, or of another format.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = Path(prefix)
        self.index_path, self.token_path = (self.prefix.with_name(self.prefix.name + end) for end in (".idx", ".bin"))
        for path in (self.index_path, self.token_path):
            if not path.is_file():
                raise TokenError(
                    f"{path} is missing; give the folder that fairseq-preprocess or a prepare script wrote "
                    "(NAME.idx and NAME.bin beside each other)."
                )
        self.dtype, items = _checked_header(self.index_path)
        sizes_at, pointers_at = HEADER.size, HEADER.size + 4 * items
        self.sizes: np.ndarray = _mapped(self.index_path, "<i4", sizes_at, items)
        self.pointers: np.ndarray = _mapped(self.index_path, "<i8", pointers_at, items)
        self.num_tokens = self._checked_length()
        self._tokens: np.ndarray = _mapped(self.token_path, self.dtype, 0, self.num_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process opens the files anew: a memory map would travel as a copy of them.
        return IndexedText, (self.prefix,)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, item: int) -> np.ndarray:
        """(tokens,) int64 of one item."""
        start = int(self.pointers[item]) // self.dtype.itemsize
        return self.tokens(start, start + int(self.sizes[item]))

    def tokens(self, start: int, end: int) -> np.ndarray:
        """(end - start,) int64, tokens by their place in the whole of all items."""
        return self._tokens[start:end].astype(np.int64)

    def check_ids(self, vocab_size: int, dictionary: str | os.PathLike[str]) -> None:
        """Compare the stored ids with the dictionary that shall belong to them.

        Raises
        ------
        TokenError : an id is not in the dictionary.
        """
        for start in self._looked_at():
            piece = self._tokens[start : start + LOOK_AT]
            low, high = int(piece.min()), int(piece.max())
            if low < 0 or high >= vocab_size:
                raise self.wrong_id(low if low < 0 else high, vocab_size, dictionary)

    def line_id(self, item: int) -> str:
        """Where an item stands: "train:17" (from 1)."""
        return f"{self.prefix.name}:{item + 1}"

    def wrong_id(self, token: int, vocab_size: int, dictionary: str | os.PathLike[str]) -> TokenError:
        """The error about a token that the dictionary does not have."""
        return _wrong_id(str(self.token_path), token, vocab_size, dictionary)

    def fingerprint(self) -> str:
        """Tells one text from another: all sizes, and a sample of the tokens (hexadecimal)."""
        content = hashlib.sha256()
        for start in range(0, len(self), LOOK_AT):
            content.update(self.sizes[start : start + LOOK_AT].tobytes())
        for start in np.linspace(0, max(0, self.num_tokens - 4096), 256).astype(np.int64).tolist():
            content.update(self.tokens(start, start + 4096).tobytes())
        return content.hexdigest()[:16]

    def _looked_at(self) -> range | list[int]:
        if self.num_tokens <= MOST_LOOKED_AT:
            return range(0, self.num_tokens, LOOK_AT)
        return np.linspace(0, self.num_tokens - LOOK_AT, MOST_LOOKED_AT // LOOK_AT).astype(np.int64).tolist()

    def _checked_length(self) -> int:
        """Tokens of the .bin, which is as long as the .idx says, one item behind the other."""
        size, width = self.token_path.stat().st_size, self.dtype.itemsize
        ends = self.pointers + self.sizes.astype(np.int64) * width
        sound = not len(self) or (
            int(self.sizes.min()) >= 0 and int(self.pointers[0]) == 0 and np.array_equal(ends[:-1], self.pointers[1:])
        )
        if not sound:
            raise TokenError(
                f"{self.index_path} is damaged: its items do not stand one behind the other; prepare the text again."
            )
        wanted = int(ends[-1]) if len(self) else 0
        if size != wanted:
            what = "truncated" if size < wanted else "too long"
            raise TokenError(
                f"{self.token_path} is {what}: it has {size:,} bytes, but {self.index_path.name} speaks of {wanted:,}; "
                "copy both files again, or prepare the text again."
            )
        return wanted // width


class JoinedText:
    """Several texts one behind the other, read as if they were one: the pieces train, train1, train2 of a part.

    Arguments
    ---------
    pieces : at least one.
    """

    def __init__(self, pieces: Sequence[IndexedText]) -> None:
        self.pieces, self.prefix = list(pieces), pieces[0].prefix
        self.sizes: np.ndarray = np.concatenate([piece.sizes for piece in pieces])
        # Where each piece begins, and the whole ends.
        self._tokens_before = np.cumsum([0, *(piece.num_tokens for piece in pieces)])
        self._items_before = np.cumsum([0, *(len(piece) for piece in pieces)])
        self.num_tokens = int(self._tokens_before[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedText, (self.pieces,)

    def __len__(self) -> int:
        return len(self.sizes)

    def tokens(self, start: int, end: int) -> np.ndarray:
        """(end - start,) int64, tokens by their place in the whole; a range may cross from one piece into the next."""
        begins = self._tokens_before[:-1].tolist()
        ranges = ((piece, start - begin, end - begin) for piece, begin in zip(self.pieces, begins, strict=True))
        parts = [piece.tokens(max(0, low), high) for piece, low, high in ranges if high > 0 and low < piece.num_tokens]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def check_ids(self, vocab_size: int, dictionary: str | os.PathLike[str]) -> None:
        """As of each piece."""
        for piece in self.pieces:
            piece.check_ids(vocab_size, dictionary)

    def line_id(self, item: int) -> str:
        """Where an item stands: "train1:17" (from 1)."""
        number = int(np.searchsorted(self._items_before, item, side="right")) - 1
        return self.pieces[number].line_id(item - int(self._items_before[number]))

    def wrong_id(self, token: int, vocab_size: int, dictionary: str | os.PathLike[str]) -> TokenError:
        """The error about a token that the dictionary does not have."""
        others = ", ".join(piece.token_path.name for piece in self.pieces[1:])
        return _wrong_id(f"{self.pieces[0].token_path} (or {others})", token, vocab_size, dictionary)

    def fingerprint(self) -> str:
        """Tells one text from another (hexadecimal)."""
        content = "".join(piece.fingerprint() for piece in self.pieces)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class IndexedTextWriter:
    """Writes a pair of files as fairseq does, whole or not at all.

    Arguments
    ---------
    prefix : path without ``.idx`` and ``.bin``; the folder exists.
    dtype : of the stored tokens, see :func:`~toolkit.data.text_dictionary.stored_type`.

    Example
    -------
    >>> import tempfile
    >>> prefix = Path(tempfile.mkdtemp()) / "train"
    >>> with IndexedTextWriter(prefix, "<u2") as writer:
    ...     writer.add(np.array([7, 8, 2, 2]), np.array([3, 1]))
    >>> [item.tolist() for item in IndexedText(prefix)]
    [[7, 8, 2], [2]]
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: str | np.dtype) -> None:
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype).newbyteorder("<")
        self._code = next((code for code, kind in TYPES.items() if np.dtype(kind) == self.dtype), None)
        if self._code is None:
            raise TokenError(f"tokens cannot be stored as {self.dtype.name}; take an integer type.")
        self._sizes: list[np.ndarray] = []
        self._temporary = self._name(".bin.tmp")
        self._stream: Any = None

    def __enter__(self) -> IndexedTextWriter:
        self._stream = open(self._temporary, "wb")
        return self

    def add(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Append items: their tokens one after the other, and how many each has."""
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) > np.iinfo(self.dtype).max):
            raise TokenError(f"a token id does not fit into {self.dtype.name}, in which {self.prefix} is written.")
        self._stream.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        self._sizes.append(np.asarray(sizes, dtype=np.int64))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            if kind is None:
                os.replace(self._temporary, self._name(".bin", final=True))
                self._write_index()
        finally:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)

    def _write_index(self) -> None:
        sizes = np.concatenate([np.zeros(0, dtype=np.int64), *self._sizes])
        # Summed in 64 bits: fairseq's own merging of parts overflows beyond 2 GiB.
        pointers = np.concatenate([[0], np.cumsum(sizes)])[: len(sizes)] * self.dtype.itemsize
        temporary = self._name(".idx.tmp")
        try:
            with open(temporary, "wb") as stream:
                stream.write(HEADER.pack(MAGIC, 1, self._code, len(sizes)))
                stream.write(sizes.astype("<i4").tobytes())
                stream.write(pointers.astype("<i8").tobytes())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self._name(".idx", final=True))
        finally:
            temporary.unlink(missing_ok=True)

    def _name(self, end: str, *, final: bool = False) -> Path:
        name = f"{self.prefix.name}{end}" if final else f".{self.prefix.name}.{os.getpid()}{end}"
        return self.prefix.with_name(name)


def _mapped(path: Path, dtype: str | np.dtype, offset: int, count: int) -> np.ndarray:
    if count == 0:  # nothing of no length can be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _checked_header(path: Path) -> tuple[np.dtype, int]:
    """The stored type and the number of items."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(HEADER.size + 8)
    if head[:9] != MAGIC:
        kind = FOREIGN.get(head[:8])
        if size < len(MAGIC) and MAGIC.startswith(head):
            raise _truncated(path, size, HEADER.size)
        what = f"is of {kind}" if kind else f"is no index of fairseq's mmap kind (it begins with {head[:8]!r})"
        raise TokenError(
            f"{path} {what}; only the mmap kind is read: prepare the text again with --dataset-impl mmap, or with "
            "wikitext_prepare.py."
        )
    if size < HEADER.size:
        raise _truncated(path, size, HEADER.size)
    _, version, code, items = HEADER.unpack(head[: HEADER.size])
    if version != 1:
        raise TokenError(f"{path} has version {version}, expected 1; prepare the text again.")
    if code not in TYPES:
        known = ", ".join(f"{number} {np.dtype(kind).name}" for number, kind in TYPES.items())
        raise TokenError(f"{path} says that its tokens are of type {code}, expected one of {known}.")
    wanted = HEADER.size + 12 * items
    if size < wanted:
        raise _truncated(path, size, wanted)
    if size > wanted:
        # Megatron's has the number of documents behind the header and their places at the end.
        documents = int.from_bytes(head[HEADER.size :], "little")
        kind = "Megatron's format" if size == wanted + 8 + 8 * documents else "damaged"
        raise TokenError(
            f"{path} is {kind}: it has {size:,} bytes, and {wanted:,} would hold its {items:,} items; give an index "
            "that fairseq-preprocess or wikitext_prepare.py wrote."
        )
    return np.dtype(TYPES[code]), int(items)


def _wrong_id(path: str, token: int, vocab_size: int, dictionary: str | os.PathLike[str]) -> TokenError:
    return TokenError(
        f"{path} holds the token id {token}, but {dictionary} has {vocab_size} entries (special ones included); the "
        "two do not belong together: take the dict.txt that was written with the .bin."
    )


def _truncated(path: Path, size: int, wanted: int) -> TokenError:
    return TokenError(
        f"{path} is truncated: it has {size:,} bytes of {wanted:,}; copy it again, or prepare the text again."
    )
