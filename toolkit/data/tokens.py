"""From text to token ids and back: letters (fairseq's dict.ltr.txt), SentencePiece, GPT-2's byte pairs, and words.

Id 0 is the CTC blank in the first two. A tokenizer is saved into a ``model/`` folder as a plain file and a few words
in ``config.json``; :func:`load_tokenizer` reads them back without running any code of the folder's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from toolkit.data.dictionary_tokens import DictionaryTokenizer
from toolkit.data.letters import LETTERS_FILE, LetterTokenizer
from toolkit.data.subwords import SENTENCEPIECE_FILE, SentencePieceTokenizer
from toolkit.data.text_bpe import Gpt2Tokenizer
from toolkit.data.token_common import Tokenizer
from toolkit.errors import TokenError

__all__ = [
    "LETTERS_FILE",
    "SENTENCEPIECE_FILE",
    "DictionaryTokenizer",
    "Gpt2Tokenizer",
    "LetterTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "dictionary_difference",
    "load_tokenizer",
]


def load_tokenizer(
    folder: str | os.PathLike[str],
) -> LetterTokenizer | SentencePieceTokenizer | Gpt2Tokenizer | DictionaryTokenizer:
    """The tokenizer of a ``model/`` folder: its kind and options from ``config.json``, its symbols from the file
    beside it.

    Without ``config.json`` the file that is there decides, with default options.

    Raises
    ------
    TokenError if there is none, or the kind is not known.
    """
    folder = Path(folder)
    config = _token_config(folder)
    if config is None:
        if (folder / LETTERS_FILE).is_file():
            return LetterTokenizer.from_file(folder / LETTERS_FILE)
        if (folder / SENTENCEPIECE_FILE).is_file():
            return SentencePieceTokenizer.from_file(folder / SENTENCEPIECE_FILE)
        raise TokenError(
            f"{folder} holds no tokens ({LETTERS_FILE} or {SENTENCEPIECE_FILE}); give the model folder of a fine-tuned "
            "model, not of a pretrained one."
        )
    kind = config.get("kind")
    options = {key: config[key] for key in ("unknown", "case", "word_boundary") if key in config}
    if kind == "letters":
        return LetterTokenizer.from_file(folder / LETTERS_FILE, **options)
    if kind == "sentencepiece":
        options.pop("word_boundary", None)
        return SentencePieceTokenizer.from_file(folder / SENTENCEPIECE_FILE, **options)
    if kind == "gpt2":
        return Gpt2Tokenizer.from_folder(folder)
    if kind == "dictionary":
        return DictionaryTokenizer.from_folder(folder, words=config.get("words") is True)
    raise TokenError(
        f"{folder / 'config.json'}: the tokens are of kind {kind!r}, expected letters, sentencepiece, gpt2 or "
        "dictionary; the folder may come from a newer version of the toolkit."
    )


def dictionary_difference(kept: Tokenizer | None, given: Tokenizer | None) -> str:
    """The first symbol in which the dictionaries of two tokenizers differ, in words; "" where they do not, or one of
    them has none."""
    if isinstance(kept, Gpt2Tokenizer | DictionaryTokenizer) and isinstance(given, Gpt2Tokenizer | DictionaryTokenizer):
        return kept.dictionary.difference(given.dictionary)
    return ""


def _token_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        tokens = json.loads(path.read_text(encoding="utf-8")).get("tokens")
    except (ValueError, AttributeError) as error:
        raise TokenError(f"{path} is not a JSON object; copy the model folder again.") from error
    return tokens if isinstance(tokens, dict) else None
