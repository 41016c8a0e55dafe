"""Samplers: what an epoch's batches are, as a function of (durations, options, seed, epoch).

:class:`BucketSampler` is for training, :class:`EvaluationSampler` for validation and test. Neither holds a state:
``plan(epoch)`` can be asked for any epoch at any time, so a resume needs nothing but the numbers of the epoch and
update.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from toolkit.data.buckets import BucketLayout, choose_layout, walk
from toolkit.data.plan import EpochPlan
from toolkit.data.units import SECONDS, Unit
from toolkit.errors import ConfigError, ManifestError
from toolkit.seeds import Randomness

__all__ = ["BucketSampler", "EpochPlan", "EvaluationSampler", "Sampler"]

MAX_LOCKSTEP = 8
"""Ranks up to this number see the same plan as one rank: groups of one bucket are this long where possible."""

MAX_MICROS = 1_000_000
"""Micro-batches of an update; more is a slip of the decimal point."""

MAX_SECONDS = 1e9
"""Seconds beyond which a budget is a slip too (31 years of audio), and would overflow the counts."""

FAR_OFF = 0.25
"""Share by which an update may miss the effective batch before the report says so."""

WHOLE_NUMBERS = ("num_buckets", "lockstep", "max_batch_size", "sample_rate", "world_size")

KNOWN_AS = {"max_seconds": "max_seconds (crop_seconds in the YAML of a pretraining)"}
"""Arguments that the users of recipes know under another name."""


class Sampler(Protocol):
    """What the loader needs of a sampler; ``endless``: another epoch, with another plan, follows each."""

    world_size: int
    endless: bool

    @property
    def updates_per_epoch(self) -> int: ...

    def plan(self, epoch: int) -> EpochPlan: ...


class BucketSampler:
    """Batches of few fixed shapes under a budget in seconds of audio, the same bucket on all ranks at each step.

    Utterances are sorted into buckets; a batch of bucket ``k`` is ``n_k`` utterances of ``e_k`` seconds with
    ``n_k * e_k <= batch_seconds`` (a single utterance may be longer). ``G`` micro-batches make an update, the multiple
    of the world size nearest to ``effective_batch / batch_seconds`` (corrected where batches hold much less than their
    budget), in groups of ``L`` from one bucket, so that the plan is the same for every world size that divides ``L``.
    Where the ranks together would take more than ``effective_batch`` at once, their budgets shrink to their share of
    it. Utterances that fill no whole group of their bucket move to the next one (up when padding, down when cropping),
    others in every epoch; the last ones make a smaller group at the end. Nothing is dropped and nothing comes twice.

    Arguments
    ---------
    durations : (utterances,) seconds, all > 0.
    batch_seconds : budget of one micro-batch on one device at most, in seconds of padded (or cropped) audio.
    effective_batch : seconds of audio per optimizer update over all devices; None = one micro-batch per rank.
    mode : "pad": utterances are padded up to the bucket's edge (fine-tuning). "crop": they are cropped down to it, no
        padding reaches the model (pretraining); utterances shorter than the shortest edge do not exist, as that
        is the shortest duration.
    num_buckets : at most so many shapes; None chooses from the durations (16 at most).
    order : of the groups: "random", or "ascending" / "descending" by length.
    seed : of the order.
    sample_rate : Hz, to turn edges into samples.
    max_seconds : "crop": nothing longer reaches the model. "pad": a longer utterance is an error (filter them before).
    world_size : number of ranks.
    lockstep : L; None takes the largest divisor of G up to 8 that is a multiple of the world size.
    max_batch_size : utterances in one micro-batch at most; None = only the budget counts.
    unit : what lengths and budgets are measured in; for tokens see :class:`~toolkit.data.text_sampler.TokenSampler`.

    Raises
    ------
    ConfigError for options that do not fit together, ManifestError for durations that cannot be used.

    Example
    -------
    >>> sampler = BucketSampler([1.0, 1.2, 2.0, 2.1, 1.1, 1.9], batch_seconds=5.0, num_buckets=2)
    >>> plan = sampler.plan(epoch=0)
    >>> sorted(plan.rows.tolist())
    [0, 1, 2, 3, 4, 5]
    >>> plan.num_updates == sampler.updates_per_epoch
    True
    """

    endless = True

    def __init__(
        self,
        durations: Sequence[float] | np.ndarray,
        *,
        batch_seconds: float,
        effective_batch: float | None = None,
        mode: Literal["pad", "crop"] = "pad",
        num_buckets: int | None = None,
        order: Literal["random", "ascending", "descending"] = "random",
        seed: int = 0,
        sample_rate: int = 16000,
        max_seconds: float | None = None,
        world_size: int = 1,
        lockstep: int | None = None,
        max_batch_size: int | None = None,
        unit: Unit = SECONDS,
    ) -> None:
        _check_choice("mode", mode, ("pad", "crop"))
        _check_choice("order", order, ("random", "ascending", "descending"))
        numbers = {"batch_seconds": batch_seconds, "effective_batch": effective_batch, "num_buckets": num_buckets}
        numbers |= {"max_seconds": max_seconds, "lockstep": lockstep, "max_batch_size": max_batch_size}
        _check_positive(numbers | {"sample_rate": sample_rate, "world_size": world_size})
        self.durations = _checked_durations(durations)
        self.effective_batch = None if effective_batch is None else float(effective_batch)
        self.mode, self.order, self.seed = mode, order, int(seed)
        self.sample_rate, self.world_size = int(sample_rate), int(world_size)
        if mode == "pad" and max_seconds is not None:
            _check_longest(self.durations, float(max_seconds))
        self.batch_seconds = budget_of(float(batch_seconds), self.effective_batch, self.world_size)
        self.micros_per_update = micros_per_update(self.batch_seconds, self.effective_batch, self.world_size)
        self.lockstep = lockstep_of(self.micros_per_update, self.world_size, lockstep)
        self.layout = choose_layout(
            self.durations,
            batch_seconds=self.batch_seconds,
            lockstep=self.lockstep,
            crop=mode == "crop",
            num_buckets=None if num_buckets is None else int(num_buckets),
            max_seconds=max_seconds,
            max_batch_size=None if max_batch_size is None else int(max_batch_size),
            unit=unit,
        )
        if self.effective_batch is not None:
            self.micros_per_update = self._corrected(self.effective_batch)

    def _corrected(self, wanted: float) -> int:
        """G by what the micro-batches really hold, where their budgets promise too much (or too little) by far.

        A multiple of the lock-step, so that the layout stays, and the plan is still the same for all its world sizes.
        """
        batches = self.layout.groups * self.lockstep
        if not batches.any():
            return self.micros_per_update
        held = float((batches * self.batch_sizes * self.edges).sum() / batches.sum())
        if abs(self.micros_per_update * held - wanted) <= FAR_OFF * wanted:
            return self.micros_per_update
        return max(1, math.floor(wanted / (held * self.lockstep) + 0.5)) * self.lockstep

    @property
    def edges(self) -> np.ndarray:
        """(buckets,) seconds, ascending."""
        return self.layout.edges

    @property
    def batch_sizes(self) -> np.ndarray:
        """(buckets,) utterances in a full batch of each bucket."""
        return self.layout.batch_sizes

    @property
    def samples(self) -> np.ndarray:
        """(buckets,) int64, length of each bucket in samples."""
        exact = self.edges * self.sample_rate
        rounded = np.floor(exact + 1e-6) if self.mode == "crop" else np.ceil(exact - 1e-6)
        return np.maximum(1, rounded).astype(np.int64)

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank does for one update."""
        return self.micros_per_update // self.world_size

    @property
    def final_batches(self) -> int:
        """Batches of the final smaller group, 0 where everything fills whole groups."""
        return -(-self.layout.remainder // int(self.batch_sizes[self.layout.final_bucket]))

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch over all ranks, the same in every epoch."""
        return int(self.layout.groups.sum()) * self.lockstep + self.final_batches

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates of an epoch, the same in every epoch; the last one may hold fewer micro-batches."""
        return -(-self.batches_per_epoch // self.micros_per_update)

    @property
    def plan_digest(self) -> str:
        """Equal where the epochs' updates hold the same utterances, whatever the number of ranks (hexadecimal)."""
        layout = self.layout
        content = hashlib.sha256(repr((self.micros_per_update, self.mode, self.order, self.seed)).encode())
        for values in (layout.edges, layout.batch_sizes, layout.bucket_of, layout.groups):
            content.update(np.ascontiguousarray(values).tobytes())
        content.update(repr((layout.remainder, layout.final_bucket, layout.lockstep)).encode())
        return content.hexdigest()[:16]

    @property
    def epoch_seconds(self) -> float:
        """Seconds of audio of an epoch as the model sees them (padded or cropped), over all ranks."""
        return self.layout.seconds

    @property
    def update_seconds(self) -> float:
        """Seconds of audio of a whole update as the model sees them, over all ranks, on average."""
        return self.epoch_seconds / self.batches_per_epoch * self.micros_per_update

    def plan(self, epoch: int) -> EpochPlan:
        """The batches of ``epoch`` (from 0), a pure function of the constructor's arguments and ``epoch``."""
        rng = Randomness(self.seed).numpy("order", int(epoch))
        grouped, remainder = _fill_groups(self.layout, rng, crop=self.mode == "crop")
        group_bucket = np.repeat(np.arange(len(self.edges), dtype=np.int16), self.layout.groups)
        turn = rng.permutation(len(group_bucket))
        if self.order != "random":
            turn = turn[np.argsort(group_bucket[turn], kind="stable")]
            turn = turn[::-1] if self.order == "descending" else turn
        group_sizes = self.layout.group_sizes[group_bucket]
        rows = np.concatenate([reordered(grouped, group_sizes, turn), remainder])
        group_bucket = group_bucket[turn]
        final = _even_parts(len(remainder), self.final_batches)
        sizes = np.concatenate([np.repeat(self.batch_sizes[group_bucket], self.lockstep), final])
        final_bucket = np.full(len(final), self.layout.final_bucket, dtype=np.int16)
        bucket = np.concatenate([np.repeat(group_bucket, self.lockstep), final_bucket])
        updates = np.arange(0, len(bucket) + self.micros_per_update, self.micros_per_update, dtype=np.int64)
        updates = np.minimum(updates[: self.updates_per_epoch + 1], len(bucket))
        return EpochPlan(
            rows=rows,
            batch_offsets=np.concatenate([[0], np.cumsum(sizes)]),
            batch_bucket=bucket,
            batch_samples=self.samples[bucket],
            update_offsets=updates,
            crop=self.mode == "crop",
        )

    def report(self) -> str:
        """The plan in words and a table, for the log."""
        total = float(self.durations.sum())
        used = self.layout.used
        lines = [
            f"{len(self.durations):,} utterances, {total / 3600:.2f} h, in {np.count_nonzero(used)} buckets; "
            f"{self.updates_per_epoch:,} updates an epoch",
            f"{'bucket':>6} {'seconds':>8} {'samples':>8} {'batch':>6} {'utterances':>11}",
        ]
        for index in np.flatnonzero(used):
            cells = (index, self.edges[index], self.samples[index], self.batch_sizes[index], used[index])
            lines.append("{:>6} {:>8.2f} {:>8} {:>6} {:>11,}".format(*cells))
        if self.mode == "crop":
            lines.append(f"cropped away: {100 * (total - self.epoch_seconds) / total:.1f} % of the audio")
        else:
            lines.append(f"padding: {100 * (1 - total / self.epoch_seconds):.1f} % of what the model sees")
        lines.append(
            f"an update: {self.micros_per_update} micro-batch{'es' if self.micros_per_update > 1 else ''}, about "
            f"{self.update_seconds:.0f} s of audio; {self.world_size} rank{'s' if self.world_size > 1 else ''}, "
            f"{self.accumulation} accumulated on each"
        )
        if self.effective_batch is not None and (sentence := self._far_off(self.effective_batch)):
            lines.append(sentence)
        return "\n".join(lines)

    def _far_off(self, wanted: float) -> str | None:
        """A sentence about updates that are not of about the size ``wanted`` (seconds), None where they are."""
        seconds = min(self.update_seconds, self.epoch_seconds)
        if abs(seconds - wanted) <= FAR_OFF * wanted:
            return None
        if self.epoch_seconds < self.update_seconds:
            why = "all that there is in an epoch; lower effective_batch"
        elif seconds > wanted:
            why = "as each micro-batch holds one utterance at least; raise effective_batch, or use fewer ranks"
        else:
            why = (
                f"as whole utterances of like length go into micro-batches of {self.batch_seconds:g} s at most; choose "
                "effective_batch and batch_seconds by the number above, or another num_buckets"
            )
        return f"warning: an update holds {seconds:.1f} s of audio, where effective_batch is {wanted:g} s, {why}."


class EvaluationSampler:
    """Batches of similar length for validation and test: nothing dropped, nothing random, long ones first.

    Batch ``i`` goes to rank ``i % world_size``; each is padded to its own longest utterance.

    Arguments
    ---------
    durations : (utterances,) seconds, all > 0.
    batch_seconds : budget of a batch in seconds of padded audio (a single utterance may be longer).
    world_size : number of ranks.

    Example
    -------
    >>> plan = EvaluationSampler([1.0, 3.0, 2.0], batch_seconds=4.0).plan(0)
    >>> [plan.batch_rows(batch).tolist() for batch in range(plan.num_batches)]
    [[1], [2, 0]]
    """

    endless = False

    def __init__(self, durations: Sequence[float] | np.ndarray, *, batch_seconds: float, world_size: int = 1) -> None:
        _check_positive({"batch_seconds": batch_seconds, "world_size": world_size})
        self.durations = _checked_durations(durations)
        self.batch_seconds, self.world_size = float(batch_seconds), int(world_size)
        # Stable, so that equal lengths keep the manifest's order.
        self._rows = np.argsort(-self.durations, kind="stable").astype(np.int32)
        offsets = [0]
        while offsets[-1] < len(self._rows):
            longest = self.durations[self._rows[offsets[-1]]]
            offsets.append(offsets[-1] + max(1, int(self.batch_seconds / longest + 1e-9)))
        offsets[-1] = len(self._rows)
        self._offsets = np.array(offsets, dtype=np.int64)

    @property
    def updates_per_epoch(self) -> int:
        """Steps of one pass: batches over ranks, rounded up."""
        return -(-(len(self._offsets) - 1) // self.world_size)

    def plan(self, epoch: int = 0) -> EpochPlan:
        """The same batches for every ``epoch``; an "update" holds one batch for each rank."""
        batches = len(self._offsets) - 1
        updates = np.minimum(np.arange(self.updates_per_epoch + 1, dtype=np.int64) * self.world_size, batches)
        zeros = np.zeros(batches, dtype=np.int64)
        return EpochPlan(self._rows, self._offsets, zeros.astype(np.int16), zeros, updates)


def budget_of(batch_seconds: float, effective_batch: float | None, world_size: int) -> float:
    """Seconds of one micro-batch: ``batch_seconds``, or a rank's share of an update where that is less."""
    return batch_seconds if effective_batch is None else min(batch_seconds, effective_batch / world_size)


def micros_per_update(batch_seconds: float, effective_batch: float | None, world_size: int) -> int:
    """G: micro-batches of an update over all ranks, the multiple of ``world_size`` nearest to the effective batch.

    Raises
    ------
    ConfigError if there are too many for a number that is meant.
    """
    if effective_batch is None:
        return world_size
    each = effective_batch / (batch_seconds * world_size)
    if each * world_size > MAX_MICROS:
        raise ConfigError(
            f"effective_batch {effective_batch:g} s in micro-batches of batch_seconds {batch_seconds:g} s makes "
            f"{each * world_size:.3g} of them for one update, expected {MAX_MICROS:,} at most; both are seconds of "
            "audio: lower effective_batch or raise batch_seconds."
        )
    # A half goes up: micro-batches hold somewhat less than their budget.
    return max(1, math.floor(each + 0.5)) * world_size


def lockstep_of(micros: int, world_size: int, wanted: int | None) -> int:
    """L: batches of one bucket in a row; divides ``micros`` and is a multiple of ``world_size``."""
    if wanted is not None:
        if micros % wanted or wanted % world_size:
            fitting = [size for size in range(world_size, micros + 1, world_size) if micros % size == 0]
            raise ConfigError(
                f"lockstep is {wanted}, but it must divide the {micros} micro-batches of an update and be a multiple "
                f"of the {world_size} ranks; use one of {', '.join(map(str, fitting))} or leave it out."
            )
        return int(wanted)
    small = [size for size in range(world_size, MAX_LOCKSTEP + 1, world_size) if micros % size == 0]
    return max(small, default=world_size)


def _fill_groups(layout: BucketLayout, rng: np.random.Generator, *, crop: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all whole groups, bucket after bucket, and the rows left over at the end.

    Each bucket is shuffled together with what came from its neighbour, so who moves on changes by the epoch.
    """
    by_bucket = np.argsort(layout.bucket_of, kind="stable").astype(np.int32)
    bounds = np.searchsorted(layout.bucket_of[by_bucket], np.arange(len(layout.edges) + 1))
    parts: list[np.ndarray] = [by_bucket[:0]] * len(layout.edges)
    carried = by_bucket[:0]
    for bucket in walk(len(layout.edges), crop):
        members = np.concatenate([by_bucket[bounds[bucket] : bounds[bucket + 1]], carried])
        rng.shuffle(members)
        taken = int(layout.groups[bucket] * layout.group_sizes[bucket])
        parts[bucket], carried = members[:taken], members[taken:]
    return np.concatenate(parts), carried


def reordered(rows: np.ndarray, sizes: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """``rows``, made of consecutive pieces of ``sizes``, with the pieces in the order ``turn``."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if len(sizes) else sizes
    sizes, starts = sizes[turn], starts[turn]
    ends = np.cumsum(sizes)
    # Position i of the result, inside its piece, plus where that piece stands in the source.
    shift = np.repeat(starts - (ends - sizes), sizes)
    return rows[np.arange(len(rows)) + shift]


def _even_parts(total: int, parts: int) -> np.ndarray:
    """``total`` split into ``parts`` numbers that differ by 1 at most, the larger first."""
    if parts == 0:
        return np.zeros(0, dtype=np.int64)
    return np.full(parts, total // parts, dtype=np.int64) + (np.arange(parts) < total % parts)


def _checked_durations(durations: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(durations, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ManifestError("there are no utterances to plan; check the manifest and the minimum and maximum duration.")
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(bad):
        raise ManifestError(
            f"row {bad[0]} has a duration of {values[bad[0]]} s ({len(bad)} such rows), expected seconds greater than "
            "0; prepare the manifest again."
        )
    return values


def _check_longest(durations: np.ndarray, max_seconds: float) -> None:
    longer = int((durations > max_seconds).sum())
    if longer:
        raise ManifestError(
            f"{longer} of {len(durations)} utterances are longer than max_seconds {max_seconds:g} (the longest lasts "
            f"{durations.max():.2f} s); filter the manifest with max_duration, or use mode 'crop'."
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")


def _check_positive(numbers: dict[str, float | None]) -> None:
    for name, value in numbers.items():
        if value is None:
            continue
        known = KNOWN_AS.get(name, name)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not value > 0:
            raise ConfigError(f"{known} is {value!r}, expected a number greater than 0.")
        if value > MAX_SECONDS:
            raise ConfigError(f"{known} is {value!r}, expected a number of {MAX_SECONDS:g} at most; correct it.")
        if name in WHOLE_NUMBERS and value != int(value):
            raise ConfigError(f"{known} is {value!r}, expected a whole number greater than 0.")
