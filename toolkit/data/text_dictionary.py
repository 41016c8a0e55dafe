"""fairseq's dictionary of a text corpus: ``dict.txt``, one symbol and its count a line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from toolkit.data.token_common import END, UNKNOWN, read_bytes, short, write_file
from toolkit.errors import TokenError

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3; they stand in no file."""

MASK = "<mask>"
OVERWRITE = "#fairseq:overwrite"
DICT_FILE = "dict.txt"

SMALL, LARGE = 65500, 4294967295
"""Entries from which fairseq takes the next larger integer for its files."""


class TextDictionary:
    """Symbols and their ids, as fairseq counts them: four special symbols, then those of the file in its order.

    Arguments
    ---------
    symbols : those after the special ones.
    counts : how often each occurred; None = 1 each.

    ``len`` is fairseq's, without the mask symbol, which stands in no file: it gets the next id (``mask_id``), and
    ``vocab_size`` counts it, as in fairseq's masked language model task.

    Example
    -------
    >>> dictionary = TextDictionary.from_counts({"b": 2, "a": 2, "c": 5}, padding_factor=1)
    >>> dictionary.encode("a c d").tolist(), dictionary.mask_id, dictionary.vocab_size
    ([5, 4, 3, 2], 7, 8)
    """

    def __init__(self, symbols: Sequence[str], counts: Sequence[int] | None = None) -> None:
        self.symbols = (*SPECIALS, *symbols)
        own = np.ones(len(symbols), dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
        self.counts = np.concatenate([np.ones(len(SPECIALS), dtype=np.int64), own])
        # Of a symbol that stands twice (with fairseq's overwrite flag) the later one is meant.
        self._ids = {symbol: index for index, symbol in enumerate(self.symbols)}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> TextDictionary:
        """Read a ``dict.txt``.

        Raises
        ------
        TokenError : the file is missing, not UTF-8, has a line that is not "symbol count", or a symbol twice.
        """
        try:
            text = read_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenError(f"{path} is not UTF-8 text (byte {error.start}); take a fairseq dict.txt.") from error
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        if lines and not lines[-1]:
            lines.pop()
        symbols: list[str] = []
        counts: list[int] = []
        known = set(SPECIALS)
        for number, line in enumerate(lines, 1):
            symbol, count, overwrites = _parsed(path, number, line)
            if symbol in known and not overwrites:
                raise TokenError(
                    f"{path}, line {number}: the symbol {short(symbol)} stands twice (or is one of "
                    f"{', '.join(SPECIALS)}); delete the line, or end it with {OVERWRITE} if it is meant."
                )
            known.add(symbol)
            symbols.append(symbol)
            counts.append(count)
        if not symbols:
            raise TokenError(f"{path} holds no symbols; give a dictionary with a line 'symbol count' for each.")
        return cls(symbols, counts)

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, int], *, max_size: int | None = None, min_count: int = 0, padding_factor: int = 8
    ) -> TextDictionary:
        """The dictionary that fairseq-preprocess builds from a training text.

        Frequent symbols first, equally frequent ones by code point; then ``madeupword0000`` and so on until the size
        is a multiple of ``padding_factor``.

        Arguments
        ---------
        counts : occurrences of each symbol.
        max_size : entries at most, special ones included, padding not; None = all.
        min_count : rarer symbols are left out.
        padding_factor : 1 = no padding.
        """
        own = [item for item in counts.items() if item[0] not in SPECIALS]
        own.sort(key=lambda item: (-item[1], item[0]))
        if max_size is not None:
            own = own[: max(0, max_size - len(SPECIALS))]
        own = [item for item in own if item[1] >= min_count]
        known, number = {symbol for symbol, _ in own}, 0
        while padding_factor > 1 and (len(own) + len(SPECIALS)) % padding_factor:
            made_up = f"madeupword{number:04d}"
            if made_up not in known:
                own.append((made_up, 0))
            number += 1
        return cls([symbol for symbol, _ in own], [count for _, count in own])

    def __len__(self) -> int:
        return len(self.symbols)

    @property
    def mask_id(self) -> int:
        """Id of the mask symbol: the next after all others, unless the file has one."""
        return self._ids.get(MASK, len(self))

    @property
    def vocab_size(self) -> int:
        """Ids that a model needs, the mask's included."""
        return max(len(self), self.mask_id + 1)

    @property
    def token_type(self) -> np.dtype:
        """The integers in which fairseq-preprocess stores ids of this dictionary."""
        return stored_type(len(self))

    @property
    def frequencies(self) -> np.ndarray:
        """(vocab_size,) int64 counts, 0 for special symbols and 1 for the mask: fairseq's weights of random tokens."""
        counts = np.ones(self.vocab_size, dtype=np.int64)
        counts[: len(self)] = self.counts
        counts[: len(SPECIALS)] = 0
        return counts

    def fingerprint(self) -> str:
        """Equal where every id means the same symbol (hexadecimal), whatever the counts."""
        return hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()[:16]

    def difference(self, other: TextDictionary) -> str:
        """The first id that means another symbol in ``other``, "" where there is none; counts do not matter.

        Example
        -------
        >>> TextDictionary(["a", "b"]).difference(TextDictionary(["a", "c"]))
        "id 5 is 'b' there and 'c' here"
        """
        for index, pair in enumerate(zip_longest(self.symbols, other.symbols)):
            if pair[0] != pair[1]:
                there, here = ("none" if symbol is None else short(symbol) for symbol in pair)
                return f"id {index} is {there} there and {here} here"
        return ""

    def index(self, symbol: str) -> int:
        """Id of ``symbol``, 3 (``<unk>``) if it is unknown."""
        return self._ids.get(symbol, UNKNOWN)

    def lookup(self, symbols: Iterable[str]) -> np.ndarray:
        """Ids of ``symbols`` (n,) int64, 3 for unknown ones."""
        ids = self._ids
        return np.fromiter((ids.get(symbol, UNKNOWN) for symbol in symbols), dtype=np.int64)

    def encode(self, line: str, *, end: bool = True) -> np.ndarray:
        """(tokens,) int64 of the symbols in ``line``, which white space parts, and ``</s>``."""
        return np.concatenate([self.lookup(line.split()), np.full(int(end), END, dtype=np.int64)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file as fairseq does; where a symbol stands twice, with the flag that lets it be read again."""
        write_file(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        known: set[str] = set(SPECIALS)
        lines = []
        for symbol, count in zip(self.symbols[len(SPECIALS) :], self.counts[len(SPECIALS) :].tolist(), strict=True):
            lines.append(f"{symbol} {count}{f' {OVERWRITE}' if symbol in known else ''}\n")
            known.add(symbol)
        return "".join(lines).encode()


class DictionaryIds:
    """What tokenizers have in common whose ids are those of a dictionary.

    Arguments
    ---------
    dictionary : symbols to ids.
    """

    blank_id = 0  # <s>, in whose place a CTC model on these tokens would have its blank

    def __init__(self, dictionary: TextDictionary) -> None:
        self.dictionary = dictionary

    @property
    def vocab_size(self) -> int:
        """Ids of the model, the mask's included."""
        return self.dictionary.vocab_size

    @property
    def mask_id(self) -> int:
        """Id of the mask symbol."""
        return self.dictionary.mask_id


def stored_type(vocab_size: int | None) -> np.dtype:
    """The integers in which fairseq-preprocess stores ids of a dictionary of this size (None: not known).

    Example
    -------
    >>> stored_type(50264), stored_type(65500)
    (dtype('uint16'), dtype('uint32'))
    """
    if vocab_size is None:
        return np.dtype("<u4")
    return np.dtype("<u2" if vocab_size < SMALL else "<u4" if vocab_size < LARGE else "<i8")


def _parsed(path: str | os.PathLike[str], number: int, line: str) -> tuple[str, int, bool]:
    """Symbol, count and whether the line may repeat a symbol."""
    symbol, _, field = line.rstrip().rpartition(" ")
    overwrites = field == OVERWRITE
    if overwrites:
        symbol, _, field = symbol.rpartition(" ")
    try:
        count = int(field)
    except ValueError:
        symbol = ""
    if not symbol:
        raise TokenError(
            f"{path}, line {number}: expected 'symbol count', but the line is {short(line)}; give a fairseq dict.txt."
        )
    return symbol, count, overwrites
