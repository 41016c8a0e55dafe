"""Text for a model: blocks of a prepared corpus, masked, and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.data.indexed_text import IndexedText, JoinedText
from toolkit.data.text_blocks import Blocks, locate, make_blocks
from toolkit.data.text_dictionary import DICT_FILE, TextDictionary
from toolkit.data.text_masks import TextMasking, fairseq_generator
from toolkit.data.token_common import PAD
from toolkit.errors import ConfigError, TokenError
from toolkit.seeds import Randomness

BEGIN = 0
"""``<s>``, which stands in front of every block."""


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Some blocks of text, padded to one length.

    Arguments
    ---------
    ids : where each block comes from ("train:17": begins in line 17).
    tokens : (batch, length) int64, padded with ``PAD``.
    lengths : (batch,) int64, tokens of each block; always on the host.
    source : (batch, length) int64, what the model is shown: the mask's id where a token is hidden; None without masks.
    chosen : (batch, length) bool, the tokens chosen to be hidden, replaced or kept on purpose; None without masks.
    """

    ids: list[str]
    tokens: Tensor
    lengths: Tensor
    source: Tensor | None = None
    chosen: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextBatch:
        """The batch with its tokens on ``device``; lengths stay on the host."""
        names = ("tokens", "source", "chosen")
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking), names)

    def pin_memory(self) -> TextBatch:
        """The batch with its tensors in page-locked memory, for copies that overlap with work."""
        names = ("tokens", "lengths", "source", "chosen")
        return self._mapped(lambda tensor: tensor.pin_memory(), names)

    def _mapped(self, move: Callable[[Tensor], Tensor], names: Sequence[str]) -> TextBatch:
        moved: dict[str, Any] = {name: move(value) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **moved)


class TextBlocks:
    """The blocks of one part of a prepared corpus, ``<s>`` in front of each.

    Arguments
    ---------
    text : the part's lines, in one file or in several.
    dictionary : what the ids mean.
    tokens_per_sample : tokens of a block at most, ``<s>`` counted.
    break_mode, cut_long : see :func:`~toolkit.data.text_blocks.make_blocks`.
    masking : hides tokens; None = blocks as they are.
    fairseq_masks : draw the masks that fairseq draws for (seed, epoch, block); they agree where its blocks do, which
        takes ``cut_long`` False.

    Masks are a function of (seed, epoch, block), which names a block's turn as (update, micro-batch, item) would, since
    it comes once an epoch, and unlike those stays the same with another batch size or number of ranks. A resumed run
    draws those that it would have drawn, and a validation (always epoch 0) draws the same ones each time.

    Raises
    ------
    ConfigError, ManifestError : arguments or a text that give no blocks. TokenError : the dictionary is another
    text's.
    """

    def __init__(
        self,
        text: IndexedText | JoinedText,
        dictionary: TextDictionary,
        *,
        tokens_per_sample: int = 512,
        break_mode: str = "complete_doc",
        cut_long: bool = True,
        masking: TextMasking | None = None,
        fairseq_masks: bool = False,
    ) -> None:
        if isinstance(tokens_per_sample, bool) or not isinstance(tokens_per_sample, int) or tokens_per_sample < 2:
            raise ConfigError(f"tokens_per_sample is {tokens_per_sample!r}, expected a whole number of 2 or more.")
        text.check_ids(len(dictionary), DICT_FILE)
        self.text, self.dictionary, self.masking = text, dictionary, masking
        self.fairseq_masks, self.name = fairseq_masks, text.prefix.name
        self.blocks: Blocks = make_blocks(
            text.sizes, tokens_per_sample - 1, break_mode=break_mode, cut_long=cut_long, name=str(text.prefix)
        )
        self.lengths: np.ndarray = self.blocks.sizes + 1
        self._first = locate(text.sizes, self.blocks)[:, :2]
        self._settings = (tokens_per_sample, break_mode, cut_long)

    def __len__(self) -> int:
        return len(self.blocks)

    def report(self) -> str:
        """What the blocks hold and what was cut, for the log."""
        return f"{self.name}: {self.blocks.report()}"

    def fingerprint(self) -> str:
        """Equal where the blocks are, and what their ids mean (hexadecimal): a checkpoint must go on with the same."""
        content = (self.text.fingerprint(), self.dictionary.fingerprint(), self._settings)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def block_id(self, row: int) -> str:
        """Part and line (from 1) in which a block begins, and how many tokens into it."""
        line, offset = self._first[row].tolist()
        return self.text.line_id(line) + (f"+{offset}" if offset else "")

    def tokens(self, row: int) -> np.ndarray:
        """(length,) int64 of one block, ``<s>`` first.

        Raises
        ------
        TokenError : an id that the dictionary does not have.
        """
        own = self.text.tokens(int(self.blocks.starts[row]), int(self.blocks.ends[row]))
        if len(own) and not 0 <= int(own.min()) <= int(own.max()) < len(self.dictionary):
            error = self.text.wrong_id(int(own.max()), len(self.dictionary), DICT_FILE)
            raise TokenError(f"{self.block_id(row)}: {error}")
        return np.concatenate([[BEGIN], own])

    def load(self, row: int, *, epoch: int, crop_samples: int | None = None, seed: int = 0) -> dict[str, Any]:
        """One item: "id", "tokens", and with masks "source" and "chosen"."""
        tokens = self.tokens(row)
        item: dict[str, Any] = {"id": self.block_id(row), "tokens": tokens}
        if self.masking is not None:
            if self.fairseq_masks:
                rng = fairseq_generator(seed, epoch + 1, row)
            else:
                rng = Randomness(seed).numpy("text mask", epoch, row)
            try:
                item["source"], item["chosen"] = self.masking(tokens, rng)
            except TokenError as error:
                raise TokenError(f"{item['id']}: {error}") from error
        return item


