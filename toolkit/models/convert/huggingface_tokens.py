"""A CTC model's vocabulary: Hugging Face's vocab.json beside the toolkit's letters.

The toolkit's ids 0 to 3 are the blank, <pad>, </s> and <unk>; a vocab.json may have its blank and its special tokens
anywhere, or lack some. So the rows of the head change places on the way in, and back on the way out.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.data.tokens import LetterTokenizer
from toolkit.errors import CheckpointError, TokenError

VOCAB_FILE = "vocab.json"
TOKEN_FILES = (VOCAB_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
DEFAULT_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""Of Wav2Vec2CTCTokenizer. The first is the blank; fairseq's name for that row is <s>, and <pad> for the second's."""

SPECIAL_ROWS = 4
BOUNDARIES = ("|", "▁", "¦")
NEVER = -1e4
"""Bias of a made up row, whose weight is zero: exp of it is zero beside any other, so that nothing changes."""


@dataclass(frozen=True)
class Vocabulary:
    """What a head's outputs mean.

    rows : for each of the toolkit's ids the row of the file's head; None for an id that the file has no row for.
    tokenizer : None if the folder has no vocab.json.
    notes : what a user should know.
    """

    rows: tuple[int | None, ...]
    tokenizer: LetterTokenizer | None = None
    notes: tuple[str, ...] = field(default=())


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None without the file.

    Raises
    ------
    CheckpointError : the file is damaged or holds no object.
    """
    if not path.is_file():
        return None
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: this is no whole JSON file ({error}); copy the folder again.") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: the file holds no JSON object; copy the folder again.")
    return contents


def read_vocabulary(
    files: Mapping[str, Mapping[str, Any]], outputs: int, blank: int | None, *, source: Path
) -> Vocabulary:
    """The meaning of a CTC head's rows.

    Arguments
    ---------
    files : the objects in those of TOKEN_FILES that are there.
    outputs : rows of the head.
    blank : row of the blank, config.json's pad_token_id; None: the padding token's.
    source : the folder, for errors.

    Raises
    ------
    CheckpointError : the blank is none of the rows, or vocab.json is no table of symbols.

    Example
    -------
    >>> files = {"vocab.json": {"A": 0, "|": 1, "[PAD]": 2}, "tokenizer_config.json": {"pad_token": "[PAD]"}}
    >>> found = read_vocabulary(files, 3, 2, source=Path("model"))
    >>> found.rows, found.tokenizer.labels
    ((2, None, None, None, 0, 1), ('<s>', '<pad>', '</s>', '<unk>', 'A', '|'))
    """
    symbols = _symbols(files, outputs, source)
    special = {name: _special_token(files, name, default) for name, default in DEFAULT_TOKENS.items()}
    row_of = {symbol: row for row, symbol in symbols.items()}
    blank = row_of.get(special["pad_token"] or "") if blank is None else blank
    if blank is None or not 0 <= blank < outputs:
        raise CheckpointError(
            f"{source}: the blank is row {blank} (pad_token_id in config.json), but the head has {outputs} rows."
        )
    if not symbols:
        others = tuple(row for row in range(outputs) if row != blank)
        return Vocabulary((blank, *others), None, ("there is no vocab.json: the meaning of the outputs is unknown",))
    rows: list[int | None] = [blank]
    for names in (("bos_token", "pad_token"), ("eos_token",), ("unk_token",)):
        found = (row_of.get(special[name] or "") for name in names)
        rows.append(next((row for row in found if row is not None and row not in rows), None))
    letters = [row for row in range(outputs) if row not in rows]
    tokenizer, notes = _tokenizer(files, symbols, letters, known=rows[3] is not None, source=source)
    return Vocabulary((*rows, *letters), tokenizer, notes)


def _symbols(files: Mapping[str, Mapping[str, Any]], outputs: int, source: Path) -> dict[int, str]:
    """The symbol of each row that has one; empty without vocab.json."""
    vocab = dict(files.get(VOCAB_FILE, {}))
    if vocab and all(isinstance(inner, dict) for inner in vocab.values()):
        language = files.get("tokenizer_config.json", {}).get("target_lang")
        if language not in vocab:
            raise CheckpointError(
                f"{source}: {VOCAB_FILE} holds one vocabulary a language, and target_lang in tokenizer_config.json is "
                f"{language!r}, expected one of {', '.join(sorted(vocab))[:200]}."
            )
        vocab = vocab[language]
    # Tokens added later stand in a file of their own; those behind the head's last row have no output.
    named = vocab | dict(files.get("added_tokens.json", {})) if vocab else {}
    for name, row in named.items():
        if type(row) is not int or row < 0:
            raise CheckpointError(f"{source}: {VOCAB_FILE} gives {name[:40]!r} the row {row!r}, expected 0 or more.")
    return {row: name for name, row in named.items() if row < outputs}


def _special_token(files: Mapping[str, Mapping[str, Any]], name: str, default: str | None) -> str | None:
    """The symbol of a special token by the tokenizer's settings; None if they say that there is none."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in files.get(file, {}):
            value = files[file][name]
            value = value.get("content") if isinstance(value, dict) else value
            return value if isinstance(value, str) else None
    return default


