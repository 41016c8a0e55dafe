"""Datasets with dynamic items: what an utterance gives is computed from its manifest row, item by item, as asked for.

The manner is SpeechBrain's: a function says what it takes and what it provides, the dataset works out what has to
run for the output keys.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toolkit.data.audio import AudioFile, normalize_waveform
from toolkit.data.manifest import Manifest, read_manifest
from toolkit.data.tokens import Tokenizer
from toolkit.errors import AudioError, ConfigError, ManifestError, TokenError
from toolkit.seeds import Randomness

__all__ = [
    "DynamicItem",
    "DynamicItemDataset",
    "ItemContext",
    "add_dynamic_item",
    "provides",
    "set_output_keys",
    "speech_items",
    "takes",
    "text_items",
]

CONTEXT = "context"
"""Key under which an item gets the :class:`ItemContext`."""

DURATION_TOLERANCE = 0.5
"""Seconds by which a file may differ from its manifest (rounded durations), or a tenth of it if that is less."""

SMALLEST_TOLERANCE = 0.05
"""Seconds that are always allowed: an MP3 may be a frame longer or shorter than it was when it was measured."""

CROP_TOLERANCE = 0.025
"""Seconds of silence that a crop may end with: less than one frame of the model, so never a target by itself."""


@dataclass(frozen=True)
class ItemContext:
    """Where and when an item is computed; all randomness of an item has to come from this.

    Arguments
    ---------
    row : row of the manifest.
    id : the utterance's ID.
    epoch : from 0.
    seed : of the run.
    crop_samples : length to crop to, in samples; None = the whole utterance.
    """

    row: int
    id: str
    epoch: int = 0
    seed: int = 0
    crop_samples: int | None = None

    def rng(self, name: str) -> np.random.Generator:
        """The generator for the use ``name`` ("crop", "noise", ...): a function of (seed, name, epoch, id)."""
        return Randomness(self.seed).numpy(name, self.epoch, self.id)


@dataclass(frozen=True)
class DynamicItem:
    """A function with the keys that it takes and provides; made by :func:`takes` and :func:`provides`.

    A generator function provides its keys one ``yield`` at a time; another function with several keys returns a tuple.
    """

    func: Callable[..., Any]
    takes: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The function's name, for messages."""
        return getattr(self.func, "__qualname__", type(self.func).__name__)

    def __call__(self, *values: Any) -> Any:
        """Call the function as it is."""
        return self.func(*values)

    def compute(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The provided values, as many as there are keys.

        Raises
        ------
        ConfigError if the function gives another number of values.
        """
        result = self.func(*values)
        if inspect.isgenerator(result):
            result = tuple(result)
        elif len(self.provides) == 1:
            return (result,)
        if not isinstance(result, (tuple, list)) or len(result) != len(self.provides):
            count = len(result) if isinstance(result, (tuple, list)) else 1
            raise ConfigError(
                f"the dynamic item {self.name} gives {count} values, but provides {len(self.provides)} keys "
                f"({', '.join(self.provides)}); make the two agree."
            )
        return tuple(result)


def takes(*keys: str) -> Callable[[Callable[..., Any] | DynamicItem], DynamicItem]:
    """Decorator: the function's arguments are the values of ``keys``, in this order."""

    def decorate(func: Callable[..., Any] | DynamicItem) -> DynamicItem:
        if isinstance(func, DynamicItem):
            return DynamicItem(func.func, keys, func.provides)
        return DynamicItem(func, takes=keys)

    return decorate


def provides(*keys: str) -> Callable[[Callable[..., Any] | DynamicItem], DynamicItem]:
    """Decorator: what the function returns (or yields, one after the other) are the values of ``keys``.

    Example
    -------
    >>> @takes("wrd")
    ... @provides("letters", "count")
    ... def letters(wrd):
    ...     found = list(wrd)
    ...     yield found
    ...     yield len(found)
    >>> letters.takes, letters.provides
    (('wrd',), ('letters', 'count'))
    """

    def decorate(func: Callable[..., Any] | DynamicItem) -> DynamicItem:
        if isinstance(func, DynamicItem):
            return DynamicItem(func.func, func.takes, keys)
        return DynamicItem(func, provides=keys)

    return decorate


class DynamicItemDataset:
    """A manifest and what to compute from its rows.

    Arguments
    ---------
    manifest : the utterances; their columns, and ``id``, are there as keys.
    dynamic_items : further keys, by functions decorated with :func:`takes` and :func:`provides`; an item may take
        what another provides, and ``context`` (:class:`ItemContext`).
    output_keys : what ``dataset[i]`` returns: names, or a mapping from the name wanted to the key.

    Raises
    ------
    ConfigError for keys that nothing provides, that two items provide, or that need each other in a circle.

    Example
    -------
    >>> @takes("wrd")
    ... @provides("shout")
    ... def shout(wrd):
    ...     return wrd + "!"
    >>> rows = [{"ID": "a", "duration": 1, "wav": "/a.wav", "wrd": "HELLO"}]
    >>> DynamicItemDataset(Manifest.from_rows(rows), [shout], ["id", "shout"])[0]
    {'id': 'a', 'shout': 'HELLO!'}
    """

    def __init__(
        self,
        manifest: Manifest,
        dynamic_items: Iterable[DynamicItem] = (),
        output_keys: Iterable[str] | Mapping[str, str] = ("id",),
    ) -> None:
        self.manifest = manifest
        self._items: list[DynamicItem] = []
        self._provider: dict[str, DynamicItem] = {}
        for item in dynamic_items:
            self._register(item)
        self.set_output_keys(output_keys)

    @classmethod
    def from_manifest(
        cls,
        path: str | os.PathLike[str],
        replacements: Mapping[str, str] | None = None,
        dynamic_items: Iterable[DynamicItem] = (),
        output_keys: Iterable[str] | Mapping[str, str] = ("id",),
    ) -> DynamicItemDataset:
        """A dataset of the manifest at ``path``, of any kind that ``read_manifest`` takes."""
        return cls(read_manifest(path, replacements=replacements), dynamic_items, output_keys)

    from_csv = from_manifest
    from_json = from_manifest

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.load(row)

    @property
    def durations(self) -> np.ndarray:
        """(utterances,) seconds, for samplers."""
        return self.manifest.durations

    @property
    def output_keys(self) -> dict[str, str]:
        """Names that ``load`` returns and the keys behind them."""
        return dict(self._output)

    def add_dynamic_item(
        self,
        func: Callable[..., Any] | DynamicItem,
        takes: str | Sequence[str] | None = None,
        provides: str | Sequence[str] | None = None,
    ) -> None:
        """Add a decorated function, or a plain one with the keys given here."""
        item = func if isinstance(func, DynamicItem) else DynamicItem(func)
        taken, provided = _keys(takes, item.takes), _keys(provides, item.provides)
        self._register(DynamicItem(item.func, taken, provided))
        self.set_output_keys(self._output)

    def set_output_keys(self, keys: Iterable[str] | Mapping[str, str]) -> None:
        """Choose what ``load`` returns; raises ConfigError for a key that nothing provides."""
        self._output = dict(keys) if isinstance(keys, Mapping) else {key: key for key in keys}
        self._order, self._static = self._resolve()

    def load(self, row: int, *, epoch: int = 0, crop_samples: int | None = None, seed: int = 0) -> dict[str, Any]:
        """The output keys of one utterance.

        Arguments
        ---------
        row : of the manifest.
        epoch, seed : what random items depend on, besides the ID.
        crop_samples : length to crop the waveform to, in samples; None = whole.

        Raises
        ------
        AudioError or TokenError, with the utterance's ID.
        """
        row = int(row)
        identity = self.manifest.ids[row]
        values: dict[str, Any] = {"id": identity, "ID": identity}
        values[CONTEXT] = ItemContext(row, identity, epoch, seed, crop_samples)
        for key in self._static:
            value = self.manifest.column(key)[row]
            values[key] = float(value) if key == "duration" else value
        for item in self._order:
            try:
                provided = item.compute([values[key] for key in item.takes])
            except (AudioError, TokenError) as error:
                raise type(error)(f"utterance {identity}: {error}") from error
            values.update(zip(item.provides, provided, strict=True))
        return {name: values[key] for name, key in self._output.items()}

    def filtered_sorted(
        self,
        key_min_value: Mapping[str, float] | None = None,
        key_max_value: Mapping[str, float] | None = None,
        key_test: Mapping[str, Callable[[Any], bool]] | None = None,
        sort_key: str | None = None,
        reverse: bool = False,
        select_n: int | None = None,
    ) -> DynamicItemDataset:
        """A dataset of the rows that pass, in order; keys are columns of the manifest.

        Arguments
        ---------
        key_min_value, key_max_value : limits, both inclusive ("duration" in seconds).
        key_test : a function of the column's value that says whether the row stays.
        sort_key : column to sort by; equal values keep their order.
        reverse : largest first.
        select_n : keep at most so many of the passing rows.
        """
        kept = np.ones(len(self), dtype=bool)
        for key, low in (key_min_value or {}).items():
            kept &= self._numbers(key) >= low
        for key, high in (key_max_value or {}).items():
            kept &= self._numbers(key) <= high
        for key, test in (key_test or {}).items():
            column = self.manifest.column(key)
            kept &= np.fromiter((bool(test(value)) for value in column), dtype=bool, count=len(self))
        rows = np.flatnonzero(kept)
        if select_n is not None:
            rows = rows[:select_n]
        if sort_key is not None:
            column = self.manifest.column(sort_key)
            rows = np.array(sorted(rows, key=lambda row: column[row], reverse=reverse), dtype=np.int64)
        return DynamicItemDataset(self.manifest.select(rows), self._items, self._output)

    def _numbers(self, key: str) -> np.ndarray:
        column = self.manifest.column(key)
        try:
            return np.fromiter((float(value) for value in column), dtype=np.float64, count=len(self))
        except ValueError as error:
            raise ManifestError(f"{self.manifest.source}: the column {key} is not of numbers ({error}).") from error

    def _register(self, item: DynamicItem) -> None:
        if not isinstance(item, DynamicItem) or not item.provides:
            name = item.name if isinstance(item, DynamicItem) else getattr(item, "__name__", repr(item))
            raise ConfigError(f"{name} does not say what it provides; decorate it with @takes(...) and @provides(...).")
        for key in item.provides:
            if key in self._provider:
                raise ConfigError(
                    f"{key!r} is provided twice, by {self._provider[key].name} and by {item.name}; rename one."
                )
            if key in self.manifest.columns or key in ("id", CONTEXT):
                raise ConfigError(
                    f"{item.name} provides {key!r}, which is a column of {self.manifest.source} already; choose "
                    "another name."
                )
        self._items.append(item)
        self._provider.update(dict.fromkeys(item.provides, item))

    def _resolve(self) -> tuple[list[DynamicItem], list[str]]:
        """Items to run, dependencies first, and the manifest's columns that are needed."""
        order: list[DynamicItem] = []
        static: list[str] = []
        done: set[str] = {"id", "ID", CONTEXT}

        def visit(key: str, path: tuple[str, ...]) -> None:
            if key in path:
                circle = " -> ".join((*path[path.index(key) :], key))
                raise ConfigError(f"dynamic items need each other in a circle: {circle}; break it.")
            if key in done:
                return
            item = self._provider.get(key)
            if item is not None:
                for taken in item.takes:
                    visit(taken, (*path, key))
                order.append(item)
                done.update(item.provides)
            elif key in self.manifest.columns:
                static.append(key)
                done.add(key)
            else:
                user = f"{self._provider[path[-1]].name} takes" if path else "the output keys name"
                known = sorted({*self.manifest.columns, "id", CONTEXT, *self._provider})
                raise ConfigError(f"{user} {key!r}, which nothing provides; known are {', '.join(known)}.")

        for key in self._output.values():
            visit(key, ())
        return order, static


def add_dynamic_item(
    datasets: Iterable[DynamicItemDataset],
    func: Callable[..., Any] | DynamicItem,
    takes: str | Sequence[str] | None = None,
    provides: str | Sequence[str] | None = None,
) -> None:
    """Add an item to each of ``datasets``."""
    for dataset in datasets:
        dataset.add_dynamic_item(func, takes, provides)


def set_output_keys(datasets: Iterable[DynamicItemDataset], keys: Iterable[str] | Mapping[str, str]) -> None:
    """Set the output keys of each of ``datasets``."""
    keys = keys if isinstance(keys, Mapping) else list(keys)
    for dataset in datasets:
        dataset.set_output_keys(keys)


@dataclass(frozen=True)
class ReadWaveform:
    """The function behind :func:`speech_items`: decode an utterance, or the part of it that this epoch's crop wants."""

    sample_rate: int
    normalize: bool = False

    def __call__(self, wav: str, duration: float, context: ItemContext) -> np.ndarray:
        """(samples,) float32; raises AudioError, also where the file is not as long as the manifest says.

        A crop is chosen to fit the manifest's duration, and nothing tells the model of padding in it: an utterance that
        cannot fill its crop is refused, or zeros would become frames to predict.
        """
        with AudioFile(wav) as audio:
            actual = audio.info.duration
            if abs(actual - duration) > max(SMALLEST_TOLERANCE, min(DURATION_TOLERANCE, 0.1 * duration)) + 1e-6:
                raise AudioError(
                    f"{wav} lasts {actual:.2f} s where the manifest says {duration:.2f} s; prepare the manifest again."
                )
            total, start, length = audio.info.num_samples_at(self.sample_rate), 0, None
            if context.crop_samples is not None and context.crop_samples - total > CROP_TOLERANCE * self.sample_rate:
                raise AudioError(
                    f"{wav} lasts {actual:.3f} s where the manifest says {duration:.3f} s, too short for its crop of "
                    f"{context.crop_samples / self.sample_rate:.3f} s; prepare the manifest again."
                )
            if context.crop_samples is not None and context.crop_samples < total:
                start = int(context.rng("crop").integers(0, total - context.crop_samples + 1))
                length = context.crop_samples
            if not self.normalize:
                return audio.read(sample_rate=self.sample_rate, start=start, num_samples=length)
            # Mean and variance are the whole utterance's, whatever part of it is taken.
            whole = normalize_waveform(audio.read(sample_rate=self.sample_rate))
            return whole if length is None else whole[start : start + length]


@dataclass(frozen=True)
class EncodeText:
    """The function behind :func:`text_items`."""

    tokenizer: Tokenizer
    normalizer: Callable[[str], str] = field(default=str)

    def __call__(self, wrd: str) -> tuple[str, np.ndarray]:
        """The text as the tokenizer sees it, and its ids (tokens,) int64."""
        return self.normalizer(wrd), np.array(self.tokenizer.encode(wrd), dtype=np.int64)


def speech_items(sample_rate: int, normalize: bool = False) -> list[DynamicItem]:
    """Items that provide ``waveform``, (samples,) float32 mono at ``sample_rate``, from the columns wav and duration.

    Arguments
    ---------
    sample_rate : Hz that the model wants, a whole number; files of another rate are resampled.
    normalize : bring each utterance to zero mean and unit variance (models trained so); crops are then taken after it.
        Otherwise only the cropped part is decoded.

    Raises
    ------
    ConfigError : ``sample_rate`` is no rate of speech.
    """
    number = isinstance(sample_rate, (int, float, np.number)) and not isinstance(sample_rate, bool)
    if not (number and 1000 <= sample_rate <= 400_000 and sample_rate == int(sample_rate)):
        raise ConfigError(
            f"sample_rate is {sample_rate!r}, expected a whole number of Hz from 1000 to 400000, as 16000."
        )
    return [DynamicItem(ReadWaveform(int(sample_rate), bool(normalize)), ("wav", "duration", CONTEXT), ("waveform",))]


def text_items(tokenizer: Tokenizer) -> list[DynamicItem]:
    """Items that provide ``text`` (as the tokenizer sees it) and ``tokens`` (int64 ids) from the column wrd."""
    return [DynamicItem(EncodeText(tokenizer, tokenizer.normalize), ("wrd",), ("text", "tokens"))]


def _keys(given: str | Sequence[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if given is None:
        return default
    return (given,) if isinstance(given, str) else tuple(given)
