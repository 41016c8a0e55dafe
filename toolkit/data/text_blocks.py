"""Where a long text is cut into blocks for a model: fairseq's four ways, and long lines cut instead of lost.

A text is a list of items (lines with their ``</s>``); a block is a range of its tokens. All of it is arithmetic on
the items' sizes: no token is read here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toolkit.errors import ConfigError, ManifestError

BREAK_MODES = ("none", "complete", "complete_doc", "eos")

SEPARATOR = 1
"""Size of an item that parts documents: an empty line is its ``</s>`` alone."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Ranges of tokens, and what became of the lines.

    Arguments
    ---------
    starts, ends : (blocks,) int64 places in the whole text, ends excluded.
    num_lines, num_tokens : of the text.
    cut_lines : lines that were longer than a block and are spread over several (with break mode "none" lines are cut
        wherever a block ends, and not counted).
    long_lines : lines longer than a block that were left whole.
    separators : empty lines that part documents and stand in no block.
    """

    starts: np.ndarray
    ends: np.ndarray
    num_lines: int
    num_tokens: int
    cut_lines: int = 0
    long_lines: int = 0
    separators: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def sizes(self) -> np.ndarray:
        """(blocks,) int64 tokens."""
        return self.ends - self.starts

    def report(self) -> str:
        """The counts in words, for the log."""
        held = int(self.sizes.sum())
        lost = self.num_tokens - held - self.separators
        parts = [f"{self.num_lines:,} lines, {self.num_tokens:,} tokens -> {len(self):,} blocks of {held:,} tokens"]
        if self.cut_lines:
            kept = "" if lost else ", none of their tokens is lost"
            parts.append(f"{self.cut_lines:,} lines longer than a block were cut{kept}")
        if self.long_lines:
            parts.append(f"{self.long_lines:,} lines longer than a block are left whole")
        if self.separators:
            parts.append(f"{self.separators:,} empty lines part the documents and are left out")
        if lost:
            parts.append(f"{lost:,} tokens stood alone and are left out")
        return "; ".join(parts)


def make_blocks(
    sizes: np.ndarray,
    block_size: int,
    *,
    break_mode: str = "complete_doc",
    cut_long: bool = True,
    separator: int = SEPARATOR,
    name: str = "the text",
) -> Blocks:
    """Cut a text into blocks.

    Arguments
    ---------
    sizes : (items,) tokens of each line.
    block_size : tokens of a block at most. fairseq's ``tokens_per_sample`` is one more: ``<s>`` comes in front.
    break_mode : "none": equal pieces, wherever they begin and end. "complete": as many whole lines as fit.
        "complete_doc": the same within a document; empty lines part documents and stand in no block, and blocks of
        one token are left out. "eos": a line each.
    cut_long : a line longer than a block is cut into pieces that fill blocks; False leaves it whole, as fairseq does.
    separator : size of a line that parts documents; 0 = there is none.
    name : of the text, for the error.

    Raises
    ------
    ConfigError : an argument makes no sense. ManifestError : there is no block.

    Example
    -------
    >>> blocks = make_blocks(np.array([5, 3, 1, 12]), 8)
    >>> [*zip(blocks.starts.tolist(), blocks.ends.tolist())]
    [(0, 8), (9, 17), (17, 21)]
    """
    if break_mode not in BREAK_MODES:
        raise ConfigError(f"break_mode is {break_mode!r}, expected one of {', '.join(BREAK_MODES)}.")
    if isinstance(block_size, bool) or not isinstance(block_size, (int, np.integer)) or block_size < 1:
        raise ConfigError(f"a block has {block_size!r} tokens, expected a whole number greater than 0.")
    sizes = np.asarray(sizes).astype(np.int64)
    total = int(sizes.sum())
    long_lines = 0 if break_mode == "none" else int((sizes > block_size).sum())
    is_separator = np.zeros(len(sizes), dtype=bool)
    if break_mode == "complete_doc" and separator > 0:
        is_separator = sizes == separator
    pieces = sizes
    if cut_long and long_lines:
        pieces, counts = _pieces(sizes, int(block_size))
        is_separator = np.repeat(is_separator, counts)
    if break_mode == "none":
        starts = np.arange(0, total, block_size, dtype=np.int64)
        ends = np.minimum(starts + block_size, total)
    elif break_mode == "eos":
        ends = np.cumsum(pieces)
        starts = ends - pieces
    else:
        starts, ends = _packed(pieces, int(block_size), is_separator)
        kept = ends - starts > (1 if break_mode == "complete_doc" else 0)
        starts, ends = starts[kept], ends[kept]
    if not len(starts):
        raise ManifestError(
            f"{name} ({len(sizes):,} lines, {total:,} tokens) gives no block with break_mode {break_mode!r}; check "
            "that it is not empty."
        )
    return Blocks(
        starts,
        ends,
        num_lines=len(sizes),
        num_tokens=total,
        cut_lines=long_lines if cut_long else 0,
        long_lines=0 if cut_long else long_lines,
        separators=int(is_separator.sum()),
    )


def locate(sizes: np.ndarray, blocks: Blocks) -> np.ndarray:
    """(blocks, 3) int64: the item in which a block begins, how far in, and the item in which it ends."""
    bounds = np.concatenate([[0], np.cumsum(np.asarray(sizes, dtype=np.int64))])
    first = np.searchsorted(bounds, blocks.starts, side="right") - 1
    last = np.searchsorted(bounds, blocks.ends - 1, side="right") - 1
    return np.stack([first, blocks.starts - bounds[first], last], axis=1)


def _pieces(sizes: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes with those above ``block_size`` split into full pieces and a rest, and the pieces of each item.

    A rest of one token gets a second one from the piece before it: alone it would be no sentence.
    """
    counts = np.maximum(1, -(-sizes // block_size))
    pieces = np.full(int(counts.sum()), block_size, dtype=np.int64)
    last = np.cumsum(counts) - 1
    pieces[last] = sizes - (counts - 1) * block_size
    alone = last[(counts > 1) & (pieces[last] == 1)] if block_size > 2 else last[:0]
    pieces[alone] += 1
    pieces[alone - 1] -= 1
    return pieces, counts


def _packed(sizes: np.ndarray, block_size: int, is_separator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges of as many items as fit, or of one alone; separators close a block and are in none."""
    count = len(sizes)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    begins = bounds[:-1]
    # From each item as the first: where the block would end by its size, though it takes one item that is not empty...
    stop = np.searchsorted(bounds, begins + block_size, side="right") - 1
    stop = np.minimum(np.maximum(stop, np.searchsorted(bounds, begins, side="right")), count)
    # ... and not beyond the next separator.
    places = np.append(np.flatnonzero(is_separator), count)
    stop = np.minimum(stop, places[np.searchsorted(places, np.arange(count), side="left")])
    # Which items are first is then a walk from block to block (a separator alone leads to the item behind it).
    following = np.maximum(stop, np.arange(1, count + 1)).tolist()
    firsts, item = [], 0
    while item < count:
        firsts.append(item)
        item = following[item]
    chosen = np.array(firsts, dtype=np.int64)
    chosen = chosen[~is_separator[chosen]] if len(chosen) else chosen
    return bounds[chosen], bounds[stop[chosen]]