def _tokenizer(
    files: Mapping[str, Mapping[str, Any]],
    symbols: Mapping[int, str],
    rows: Sequence[int],
    *,
    known: bool,
    source: Path,
) -> tuple[LetterTokenizer, tuple[str, ...]]:
    """Letters for the ``rows`` in order, and notes; ``known``: there is a row for unknown characters."""
    settings = files.get("tokenizer_config.json", {})
    delimiter = _special_token(files, "word_delimiter_token", "|")
    taken = set(symbols.values()) - {delimiter}
    boundary = delimiter
    if not delimiter or delimiter.split() != [delimiter]:
        boundary = next(sign for sign in BOUNDARIES if sign not in taken)
    names: list[str] = []
    for row in rows:
        name = symbols.get(row)
        name = boundary if name is not None and name == delimiter else name
        unusable = not name or "\n" in name or name in names or name in ("<s>", "<pad>", "</s>", "<unk>")
        names.append(f"<row{row}>" if unusable else name)
    lower = settings.get("do_lower_case") is True
    notes = _notes(names, boundary, lower)
    options = {"unknown": "unk" if known else "error", "case": "upper" if lower else "keep"}
    try:
        return LetterTokenizer(names, word_boundary=boundary, source=str(source / VOCAB_FILE), **options), notes
    except TokenError as error:
        raise CheckpointError(f"{source}: {VOCAB_FILE} makes no letters ({error}).") from error


def _notes(names: Sequence[str], boundary: str, lower: bool) -> tuple[str, ...]:
    notes = []
    letters = [name for name in names if not name.startswith("<")]
    if odd := [name for name in letters if len(name) > 1 or unicodedata.normalize("NFC", name) != name]:
        shown = ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else "")
        notes.append(
            f"{len(odd)} symbols are no single composed characters ({shown}): transcripts read from the model hold "
            "them, but letters of a text never become them"
        )
    if boundary not in names:
        notes.append("no symbol parts words: transcripts come as one word")
    if lower:
        notes.append("do_lower_case: texts are brought to upper case, and transcripts stay in upper case here")
    return tuple(notes)


def rows_to_ours(value: Tensor, rows: Sequence[int | None], made_up: float) -> Tensor:
    """The file's head (weight or bias) in the toolkit's order; rows that it lacks are filled with ``made_up``."""
    out = value.new_full((len(rows), *value.shape[1:]), made_up)
    places = [place for place, row in enumerate(rows) if row is not None]
    out[places] = value[[rows[place] for place in places]]
    return out


def rows_to_theirs(value: Tensor, rows: Sequence[int | None]) -> Tensor:
    """The inverse of :func:`rows_to_ours`; made up rows go."""
    places = torch.tensor([place for place, row in enumerate(rows) if row is not None])
    order = torch.tensor([row for row in rows if row is not None])
    return value[places[order.argsort()]]


def token_files(tokenizer: LetterTokenizer) -> dict[str, dict[str, Any]]:
    """The files of a Wav2Vec2CTCTokenizer that gives the same ids, but for the word boundary behind a text's end."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocab |= {symbol: SPECIAL_ROWS + place for place, symbol in enumerate(tokenizer.symbols)}
    settings = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "processor_class": "Wav2Vec2Processor",
        "do_lower_case": tokenizer.case == "upper",  # it brings texts to upper case, whatever its name says
        "word_delimiter_token": tokenizer.word_boundary,
        "replace_word_delimiter_char": " ",
    }
    return {
        VOCAB_FILE: vocab,
        "tokenizer_config.json": dict(DEFAULT_TOKENS) | settings,
        "special_tokens_map.json": dict(DEFAULT_TOKENS),
    }
