"""The demo's sentences: 55 words, five patterns, and a rule that gives each sentence to one split.

A sentence belongs to train, dev or test by a hash of its own text, so no sentence of one split can
stand in another, whatever is drawn and however often. The words were chosen to sound unlike each other.
"""

from __future__ import annotations

import hashlib
import math

NAMES = ("anna", "david", "maria", "peter", "susan", "victor", "julia", "thomas")
VERBS = ("carried", "found", "painted", "wanted", "opened", "counted", "bought", "moved")
NUMBERS = ("two", "three", "five", "six", "seven", "nine", "eleven")
COLORS = ("red", "green", "yellow", "purple", "orange", "silver")
THINGS = ("boxes", "candles", "flowers", "windows", "pencils", "baskets", "ladders", "bottles", "umbrellas")
PLACES = (
    "in the garden",
    "near the river",
    "at the station",
    "under the bridge",
    "behind the market",
    "in the kitchen",
    "near the station",
    "at the river",
    "under the market",
    "behind the garden",
)
TIMES = ("today", "yesterday", "again", "early", "quietly")

PATTERNS = (
    (NAMES, VERBS, NUMBERS, COLORS, THINGS),
    (NAMES, VERBS, NUMBERS, THINGS, PLACES),
    (NUMBERS, COLORS, THINGS, PLACES),
    (NAMES, VERBS, COLORS, THINGS, TIMES),
    (TIMES, NAMES, VERBS, NUMBERS, THINGS),
)

SPLITS = ("train", "dev", "test")
TEST_SHARE, DEV_SHARE = 10, 6  # percent of all possible sentences

VOCABULARY = tuple(sorted({word for pattern in PATTERNS for part in pattern for text in part for word in text.split()}))


def keyed_integer(*keys: int | str) -> int:
    """A 63-bit integer for ``keys``, the same on every machine and Python.

    (The toolkit's own ``derive_seed`` does the same; its module imports torch, and the processes that
    speak have to fork before torch starts threads.)
    """
    text = "/".join(str(key) for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def split_of(sentence: str) -> str:
    """The only split that may hold ``sentence``.

    Example
    -------
    >>> split_of("two red boxes near the river") == split_of("two red boxes near the river")
    True
    """
    place = keyed_integer("split", sentence) % 100
    if place < TEST_SHARE:
        return "test"
    return "dev" if place < TEST_SHARE + DEV_SHARE else "train"


def draw_sentence(*keys: int | str) -> str:
    """One sentence of the grammar for ``keys``, of any split."""
    pattern = PATTERNS[keyed_integer("pattern", *keys) % len(PATTERNS)]
    return " ".join(part[keyed_integer("word", place, *keys) % len(part)] for place, part in enumerate(pattern))


def sentences(split: str, count: int, seed: int) -> list[str]:
    """``count`` different sentences that belong to ``split``, a function of the arguments.

    Raises
    ------
    ValueError : an unknown split, or more sentences than a quarter of what the grammar has.

    Example
    -------
    >>> drawn = sentences("test", 20, seed=1)
    >>> len(set(drawn)), {split_of(sentence) for sentence in drawn}
    (20, {'test'})
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; take one of {', '.join(SPLITS)}.")
    share = {"test": TEST_SHARE, "dev": DEV_SHARE, "train": 100 - TEST_SHARE - DEV_SHARE}[split]
    most = sum(math.prod(map(len, pattern)) for pattern in PATTERNS) * share // 400  # beyond a quarter, draws repeat
    if count > most:
        raise ValueError(f"{count} sentences for {split} are more than the demo's grammar is for; take {most} at most.")
    found: dict[str, None] = {}
    attempt = 0
    while len(found) < count:
        sentence = draw_sentence(seed, split, attempt)
        if split_of(sentence) == split:
            found[sentence] = None
        attempt += 1
    return list(found)
