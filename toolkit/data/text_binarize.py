"""From text files to fairseq's dictionary and binary files, in several processes, with the same result for any number.

Files are cut into chunks at line feeds. Each chunk is turned into numbers of its own symbols (GPT-2's, or its
words) once, by whichever process comes to it; the dictionary is made of the sums, and gives the final ids.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from toolkit.data.indexed_text import IndexedTextWriter
from toolkit.data.text_bpe import NUM_PIECES, Gpt2Bpe, number_counts
from toolkit.data.text_dictionary import DICT_FILE, TextDictionary
from toolkit.data.token_common import END, UNKNOWN
from toolkit.errors import TokenError, TrainingError

CHUNK_BYTES = 2 << 20
"""Text of a chunk: a second or two of work, and some tens of megabytes of memory."""

LITERAL_UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Chunk:
    """Bytes ``start`` to ``end`` of a file, whose numbers go to ``target`` (.ids.npy and .sizes.npy)."""

    path: str
    start: int
    end: int
    target: str
    bpe_folder: str | None


@dataclass(frozen=True)
class Encoded:
    """What a chunk came to: its symbols' counts by number (BPE), or its words and their counts."""

    chunk: Chunk
    counts: np.ndarray
    words: tuple[str, ...] | None


@dataclass(frozen=True)
class PartReport:
    """What one part of a corpus became; ``unknown`` counts tokens that the dictionary lacks."""

    lines: int
    empty_lines: int
    tokens: int
    unknown: int

    def __str__(self) -> str:
        share = f"{100 * self.unknown / max(1, self.tokens):.3g}"
        return (
            f"{self.lines:,} lines ({self.empty_lines:,} empty), {self.tokens:,} tokens with line ends, "
            f"{share} % not in the dictionary"
        )


def binarize(
    files: Mapping[str, Path],
    target: Path,
    *,
    bpe_folder: Path | None,
    dictionary: TextDictionary | None,
    dictionary_from: str = "train",
    num_workers: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, PartReport]:
    """Write ``dict.txt`` and ``PART.bin``, ``PART.idx`` for each part, byte for byte as fairseq-preprocess does.

    Arguments
    ---------
    files : part to text file (UTF-8; a line each; ``\\n``, ``\\r\\n`` and ``\\r`` end lines).
    target : an empty folder; some more files lie in it meanwhile.
    bpe_folder : GPT-2's files; None = the words between white space are the symbols.
    dictionary : None = it is built from the part ``dictionary_from``.
    num_workers : processes; None takes up to 8.

    Raises
    ------
    TokenError : a file is not UTF-8. TrainingError : a process was killed.
    """
    chunks = {part: _chunks(path, target / f"{part}.part", bpe_folder, chunk_bytes) for part, path in files.items()}
    encoded: dict[str, Encoded] = {}
    everything = list(chain.from_iterable(chunks.values()))
    with tqdm(
        total=sum(chunk.end - chunk.start for chunk in everything),
        desc="text to tokens",
        unit="B",
        unit_scale=True,
        disable=None,
    ) as bar:
        for done in _encoded(everything, num_workers):
            encoded[done.chunk.target] = done
            bar.update(done.chunk.end - done.chunk.start)
    own = {part: [encoded[chunk.target] for chunk in parts] for part, parts in chunks.items()}
    if dictionary is None:
        dictionary = TextDictionary.from_counts(_summed(own[dictionary_from]))
    dictionary.save(target / DICT_FILE)
    return {part: _write_part(target / part, pieces, dictionary) for part, pieces in own.items()}


