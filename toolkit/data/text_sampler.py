"""Samplers for text: batches under a budget in tokens; everything else is as for speech."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from toolkit.data.sampler import FAR_OFF, MAX_MICROS, BucketSampler, EvaluationSampler
from toolkit.data.units import TOKENS
from toolkit.errors import ConfigError, ManifestError


class TokenSampler(BucketSampler):
    """Batches of few fixed shapes under a budget in tokens, the same shape on all ranks at each step.

    A :class:`~toolkit.data.sampler.BucketSampler` whose lengths are tokens: blocks are padded up to their bucket's
    length, buckets are chosen so that this wastes little, and the order is a function of (seed, epoch).

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
    >>> sampler = TokenSampler([512, 500, 130, 128, 512, 127], batch_tokens=1024, num_buckets=2)
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
        _check_tokens("batch_tokens", batch_tokens)
        if effective_batch is not None:
            _check_tokens("effective_batch", effective_batch)
            if effective_batch > MAX_MICROS * batch_tokens * world_size:
                raise ConfigError(
                    f"effective_batch {effective_batch:g} in micro-batches of batch_tokens {batch_tokens:g} makes more "
                    f"than {MAX_MICROS:,} of them for one update; both are tokens: lower effective_batch or raise "
                    "batch_tokens."
                )
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
        lines.append(
            f"an update: {self.micros_per_update} micro-batch{'es' if self.micros_per_update > 1 else ''}, about "
            f"{self.update_seconds:,.0f} tokens; {self.world_size} rank{'s' if self.world_size > 1 else ''}, "
            f"{self.accumulation} accumulated on each"
        )
        held = min(self.update_seconds, self.epoch_seconds)
        if self.effective_batch is not None and abs(held - self.effective_batch) > FAR_OFF * self.effective_batch:
            lines.append(
                f"warning: an update holds {held:,.0f} tokens, where effective_batch is {self.effective_batch:,.0f}: "
                "whole blocks of like length go into a micro-batch, at least one on each rank; choose effective_batch "
                "and batch_tokens by the number above."
            )
        return "\n".join(lines)


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
