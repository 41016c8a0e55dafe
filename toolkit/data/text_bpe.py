"""GPT-2's byte pairs (``encoder.json`` and ``vocab.bpe``) and fairseq's ids for them (``dict.txt``)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.text_dictionary import DICT_FILE, MASK, SPECIALS, DictionaryIds, TextDictionary
from toolkit.data.token_common import END, id_message, read_bytes, short, write_file
from toolkit.errors import TokenError

ENCODER_FILE, MERGES_FILE = "encoder.json", "vocab.bpe"

OTHER_NAMES = {ENCODER_FILE: "vocab.json", MERGES_FILE: "merges.txt"}
"""The same files as model hubs name them."""

NUM_PIECES, NUM_MERGES = 50257, 50000

GPT2_DIGEST = "98de00669996e48e8db9590e7c13d37461bb11178e80fa2abcafb3e49f542baf"
"""SHA-256 of GPT-2's pieces and merges, however their files are formatted."""


class Gpt2Bpe:
    """Text to GPT-2's numbers (0 to 50256) and back, as OpenAI's and fairseq's encoders do it.

    Words that look like special symbols (``<s>``, ``<|endoftext|>``) are plain text here.

    Arguments
    ---------
    pieces : number of each piece, the content of ``encoder.json``.
    merges : pairs in the order of ``vocab.bpe``.
    """

    def __init__(self, pieces: dict[str, int], merges: Sequence[tuple[str, str]]) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # 0.1 s that other recipes need not wait

        self.pieces, self.merges = pieces, list(merges)
        self._tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=self.merges))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        self._tokenizer.decoder = decoders.ByteLevel()

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Gpt2Bpe:
        """Read ``encoder.json`` and ``vocab.bpe`` (or ``vocab.json`` and ``merges.txt``) from ``folder``.

        Raises
        ------
        TokenError : a file is missing or cannot be read, or the vocabulary is another than GPT-2's.
        """
        encoder, merges = _bpe_files(Path(folder))
        pieces = _read_pieces(encoder)
        pairs = _read_merges(merges)
        if _digest(pieces, pairs) != GPT2_DIGEST:
            raise TokenError(
                f"{encoder} ({len(pieces):,} pieces) and {merges} ({len(pairs):,} merges) are not GPT-2's vocabulary "
                f"({NUM_PIECES:,} and {NUM_MERGES:,}); take encoder.json and vocab.bpe as GPT-2, RoBERTa and data2vec "
                "use them."
            )
        return cls(pieces, pairs)

    def encode(self, text: str) -> list[int]:
        """Numbers of the pieces of ``text``, white space and line ends included."""
        return self._tokenizer.encode(text).ids

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        """The same for many texts."""
        # One by one: the library's batches start threads, which a process that is forked later must not have.
        return [self.encode(line) for line in lines]

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of ``numbers``; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(numbers), skip_special_tokens=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write both files; `from_folder` reads them back."""
        folder = Path(folder)
        write_file(folder / ENCODER_FILE, json.dumps(self.pieces).encode())
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        write_file(folder / MERGES_FILE, "".join(f"{line}\n" for line in lines).encode())


class Gpt2Tokenizer(DictionaryIds):
    """Text to the ids that a model was pretrained with, and back: GPT-2's pieces through a ``dict.txt``.

    Arguments
    ---------
    bpe : text to numbers.
    dictionary : decimal numbers to ids.
    """

    def __init__(self, bpe: Gpt2Bpe, dictionary: TextDictionary) -> None:
        super().__init__(dictionary)
        self.bpe = bpe
        self._ids = dictionary.lookup(str(number) for number in range(NUM_PIECES))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Gpt2Tokenizer:
        """Read what `save` wrote.

        Raises
        ------
        TokenError : a file is missing or damaged.
        """
        return cls(Gpt2Bpe.from_folder(folder), TextDictionary.from_file(Path(folder) / DICT_FILE))

    @property
    def config(self) -> dict[str, Any]:
        """What a model's ``config.json`` says of its tokens."""
        return {"kind": "gpt2"}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``, white space at its ends left out as in pretraining; 3 where the dictionary lacks a piece.

        With ``special`` as the model saw its blocks: ``<s>`` before and ``</s>`` behind.
        """
        ids = self._ids[self.bpe.encode(text.strip())].tolist()
        return [0, *ids, END] if special else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special symbols, the mask and padding are left out.

        Raises
        ------
        TokenError : an id is not in the dictionary.
        """
        numbers = []
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise TokenError(id_message(index, self.vocab_size))
            symbol = self.dictionary.symbols[index] if len(SPECIALS) <= index < len(self.dictionary) else ""
            if is_gpt2_number(symbol):
                numbers.append(int(symbol))
        return self.bpe.decode(numbers)

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Write the three files; returns the dictionary's name."""
        self.bpe.save(folder)
        self.dictionary.save(Path(folder) / DICT_FILE)
        return DICT_FILE


