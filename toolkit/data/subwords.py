"""Sub-words as tokens: SentencePiece models with the CTC blank at id 0."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from toolkit.data.token_common import (
    BLANK,
    Case,
    Unknown,
    check_option,
    id_message,
    normalized,
    read_bytes,
    short,
    write_file,
)
from toolkit.errors import TokenError

SENTENCEPIECE_FILE = "sentencepiece.model"


class SentencePieceTokenizer:
    """Sub-word tokens of a SentencePiece model, with id 0 as CTC blank.

    Arguments
    ---------
    model : the bytes of a SentencePiece model whose id 0 is no ordinary piece (``train`` makes such).
    unknown : what to do with text that the model cannot spell: "error", "drop", or "unk".
    case : "keep", "lower" or "upper": change the text's case before anything else.
    source : where the model comes from, for messages.

    Example
    -------
    >>> tokenizer = SentencePieceTokenizer.train(["the cat sat", "the dog sat"] * 4, vocab_size=18)
    >>> tokenizer.decode(tokenizer.encode("the dog sat"))
    'the dog sat'
    """

    blank_id = BLANK

    def __init__(
        self, model: bytes, *, unknown: Unknown = "error", case: Case = "keep", source: str | None = None
    ) -> None:
        import sentencepiece

        check_option("unknown", unknown, ("error", "drop", "unk"))
        check_option("case", case, ("keep", "lower", "upper"))
        self.unknown, self.case = unknown, case
        self._model, self._source = bytes(model), source
        named = source or "the SentencePiece model"
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise TokenError(f"{named} cannot be read as a SentencePiece model; train or copy it again.") from error
        if not self._processor.is_control(BLANK):
            piece = self._processor.id_to_piece(BLANK)
            raise TokenError(
                f"{named} uses id 0 for {piece!r}, but CTC needs it for the blank; train it again with --pad_id=0 "
                "--unk_id=1 --bos_id=-1 --eos_id=-1."
            )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        model_type: Literal["unigram", "bpe", "char"] = "unigram",
        character_coverage: float = 1.0,
        unknown: Unknown = "error",
        case: Case = "keep",
        seed: int = 0,
    ) -> SentencePieceTokenizer:
        """Train on ``texts``; a corpus too small for ``vocab_size`` gives fewer tokens rather than an error.

        Arguments
        ---------
        texts : transcripts of the training part.
        vocab_size : ids wanted at most, blank and unknown included.
        model_type : "unigram", "bpe" or "char".
        character_coverage : share of all characters that get a token; below 1 the rarest become unknown.
        unknown, case : as for the class.
        seed : of SentencePiece's generator (training on all sentences, as here, draws nothing from it).

        Raises
        ------
        TokenError if there is nothing to train on, or ``vocab_size`` is smaller than the number of characters.
        """
        import sentencepiece

        check_option("model_type", model_type, ("unigram", "bpe", "char"))
        sentences = [normalized(text, case) for text in texts]
        sentences = [sentence for sentence in sentences if sentence]
        if not sentences:
            raise TokenError(
                "there are no transcripts to train tokens on; check the column 'wrd' of the training manifest."
            )
        characters = len(set("".join(sentences).replace(" ", "▁")) | {"▁"})
        if vocab_size < characters + 2 and character_coverage >= 1:
            raise TokenError(
                f"vocab_size is {vocab_size}, but the transcripts hold {characters} different characters and two more "
                f"ids are for blank and unknown; use {characters + 2} or more, or a character_coverage below 1."
            )
        sentencepiece.set_random_generator_seed(seed)
        settings = {
            "model_type": model_type,
            "character_coverage": character_coverage,
            "pad_id": BLANK,
            "pad_piece": "<blank>",
            "unk_id": 1,
            "bos_id": -1,
            "eos_id": -1,
            # Composed by us above; the library's own rules would rewrite full-width and compatibility letters.
            "normalization_rule_name": "identity",
            "hard_vocab_limit": False,
            "num_threads": 1,
            "max_sentence_length": 1 << 20,
            "minloglevel": 2,
        }
        buffer = io.BytesIO()
        for size in _sizes_to_try(vocab_size, model_type):
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(sentences), model_writer=buffer, vocab_size=size, **settings
                )
                break
            except RuntimeError as error:
                buffer = io.BytesIO()
                reason = error
        else:
            raise TokenError(
                f"SentencePiece could not train {vocab_size} tokens on {len(sentences)} transcripts: {reason}"
            )
        return cls(buffer.getvalue(), unknown=unknown, case=case)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, unknown: Unknown = "error", case: Case = "keep"
    ) -> SentencePieceTokenizer:
        """Read a model file."""
        return cls(read_bytes(path), unknown=unknown, case=case, source=str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids, blank and unknown included."""
        return self._processor.get_piece_size()

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` of a model folder says under "tokens"."""
        return {"kind": "sentencepiece", "file": SENTENCEPIECE_FILE, "unknown": self.unknown, "case": self.case}

    def normalize(self, text: str) -> str:
        """The text as the tokenizer sees it: composed, in its case, single spaces."""
        return normalized(text, self.case)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; an empty text gives an empty list.

        Raises
        ------
        TokenError where the model has no token for a character (with ``unknown="error"``).
        """
        normal = self.normalize(text)
        ids = list(self._processor.encode(normal))
        unknown = self._processor.unk_id()
        if unknown not in ids or self.unknown == "unk":
            return ids
        if self.unknown == "drop":
            return [index for index in ids if index != unknown]
        pieces = self._processor.encode(normal, out_type=str)
        letter = pieces[ids.index(unknown)][:1]
        raise TokenError(
            f"the transcript {short(text)} holds {letter!r} (U+{ord(letter):04X}), for which the SentencePiece model "
            "has no token; train it on all training transcripts, or set unknown to 'drop' or 'unk'."
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; blanks vanish.

        Raises
        ------
        TokenError for an id outside the vocabulary.
        """
        numbers = [int(index) for index in ids]
        for index in numbers:
            if not 0 <= index < self.vocab_size:
                raise TokenError(id_message(index, self.vocab_size, self._source))
        return " ".join(self._processor.decode([index for index in numbers if index != BLANK]).split())

    def save(self, folder: str | os.PathLike[str]) -> str:
        """Write ``sentencepiece.model`` into ``folder``; returns the file's name."""
        write_file(Path(folder) / SENTENCEPIECE_FILE, self._model)
        return SENTENCEPIECE_FILE


def _sizes_to_try(vocab_size: int, model_type: str) -> Iterable[int]:
    """``vocab_size``, and for BPE, which has no soft limit of its own, ever smaller ones."""
    yield vocab_size
    while model_type == "bpe" and vocab_size > 3:
        vocab_size -= max(1, vocab_size // 50)
        yield vocab_size