def collate_text(items: Sequence[Mapping[str, Any]], *, samples: int | None = None) -> TextBatch:
    """Items of `TextBlocks` to a batch, padded to ``samples`` tokens (None or less than the longest: to the longest).

    Example
    -------
    >>> items = [{"id": "a", "tokens": np.array([0, 5, 2])}, {"id": "b", "tokens": np.array([0, 2])}]
    >>> collate_text(items, samples=4).tokens.tolist()
    [[0, 5, 2, 1], [0, 2, 1, 1]]
    """
    lengths = np.array([len(item["tokens"]) for item in items], dtype=np.int64)
    length = max(samples or 0, int(lengths.max()))
    masked = "source" in items[0]
    return TextBatch(
        ids=[item["id"] for item in items],
        tokens=_padded([item["tokens"] for item in items], length, PAD, np.int64),
        lengths=torch.from_numpy(lengths),
        source=_padded([item["source"] for item in items], length, PAD, np.int64) if masked else None,
        chosen=_padded([item["chosen"] for item in items], length, False, np.bool_) if masked else None,
    )


def open_text(
    folder: str | Path, parts: Sequence[str], *, joined: Sequence[str] = (), dictionary: str | Path | None = None
) -> tuple[TextDictionary, dict[str, IndexedText | JoinedText]]:
    """The dictionary of a prepared folder, and the text of each of ``parts`` ("train", "valid", ...).

    Arguments
    ---------
    folder : holds dict.txt and PART.idx, PART.bin.
    parts : names of texts.
    joined : those of them that go on in PART1, PART2, ... as one text; fairseq reads its training part so, and no
        other.
    dictionary : the dict.txt of a folder that holds none.

    Raises
    ------
    TokenError : there is no such folder or part, a file is damaged, or one of several is missing.
    """
    folder = Path(folder)
    path = folder / DICT_FILE
    if dictionary is not None and not path.is_file():
        path = Path(dictionary).expanduser()
    elif not path.is_file():
        raise TokenError(
            f"{folder} has no {DICT_FILE}; give the folder that fairseq-preprocess or wikitext_prepare.py wrote."
        )
    symbols = TextDictionary.from_file(path)
    texts: dict[str, IndexedText | JoinedText] = {}
    for part in parts:
        if not (folder / f"{part}.idx").is_file():
            there = ", ".join(sorted(path.stem for path in folder.glob("*.idx"))) or "none"
            raise TokenError(f"{folder} has no part {part!r} ({part}.idx); it has {there}.")
        pieces = [IndexedText(folder / name) for name in _piece_names(folder, part, part in joined)]
        texts[part] = pieces[0] if len(pieces) == 1 else JoinedText(pieces)
    return symbols, texts


def _piece_names(folder: Path, part: str, joined: bool) -> list[str]:
    """Names of the texts that make up ``part``, in order; TokenError where one is missing between others."""
    if not joined:
        return [part]
    ends = (path.stem.removeprefix(part) for path in folder.glob(f"{part}[1-9]*.idx"))
    numbers = sorted(int(end) for end in ends if end.isdecimal())
    for wanted, number in enumerate(numbers, start=1):
        if number != wanted:
            # fairseq would end before the gap, and train on less without a word.
            raise TokenError(
                f"{folder} has {part}{number}.idx and no {part}{wanted}.idx; copy the missing piece, or move those "
                "behind it away."
            )
    return [part, *(f"{part}{number}" for number in numbers)]


def _padded(rows: Sequence[np.ndarray], length: int, fill: int, dtype: type) -> Tensor:
    """(rows, length) filled up with ``fill``."""
    padded: np.ndarray = np.full((len(rows), length), fill, dtype=dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)