def is_gpt2_number(symbol: str) -> bool:
    """Whether a dictionary's symbol is the number of one of GPT-2's pieces.

    Example
    -------
    >>> [is_gpt2_number(symbol) for symbol in ("262", "50257", "the", "²")]
    [True, False, False, False]
    """
    return symbol.isascii() and symbol.isdecimal() and len(symbol) <= 5 and int(symbol) < NUM_PIECES


def holds_gpt2_numbers(dictionary: TextDictionary) -> bool:
    """Whether at least half of the dictionary's own symbols are GPT-2's numbers; fillers and the mask do not count."""
    own = [name for name in dictionary.symbols[len(SPECIALS) :] if name != MASK and not name.startswith("madeupword")]
    return 2 * sum(map(is_gpt2_number, own)) >= len(own)


def check_gpt2_dictionary(dictionary: TextDictionary, source: str | os.PathLike[str]) -> None:
    """Refuse GPT-2's byte pairs for a dictionary of something else, as words, which would be unknown tokens all.

    Raises
    ------
    TokenError : less than half of the symbols are GPT-2's numbers; ``source`` is where the dictionary was read.
    """
    if not holds_gpt2_numbers(dictionary):
        raise TokenError(
            f"the symbols of {source} are no numbers of GPT-2's pieces (the first is "
            f"{short(dictionary.symbols[len(SPECIALS)])}), so bpe_folder does not fit it; leave out bpe_folder, or "
            f"give the {DICT_FILE} of a text in GPT-2's byte pairs."
        )


def number_counts(counts: np.ndarray) -> dict[str, int]:
    """Counts by GPT-2's number to counts by fairseq's symbol, those that occur."""
    return {str(number): int(counts[number]) for number in np.flatnonzero(counts).tolist()}


def _bpe_files(folder: Path) -> tuple[Path, Path]:
    """The paths of the two files."""
    found = []
    for name, other in OTHER_NAMES.items():
        path = next((folder / known for known in (name, other) if (folder / known).is_file()), None)
        if path is None:
            raise TokenError(
                f"the BPE folder {folder} has no {name}; give the folder that holds GPT-2's {ENCODER_FILE} and "
                f"{MERGES_FILE}."
            )
        found.append(path)
    return found[0], found[1]


def _read_pieces(path: Path) -> dict[str, int]:
    try:
        pieces = json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenError(f"{path} is not JSON; take GPT-2's {ENCODER_FILE}.") from error
    if not isinstance(pieces, dict) or not all(type(number) is int for number in pieces.values()):
        raise TokenError(f"{path} is no table of pieces and their numbers; take GPT-2's {ENCODER_FILE}.")
    return pieces


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs, the first line (a version) left out."""
    try:
        lines = read_bytes(path).decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise TokenError(f"{path} is not UTF-8 text (byte {error.start}); take GPT-2's {MERGES_FILE}.") from error
    pairs = []
    for number, line in enumerate(lines[1:], 2):
        first, _, second = line.partition(" ")
        if line and not (first and second):
            raise TokenError(f"{path}, line {number}: expected two pieces; take GPT-2's {MERGES_FILE}.")
        if line:
            pairs.append((first, second))
    return pairs


def _digest(pieces: dict[str, int], merges: Sequence[tuple[str, str]]) -> str:
    content = json.dumps([sorted(pieces.items()), list(merges)])
    return hashlib.sha256(content.encode()).hexdigest()
