"""Samplers for text: batches under a budget in tokens, a function of (lengths, options, seed, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from toolkit.data.plan import EpochPlan
from toolkit.data.sampler import (
    FAR_OFF,
    MAX_MICROS,
    BucketSampler,
    EvaluationSampler,
    budget_of,
    lockstep_of,
    micros_per_update,
    reordered,
)
from toolkit.data.units import TOKENS
from toolkit.errors import ConfigError, ManifestError
from toolkit.seeds import Randomness

STEP = 32
"""Batches are padded to lengths about 1 / STEP apart, one token at least: some 100 shapes up to 512 tokens."""


MIXED = 0.04
"""Padding in a batch, by the lengths that are padded to, from which on it is cut short."""

FAR = 0.1
"""Share by which an update may miss the effective batch before the number of its micro-batches is corrected."""


class TokenSampler:
    """Batches of blocks of like length under a budget in tokens, in a new order in each epoch.

    Blocks are sorted by length, like ones in random order, and cut into batches whose padded size fits the budget.
    ``G`` micro-batches make an update, the multiple of the world size nearest to ``effective_batch / batch_tokens``
    (corrected where batches hold much less than their budget). They come in random order, so that an update sees all
    lengths; within an update long ones come first, so that the ranks have like work at each step. The plan is the same
    for every world size that divides ``G``. The last update of an epoch may hold fewer micro-batches. Nothing is
    dropped and nothing comes twice.

    Arguments
    ---------
    lengths : (blocks,) tokens of each, all > 0.
    batch_tokens : budget of one micro-batch on one device at most, padding counted (a single block may be longer).
    effective_batch : tokens per optimizer update over all devices; None = one micro-batch per rank.
    seed : of the order.
    world_size : number of ranks.
    max_batch_size : blocks in one micro-batch at most; None = only the budget counts.

    Raises
    ------
    ConfigError for options that do not fit together, ManifestError for lengths that cannot be used.

    Example
    -------
    >>> sampler = TokenSampler([512, 500, 130, 128, 512, 127], batch_tokens=1024)
    >>> plan = sampler.plan(epoch=0)
    >>> sorted(plan.rows.tolist()), sorted(plan.batch_samples.tolist())
    ([0, 1, 2, 3, 4, 5], [131, 512, 512])
    """

    endless = True

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_tokens: int,
        effective_batch: float | None = None,
        seed: int = 0,
        world_size: int = 1,
        max_batch_size: int | None = None,
    ) -> None:
        _check_budgets(batch_tokens, effective_batch, world_size, max_batch_size)
        self.durations = _checked_lengths(lengths)
        self.effective_batch, self.seed, self.world_size = effective_batch, int(seed), int(world_size)
        budget = budget_of(float(batch_tokens), effective_batch, self.world_size)
        edges = _edges(int(self.durations.max()))
        self._class = np.searchsorted(edges, self.durations).astype(np.int16)
        self._offsets, self._samples = _cut(edges[np.sort(self._class)[::-1]], budget, max_batch_size)
        self.micros_per_update = micros_per_update(budget, effective_batch, self.world_size)
        held = self.epoch_tokens / len(self._samples)
        if effective_batch is not None and abs(self.micros_per_update * held - effective_batch) > FAR * effective_batch:
            # A multiple of several world sizes, for all of which the plan is then the same.
            unit = lockstep_of(self.micros_per_update, self.world_size, None)
            self.micros_per_update = max(1, round(effective_batch / (held * unit))) * unit

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank does for one update."""
        return self.micros_per_update // self.world_size

    @property
    def batches_per_epoch(self) -> int:
        """Batches of an epoch over all ranks, the same in every epoch."""
        return len(self._samples)

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates of an epoch, the same in every epoch; the last one may hold fewer micro-batches."""
        return -(-self.batches_per_epoch // self.micros_per_update)

    @property
    def plan_digest(self) -> str:
        """Equal where the epochs' updates hold the same blocks, whatever the number of ranks (hexadecimal)."""
        content = hashlib.sha256(repr((self.micros_per_update, self.seed)).encode())
        for values in (self._class, self._offsets, self._samples):
            content.update(np.ascontiguousarray(values).tobytes())
        return content.hexdigest()[:16]

    @property
    def epoch_tokens(self) -> int:
        """Tokens of an epoch as the model sees them (padded), over all ranks."""
        return int((np.diff(self._offsets) * self._samples).sum())

    @property
    def padding_share(self) -> float:
        """Share of padding in what the model sees in an epoch."""
        return 1.0 - float(self.durations.sum()) / self.epoch_tokens

    def plan(self, epoch: int) -> EpochPlan:
        """The batches of ``epoch`` (from 0), a pure function of the constructor's arguments and ``epoch``."""
        rng = Randomness(self.seed).numpy("order", int(epoch))
        # Long ones first, like ones shuffled.
        rows = np.lexsort((rng.permutation(len(self._class)), -self._class)).astype(np.int32)
        turn = rng.permutation(self.batches_per_epoch).astype(np.int64)
        update = np.arange(len(turn)) // self.micros_per_update
        turn = turn[np.lexsort((-self._samples[turn], update))]
        sizes = np.diff(self._offsets)
        updates = np.arange(self.updates_per_epoch + 1, dtype=np.int64) * self.micros_per_update
        return EpochPlan(
            rows=reordered(rows, sizes, turn),
            batch_offsets=np.concatenate([[0], np.cumsum(sizes[turn])]),
            batch_bucket=np.zeros(len(turn), dtype=np.int16),
            batch_samples=self._samples[turn],
            update_offsets=np.minimum(updates, len(turn)),
        )

    def report(self) -> str:
        """The plan in words, for the log."""
        shapes = np.unique(self._samples)
        sizes = np.diff(self._offsets)
        lines = [
            f"{len(self.durations):,} blocks, {int(self.durations.sum()):,} tokens, in {self.batches_per_epoch:,} "
            f"batches of {sizes.min()} to {sizes.max()} blocks, padded to {len(shapes)} lengths from {shapes[0]} to "
            f"{shapes[-1]}; {self.updates_per_epoch:,} updates an epoch",
            f"padding: {100 * self.padding_share:.1f} % of what the model sees",
        ]
        return "\n".join([*lines, *_update_lines(self, self.epoch_tokens)])


