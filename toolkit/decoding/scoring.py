"""Word and character error rates as sums that add up over utterances and ranks, and the file of hypotheses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import jiwer


@dataclass(frozen=True)
class ErrorCounts:
    """Edits between references and hypotheses, in words or in characters.

    Counts add up, so a rate over any set of utterances is exact, however it was spread over batches and ranks.
    """

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference: int = 0

    @property
    def edits(self) -> int:
        """All three kinds of errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def percent(self) -> float:
        """Errors in percent of the reference; without any reference 0 if nothing was inserted, else infinite."""
        if self.reference:
            return 100.0 * self.edits / self.reference
        return float("inf") if self.edits else 0.0

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def count_word_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Word errors of one utterance; words are what white space separates.

    Example
    -------
    >>> count_word_errors("THE CAT SAT UP", "THE CAT SAT DOWN").percent
    25.0
    """
    return _count(reference.split(), hypothesis.split())


def count_character_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Character errors of one utterance; runs of white space count as one space, none at the ends."""
    return _count(list(" ".join(reference.split())), list(" ".join(hypothesis.split())))


def _count(reference: list[str], hypothesis: list[str]) -> ErrorCounts:
    """Errors between two lists of units."""
    if not reference:
        # Versions of jiwer differ on an empty reference; all that was said is inserted then.
        return ErrorCounts(insertions=len(hypothesis))
    # Each unit becomes one character, so that jiwer's character measure counts units of any spelling, spaces included.
    names = {unit: chr(0xF0000 + index) for index, unit in enumerate(dict.fromkeys([*reference, *hypothesis]))}
    out = jiwer.process_characters(
        "".join(names[unit] for unit in reference),
        "".join(names[unit] for unit in hypothesis),
        reference_transform=_AS_IT_IS,
        hypothesis_transform=_AS_IT_IS,
    )
    return ErrorCounts(out.substitutions, out.deletions, out.insertions, len(reference))


_AS_IT_IS = jiwer.Compose([jiwer.ReduceToListOfListOfChars()])


@dataclass(frozen=True)
class Transcript:
    """An utterance's name, what was said, and what the model heard."""

    id: str
    reference: str
    hypothesis: str


@dataclass
class WordErrors:
    """Collects transcripts and counts their errors.

    Example
    -------
    >>> errors = WordErrors()
    >>> errors.add("utt1", "HELLO WORLD", "HELLO WORD")
    >>> errors.wer, round(errors.cer, 1)
    (50.0, 9.1)
    """

    words: ErrorCounts = field(default_factory=ErrorCounts)
    characters: ErrorCounts = field(default_factory=ErrorCounts)
    transcripts: list[Transcript] = field(default_factory=list)

    def add(self, id: str, reference: str, hypothesis: str) -> None:
        """Count one utterance."""
        self.words += count_word_errors(reference, hypothesis)
        self.characters += count_character_errors(reference, hypothesis)
        self.transcripts.append(Transcript(id, reference, hypothesis))

    def extend(self, ids: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]) -> None:
        """Count a batch."""
        for id, reference, hypothesis in zip(ids, references, hypotheses, strict=True):
            self.add(id, reference, hypothesis)

    @property
    def wer(self) -> float:
        """Word error rate in percent."""
        return self.words.percent

    @property
    def cer(self) -> float:
        """Character error rate in percent."""
        return self.characters.percent

    @property
    def sentence_error_percent(self) -> float:
        """Share of utterances with any error, in percent."""
        wrong = sum(item.reference.split() != item.hypothesis.split() for item in self.transcripts)
        return 100.0 * wrong / max(1, len(self.transcripts))

    def metrics(self) -> dict[str, tuple[float, float]]:
        """(sum, count) pairs for exact averages over ranks: percent errors over reference words and characters."""
        return {
            "wer": (100.0 * self.words.edits, self.words.reference),
            "cer": (100.0 * self.characters.edits, self.characters.reference),
        }

    def merge(self, others: Iterable[WordErrors]) -> WordErrors:
        """This and others (those of other ranks) in one, transcripts sorted by id."""
        everyone = [self, *others]
        return WordErrors(
            words=sum((item.words for item in everyone), ErrorCounts()),
            characters=sum((item.characters for item in everyone), ErrorCounts()),
            transcripts=sorted((t for item in everyone for t in item.transcripts), key=lambda t: t.id),
        )


def write_hypotheses(path: str | os.PathLike[str], transcripts: Iterable[Transcript]) -> Path:
    """Write a line of JSON per utterance: id, reference, hypothesis; the file appears whole or not at all.

    Raises
    ------
    OSError : the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            for item in transcripts:
                file.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path