def read_text_lines(data: bytes, path: str | os.PathLike[str], start: int = 0) -> list[str]:
    """Lines as Python reads them from a text file: only ``\\n``, ``\\r\\n`` and ``\\r`` end one.

    Raises
    ------
    TokenError : the bytes are not UTF-8; ``start`` is their place in the file.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenError(f"{path} is not UTF-8 text (byte {start + error.start:,}); save it as UTF-8.") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    return lines


def encode_chunk(chunk: Chunk) -> Encoded:
    """Turn a chunk into numbers and leave them in its files; runs in any process."""
    with open(chunk.path, "rb") as stream:
        stream.seek(chunk.start)
        lines = read_text_lines(stream.read(chunk.end - chunk.start), chunk.path, chunk.start)
    words: tuple[str, ...] | None = None
    if chunk.bpe_folder is not None:
        numbers = _bpe(chunk.bpe_folder).encode_lines([line.strip() for line in lines])
        sizes = [len(row) for row in numbers]
        ids: np.ndarray = np.fromiter(chain.from_iterable(numbers), dtype=np.uint16)
        counts = np.bincount(ids, minlength=NUM_PIECES)
    else:
        rows = [line.split() for line in lines]
        sizes = [len(row) for row in rows]
        table = Counter(chain.from_iterable(rows))
        words, counts = tuple(table), np.fromiter(table.values(), dtype=np.int64)
        place = {word: number for number, word in enumerate(words)}
        ids = np.fromiter((place[word] for word in chain.from_iterable(rows)), dtype=np.uint32)
    np.save(f"{chunk.target}.ids.npy", ids)
    np.save(f"{chunk.target}.sizes.npy", np.array(sizes, dtype=np.int32))
    return Encoded(chunk, counts, words)


@lru_cache(maxsize=1)
def _bpe(folder: str) -> Gpt2Bpe:
    """Read once in each process."""
    return Gpt2Bpe.from_folder(folder)


def _chunks(path: Path, target: Path, bpe_folder: Path | None, size: int) -> list[Chunk]:
    """The file in pieces of about ``size`` bytes that end behind a line feed."""
    total = path.stat().st_size
    bounds = [0]
    with open(path, "rb") as stream:
        while bounds[-1] < total:
            stream.seek(min(bounds[-1] + size, total))
            stream.readline()
            bounds.append(min(stream.tell(), total))
    folder = None if bpe_folder is None else str(bpe_folder)
    return [
        Chunk(str(path), start, end, f"{target}{number:06d}", folder)
        for number, (start, end) in enumerate(pairwise(bounds))
    ]


def _encoded(chunks: Sequence[Chunk], num_workers: int | None) -> Iterator[Encoded]:
    workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
    if len(chunks) < 2 or workers < 2:
        yield from map(encode_chunk, chunks)
        return
    # spawn: the caller may hold threads (torch), which fork would copy in a broken state
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=context) as pool:
            try:
                yield from pool.map(encode_chunk, chunks)
            finally:  # told to stop, it ends without the chunks that are left
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool as error:
        raise TrainingError(
            "a process that turned text into tokens was killed, most likely because memory ran out; take fewer workers "
            "and run the same command again."
        ) from error


def _summed(pieces: Iterable[Encoded]) -> dict[str, int]:
    """Occurrences of each symbol."""
    total: Counter[str] = Counter()
    numbers = np.zeros(NUM_PIECES, dtype=np.int64)
    for piece in pieces:
        if piece.words is None:
            numbers += piece.counts
        else:
            total.update(dict(zip(piece.words, piece.counts.tolist(), strict=True)))
    return {**total, **number_counts(numbers)}


def _write_part(prefix: Path, pieces: Sequence[Encoded], dictionary: TextDictionary) -> PartReport:
    """One part's .bin and .idx; the chunks' own files are removed."""
    lines = empty = tokens = unknown = 0
    numbers = dictionary.lookup(str(number) for number in range(NUM_PIECES))
    with IndexedTextWriter(prefix, dictionary.token_type) as writer:
        for piece in pieces:
            files = [Path(f"{piece.chunk.target}.{name}.npy") for name in ("ids", "sizes")]
            ids, sizes = (np.load(file, allow_pickle=False) for file in files)
            table = numbers if piece.words is None else dictionary.lookup(piece.words)
            mapped = np.full(len(ids) + len(sizes), END, dtype=np.int64)
            is_end = np.zeros(len(mapped), dtype=bool)
            is_end[np.cumsum(sizes.astype(np.int64) + 1) - 1] = True
            mapped[~is_end] = table[ids]
            writer.add(mapped, sizes + 1)
            lines, empty, tokens = lines + len(sizes), empty + int((sizes == 0).sum()), tokens + len(mapped)
            unknown += int((mapped == UNKNOWN).sum())
            if piece.words is not None and LITERAL_UNKNOWN in piece.words:
                unknown -= int(piece.counts[piece.words.index(LITERAL_UNKNOWN)])
            for file in files:
                file.unlink()
    return PartReport(lines, empty, tokens, unknown)


