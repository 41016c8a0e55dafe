"""Letters as tokens: fairseq's ``dict.ltr.txt``, for any script."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from toolkit.data.token_common import (
    BLANK,
    UNKNOWN,
    WORD_BOUNDARIES,
    Case,
    Unknown,
    boundary_message,
    check_boundary,
    check_option,
    id_message,
    normalized,
    read_lines,
    short,
    write_file,
)
from toolkit.errors import TokenError

LETTERS_FILE = "dict.ltr.txt"
MAX_PADDING = 1024
"""Largest padding_factor: beyond it the made up words would outnumber any script."""

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


class LetterTokenizer:
    """One token a character, words ended by ``|``: the labels of fairseq's ``dict.ltr.txt``, for any script.

    Ids 0 ``<s>`` (the CTC blank), 1 ``<pad>``, 2 ``</s>``, 3 ``<unk>``, then the symbols in the order of the file.
    Text is brought to Unicode's composed form (NFC), so that one letter has one spelling; runs of white space are
    one gap.

    Arguments
    ---------
    symbols : the symbols after the four special ones, in order; may be a mapping from symbol to count.
    unknown : what to do with a character that is not among them: "error", "drop" it, or encode it as ``<unk>``.
    case : "keep", "lower" or "upper": change the text's case before anything else.
    word_boundary : the symbol that ends a word.
    source : where the symbols come from, for messages.

    Raises
    ------
    TokenError for symbols that come twice or cannot stand in the file, and from ``encode`` for an unknown character.

    Example
    -------
    >>> tokenizer = LetterTokenizer.from_texts(["A CAT", "AT"])
    >>> tokenizer.symbols
    ('A', '|', 'T', 'C')
    >>> tokenizer.encode("A CAT")
    [4, 5, 7, 4, 6, 5]
    >>> tokenizer.decode([4, 5, 7, 4, 6, 5])
    'A CAT'
    """

    blank_id = BLANK

    def __init__(
        self,
        symbols: Sequence[str] | Mapping[str, int],
        *,
        unknown: Unknown = "error",
        case: Case = "keep",
        word_boundary: str = "|",
        source: str | None = None,
    ) -> None:
        check_option("unknown", unknown, ("error", "drop", "unk"))
        check_option("case", case, ("keep", "lower", "upper"))
        check_boundary(word_boundary)
        self.symbols = tuple(symbols)
        self.counts = tuple(symbols.values()) if isinstance(symbols, Mapping) else (0,) * len(self.symbols)
        self.unknown, self.case, self.word_boundary = unknown, case, word_boundary
        self._ids: dict[str, int] = {symbol: index for index, symbol in enumerate(SPECIALS)}
        self._source = source
        named = source or "the list of symbols"
        for symbol in self.symbols:
            if not symbol or "\n" in symbol:
                raise TokenError(f"{named} holds {symbol!r}, which no line of {LETTERS_FILE} can hold; leave it out.")
            if symbol in self._ids:
                raise TokenError(f"{named} holds the symbol {symbol!r} twice; delete one of them.")
            self._ids[symbol] = len(self._ids)

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        *,
        unknown: Unknown = "error",
        case: Case = "keep",
        word_boundary: str | None = None,
        padding_factor: int = 1,
    ) -> LetterTokenizer:
        """Letters counted over ``texts``; the most frequent first, ties by code point, as fairseq builds it.

        Arguments
        ---------
        texts : transcripts of the training part.
        unknown, case : as for the class.
        word_boundary : None takes ``|``, or ``▁`` where the texts hold a ``|`` of their own (Buckwalter's Arabic does).
        padding_factor : fill up with ``madeupword0000``, ... to a multiple of this (fairseq's default is 8; 1 = none).
        """
        if type(padding_factor) is not int or not 1 <= padding_factor <= MAX_PADDING:
            raise TokenError(
                f"padding_factor is {padding_factor!r}, expected a whole number from 1 (none) to {MAX_PADDING}."
            )
        if word_boundary is not None:
            check_boundary(word_boundary)
        counts: Counter[str] = Counter()
        gaps = 0
        for text in texts:
            words = normalized(text, case).split()
            gaps += len(words)
            counts.update("".join(words))
        if not counts:
            raise TokenError(
                "there are no letters in the transcripts; check the column 'wrd' of the training manifest."
            )
        if word_boundary is None:
            word_boundary = next(symbol for symbol in WORD_BOUNDARIES if symbol not in counts)
        elif word_boundary in counts:
            raise TokenError(boundary_message(word_boundary, "the transcripts hold"))
        counts[word_boundary] = gaps
        table = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        while (len(SPECIALS) + len(table)) % padding_factor:
            table[f"madeupword{sum(symbol.startswith('madeupword') for symbol in table):04d}"] = 0
        return cls(table, unknown=unknown, case=case, word_boundary=word_boundary)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        unknown: Unknown = "error",
        case: Case = "keep",
        word_boundary: str = "|",
    ) -> LetterTokenizer:
        """Read ``symbol count`` lines; a third field ``#fairseq:overwrite`` lets a symbol stand twice (the later id
        counts).

        Raises
        ------
        TokenError if the file is missing or a line is malformed.
        """
        symbols: dict[str, int] = {}
        overwritten = 0
        for number, line in enumerate(read_lines(path), start=1):
            entry, overwrite = line, False
            if entry.endswith(" #fairseq:overwrite"):
                entry, overwrite = entry.removesuffix(" #fairseq:overwrite"), True
            symbol, _, count = entry.rpartition(" ")
            if not symbol or not count.isdecimal():
                raise TokenError(
                    f"{path}, line {number}: {line!r} is not a symbol, a space and a count; correct the line."
                )
            if symbol in symbols or symbol in SPECIALS:
                if not overwrite:
                    raise TokenError(
                        f"{path}, line {number}: the symbol {symbol!r} comes twice; delete one of them, or end the "
                        "line with #fairseq:overwrite."
                    )
                # The earlier one keeps its id under a name that no character can have.
                overwritten += 1
                symbols = {(f"<overwritten{overwritten}>" if old == symbol else old): n for old, n in symbols.items()}
            symbols[symbol] = int(count)
        if not symbols:
            raise TokenError(f"{path} holds no symbols; give a dictionary with a line 'symbol count' for each.")
        return cls(symbols, unknown=unknown, case=case, word_boundary=word_boundary, source=str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids, the four special ones included."""
        return len(self._ids)

    @property
    def labels(self) -> tuple[str, ...]:
        """The symbol of each id, the four special ones included."""
        return SPECIALS + self.symbols

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` of a model folder says under "tokens"."""
        return {
            "kind": "letters",
            "file": LETTERS_FILE,
            "unknown": self.unknown,
            "case": self.case,
            "word_boundary": self.word_boundary,
        }

    def normalize(self, text: str) -> str:
        """The text as the tokenizer sees it: composed, in its case, single spaces."""
        return normalized(text, self.case)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, each word ended by the boundary; an empty text gives an empty list.

        Raises
        ------
        TokenError for a character outside the dictionary (with ``unknown="error"``), naming it and its code point.
        """
        normal = self.normalize(text)
        if self.word_boundary in normal:
            if self.unknown == "error":
                raise TokenError(boundary_message(self.word_boundary, f"the transcript {short(text)} holds"))
            # No character of its own: dropped or unknown below.
            normal = normal.replace(self.word_boundary, "\0")
        if self.unknown == "drop":
            known = "".join(letter for letter in normal if letter == " " or letter in self._ids)
            normal = " ".join(known.split())
        if not normal:
            return []
        get = self._ids.get
        boundary = self.word_boundary
        ids = [get(boundary if letter == " " else letter, UNKNOWN) for letter in normal]
        ids.append(get(boundary, UNKNOWN))
        if self.unknown == "error" and UNKNOWN in ids:
            self._raise_unknown(text, (normal + " ")[ids.index(UNKNOWN)])
        return ids

    def _raise_unknown(self, text: str, letter: str) -> NoReturn:
        letter = self.word_boundary if letter == " " else letter
        name = unicodedata.name(letter, "no name")
        raise TokenError(
            f"the transcript {short(text)} holds the character {letter!r} (U+{ord(letter):04X}, {name}), which is not "
            f"among the tokenizer's {len(self.symbols)} symbols; build the tokens from all training transcripts, set "
            "case to 'upper' or 'lower' where only the case differs, or set unknown to 'drop' or 'unk'."
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` (no repeats or blanks are collapsed here: that is the decoder's work); special ids vanish.

        Raises
        ------
        TokenError for an id outside the vocabulary.
        """
        letters = []
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise TokenError(id_message(index, self.vocab_size, self._source))
            if index >= len(SPECIALS):
                symbol = self.symbols[index - len(SPECIALS)]
                letters.append(" " if symbol == self.word_boundary else symbol)
            elif index == UNKNOWN:
                letters.append(SPECIALS[UNKNOWN])
        return " ".join("".join(letters).split())

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Write ``dict.ltr.txt`` into ``folder``; returns the file's name."""
        rows = zip(self.symbols, self.counts, strict=True)
        write_file(Path(folder) / LETTERS_FILE, "".join(f"{symbol} {count}\n" for symbol, count in rows).encode())
        return LETTERS_FILE
