"""What both kinds of tokenizer share: the interface, options, and reading and writing of their files."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from toolkit.errors import TokenError

BLANK, PAD, END, UNKNOWN = range(4)
"""Ids of fairseq's special symbols; the blank is 0 in SentencePiece models too."""

WORD_BOUNDARIES = ("|", "▁", "␣")
"""Symbols for the gap between words, in the order in which they are tried."""

Unknown = Literal["error", "drop", "unk"]
Case = Literal["keep", "lower", "upper"]


class Tokenizer(Protocol):
    """What recipes and decoders use of a tokenizer."""

    blank_id: int

    @property
    def vocab_size(self) -> int: ...

    @property
    def config(self) -> dict[str, Any]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, folder: str | os.PathLike[str]) -> str: ...


def normalized(text: str, case: Case) -> str:
    """Composed Unicode (NFC), in the case asked for, single spaces."""
    return " ".join(cased(unicodedata.normalize("NFC", text), case).split())


def cased(text: str, case: Case) -> str:
    """The text in lower or upper case, or as it is."""
    return text.lower() if case == "lower" else text.upper() if case == "upper" else text


def short(text: str) -> str:
    """The text in quotes, its end left out when it is long."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def boundary_message(boundary: str, where: str) -> str:
    """The sentence for a text that holds the word boundary itself."""
    others = " or ".join(repr(symbol) for symbol in WORD_BOUNDARIES if symbol != boundary)
    return f"{where} the character {boundary!r}, which stands for the gap between words; set word_boundary to {others}."


def id_message(index: int, size: int, file: str | None = None) -> str:
    """The sentence for an id outside the vocabulary; ``file``: what it was read from."""
    if file is None:
        return f"token id {index} is outside the vocabulary of {size}; the tokens do not belong to this model."
    return (
        f"token id {index} is outside the vocabulary of {size} in {file}; the tokens do not belong to this model: take "
        "the file that was saved with it."
    )


def check_boundary(boundary: str) -> None:
    """Raise TokenError for a word boundary that a dictionary's line could not hold."""
    if not isinstance(boundary, str) or boundary.split() != [boundary]:
        raise TokenError(
            f"word_boundary is {boundary!r}, expected a symbol without white space, as "
            f"{' or '.join(repr(symbol) for symbol in WORD_BOUNDARIES)}."
        )


def check_option(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise TokenError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise TokenError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes; raises TokenError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TokenError(f"the token file {path} cannot be read ({error.strerror}); check the path.") from error


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Lines ended by a line feed only: other Unicode line ends may be symbols."""
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    lines = text.replace("\r\n", "\n").split("\n")
    return [line for line in lines if line]


def write_file(path: Path, data: bytes) -> None:
    """Write beside and rename, so that no half file ever stands under the name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