class TokenBucketSampler(BucketSampler):
    """Batches of few fixed shapes under a budget in tokens, for devices that compile a graph for each.

    A :class:`~toolkit.data.sampler.BucketSampler` whose lengths are tokens: blocks are padded up to their bucket's
    length, which wastes more than `TokenSampler` does, above all in a small text.

    Arguments
    ---------
    lengths : (blocks,) tokens of each, all > 0.
    batch_tokens : budget of one micro-batch on one device at most, padding counted (a single block may be longer).
    effective_batch : tokens per optimizer update over all devices; None = one micro-batch per rank.
    num_buckets : at most so many shapes; None chooses from the lengths (16 at most).
    seed : of the order.
    world_size : number of ranks.
    max_batch_size : blocks in one micro-batch at most; None = only the budget counts.
    order, lockstep : see there.

    Raises
    ------
    ConfigError for options that do not fit together, ManifestError for lengths that cannot be used.

    Example
    -------
    >>> sampler = TokenBucketSampler([512, 500, 130, 128, 512, 127], batch_tokens=1024, num_buckets=2)
    >>> sampler.samples.tolist(), sampler.batch_sizes.tolist()
    ([130, 512], [7, 2])
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_tokens: int,
        effective_batch: float | None = None,
        num_buckets: int | None = None,
        order: str = "random",
        seed: int = 0,
        world_size: int = 1,
        lockstep: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        _check_budgets(batch_tokens, effective_batch, world_size, max_batch_size)
        super().__init__(
            _checked_lengths(lengths),
            batch_seconds=batch_tokens,
            effective_batch=effective_batch,
            num_buckets=num_buckets,
            order=order,  # type: ignore[arg-type]
            seed=seed,
            sample_rate=1,
            world_size=world_size,
            lockstep=lockstep,
            max_batch_size=max_batch_size,
            unit=TOKENS,
        )

    @property
    def padding_share(self) -> float:
        """Share of padding in what the model sees in an epoch."""
        return 1.0 - float(self.durations.sum()) / self.epoch_seconds

    def report(self) -> str:
        """The plan in words and a table, for the log."""
        used = self.layout.used
        lines = [
            f"{len(self.durations):,} blocks, {int(self.durations.sum()):,} tokens, in {np.count_nonzero(used)} "
            f"buckets; {self.updates_per_epoch:,} updates an epoch",
            f"{'bucket':>6} {'tokens':>8} {'batch':>6} {'blocks':>11}",
        ]
        for index in np.flatnonzero(used):
            lines.append(f"{index:>6} {self.samples[index]:>8} {self.batch_sizes[index]:>6} {used[index]:>11,}")
        lines.append(f"padding: {100 * self.padding_share:.1f} % of what the model sees")
        return "\n".join([*lines, *_update_lines(self, int(self.epoch_seconds))])


class TokenEvaluationSampler(EvaluationSampler):
    """Batches of similar length for validation and test: nothing dropped, nothing random, long ones first.

    Arguments
    ---------
    lengths : (blocks,) tokens of each, all > 0.
    batch_tokens : budget of a batch, padding counted (a single block may be longer).
    world_size : number of ranks.

    Example
    -------
    >>> plan = TokenEvaluationSampler([10, 30, 20], batch_tokens=40).plan(0)
    >>> [plan.batch_rows(batch).tolist() for batch in range(plan.num_batches)]
    [[1], [2, 0]]
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, *, batch_tokens: int, world_size: int = 1) -> None:
        _check_tokens("batch_tokens", batch_tokens)
        super().__init__(_checked_lengths(lengths), batch_seconds=batch_tokens, world_size=world_size)


