"""The symbols of a ``dict.txt`` as tokens by themselves: words, or pieces of an encoder that is not known."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.data.text_dictionary import DICT_FILE, SPECIALS, DictionaryIds, TextDictionary
from toolkit.data.token_common import id_message
from toolkit.errors import TokenError


class DictionaryTokenizer(DictionaryIds):
    """Text to the ids that a model was pretrained with, and back, where a ``dict.txt`` is all that is kept of them.

    Arguments
    ---------
    dictionary : symbols to ids.
    words : the symbols are the words of a text, parted by white space. False: they came from an encoder that nobody
        named (fairseq's prepared folders do not), so that ids have a meaning, but raw text cannot be encoded.

    Example
    -------
    >>> tokenizer = DictionaryTokenizer(TextDictionary(["the", "game"]), words=True)
    >>> tokenizer.encode("the  old game"), tokenizer.decode([0, 4, 5, 2])
    ([4, 3, 5], 'the game')
    """

    def __init__(self, dictionary: TextDictionary, *, words: bool) -> None:
        super().__init__(dictionary)
        self.words = words

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], *, words: bool) -> DictionaryTokenizer:
        """Read what `save` wrote.

        Raises
        ------
        TokenError : the file is missing or damaged.
        """
        return cls(TextDictionary.from_file(Path(folder) / DICT_FILE), words=words)

    @property
    def config(self) -> dict[str, Any]:
        """What a model's ``config.json`` says of its tokens."""
        return {"kind": "dictionary", "words": self.words}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of the words of ``text``, 3 for those that the dictionary lacks; with ``special`` ``<s>`` before and
        ``</s>`` behind, as the model saw its blocks.

        Raises
        ------
        TokenError : the symbols are no words.
        """
        if not self.words:
            raise TokenError(
                f"the model's tokens are a {DICT_FILE} alone, and nothing says how text becomes its symbols, so raw "
                "text cannot be encoded; encode it as the model's training text was, or name those byte pairs "
                "(bpe_folder) if they are GPT-2's."
            )
        ids = self.dictionary.encode(text, end=special).tolist()
        return [0, *ids] if special else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The symbols of ``ids`` with spaces between; special ones, the mask and padding are left out.

        Raises
        ------
        TokenError : an id is not in the dictionary.
        """
        symbols = []
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise TokenError(id_message(index, self.vocab_size))
            if len(SPECIALS) <= index < len(self.dictionary) and index != self.mask_id:
                symbols.append(self.dictionary.symbols[index])
        return " ".join(symbols)

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Write the dictionary; returns its name."""
        self.dictionary.save(Path(folder) / DICT_FILE)
        return DICT_FILE