def _check_tokens(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 < value <= 1e9:
        raise ConfigError(f"{name} is {value!r}, expected a number of tokens greater than 0 (1e9 at most).")


def _checked_lengths(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    values = np.asarray(lengths)
    if values.ndim != 1 or len(values) == 0:
        raise ManifestError("there are no blocks of text to plan; check that the prepared text is not empty.")
    if int(values.min()) < 1:
        raise ManifestError(f"block {int(values.argmin())} has {int(values.min())} tokens, expected at least 1.")
    return values


def _edges(longest: int) -> np.ndarray:
    """Lengths to pad to, ascending; the longest block needs no padding."""
    edges = [longest]
    while edges[-1] > 1:
        edges.append(edges[-1] - max(1, edges[-1] // STEP))
    return np.array(edges[::-1], dtype=np.int64)


def _cut(padded: np.ndarray, budget: float, max_batch_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of batches in a list of descending padded lengths, and the length of each batch.

    A batch also ends where it would mix too different lengths, once it holds an eighth of the budget.
    """
    bounds = np.concatenate([[0], np.cumsum(padded)])
    offsets, lengths = [0], []
    while offsets[-1] < len(padded):
        lengths.append(int(padded[offsets[-1]]))
        most = max(1, int(budget / lengths[-1] + 1e-9))
        most = min(most, len(padded) - offsets[-1], most if max_batch_size is None else max_batch_size)
        held = bounds[offsets[-1] + 1 : offsets[-1] + most + 1] - bounds[offsets[-1]]
        even = int(np.searchsorted(1 - held / (np.arange(1, most + 1) * lengths[-1]), MIXED, side="right"))
        offsets.append(offsets[-1] + min(most, max(even, -(-most // 8))))
    return np.array(offsets, dtype=np.int64), np.array(lengths, dtype=np.int64)


def _update_lines(sampler: TokenSampler | TokenBucketSampler, epoch_tokens: int) -> list[str]:
    """What an update holds, and a warning where that is far from what was asked for."""
    micros, ranks = sampler.micros_per_update, sampler.world_size
    held = epoch_tokens / sampler.batches_per_epoch * min(micros, sampler.batches_per_epoch)
    lines = [
        f"an update: {micros} micro-batch{'es' if micros > 1 else ''}, about {held:,.0f} tokens; {ranks} "
        f"rank{'s' if ranks > 1 else ''}, {sampler.accumulation} accumulated on each"
    ]
    wanted = sampler.effective_batch
    if wanted is not None and abs(held - wanted) > FAR_OFF * wanted:
        lines.append(
            f"warning: an update holds {held:,.0f} tokens, where effective_batch is {wanted:,.0f}: each rank takes one "
            "micro-batch of whole blocks at least, and there is no more than an epoch's text; choose effective_batch "
            "and batch_tokens by the number above."
        )
    return lines


def _check_budgets(
    batch_tokens: float, effective_batch: float | None, world_size: int, max_batch_size: int | None
) -> None:
    _check_tokens("batch_tokens", batch_tokens)
    for name, value in (("world_size", world_size), ("max_batch_size", max_batch_size)):
        if value is not None and (isinstance(value, bool) or value != int(value) or value < 1):
            raise ConfigError(f"{name} is {value!r}, expected a whole number greater than 0.")
    if effective_batch is None:
        return
    _check_tokens("effective_batch", effective_batch)
    if effective_batch > MAX_MICROS * batch_tokens * world_size:
        raise ConfigError(
            f"effective_batch {effective_batch:g} in micro-batches of batch_tokens {batch_tokens:g} makes more than "
            f"{MAX_MICROS:,} of them for one update; both are tokens: lower effective_batch or raise batch_tokens."
        )
