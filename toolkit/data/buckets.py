"""Bucket edges that waste little, and how many batches each bucket makes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from toolkit.data.units import SECONDS, Unit

MAX_CANDIDATES = 400
"""Quantiles of the durations among which edges are chosen."""

WORTH = 0.0025
"""A further bucket shape is worth it when it saves this share of the audio: accelerators compile a graph for each."""

FILL = 0.25
"""Weight of budget that a full batch leaves unused (three of 13.4 s do not fit into 40 s), against wasted audio."""


@dataclass(frozen=True, eq=False)
class BucketLayout:
    """Buckets of fixed shape and how many whole groups each of them fills in every epoch.

    Arguments
    ---------
    edges : (buckets,) float64 seconds (or what else lengths are measured in), ascending.
    batch_sizes : (buckets,) int64 utterances in a batch of this bucket.
    bucket_of : (utterances,) int16, home bucket of each utterance.
    groups : (buckets,) int64, whole groups of ``lockstep`` batches.
    remainder : utterances left for the final smaller group.
    final_bucket : bucket of that group.
    lockstep : batches in a whole group.
    """

    edges: np.ndarray
    batch_sizes: np.ndarray
    bucket_of: np.ndarray
    groups: np.ndarray
    remainder: int
    final_bucket: int
    lockstep: int

    @property
    def seconds(self) -> float:
        """Audio seconds of an epoch as the model sees them: padded up, or cropped down."""
        return float((self.edges * self.used).sum())

    @property
    def used(self) -> np.ndarray:
        """(buckets,) utterances that run in each bucket, after leftovers have moved."""
        used = self.groups * self.group_sizes
        used[self.final_bucket] += self.remainder
        return used

    @property
    def group_sizes(self) -> np.ndarray:
        """(buckets,) utterances in a whole group."""
        return self.batch_sizes * self.lockstep


def walk(num_buckets: int, crop: bool) -> range:
    """The order in which leftovers move: upwards when padding, downwards when cropping."""
    return range(num_buckets - 1, -1, -1) if crop else range(num_buckets)


def lay_out(
    durations: np.ndarray,
    edges: np.ndarray,
    *,
    batch_seconds: float,
    lockstep: int,
    crop: bool,
    max_batch_size: int | None,
    unit: Unit = SECONDS,
) -> BucketLayout:
    """Home buckets, batch sizes and the number of whole groups for given edges (seconds, ascending)."""
    batch_sizes = np.maximum(1, np.floor(batch_seconds / edges + 1e-9)).astype(np.int64)
    if max_batch_size is not None:
        batch_sizes = np.minimum(batch_sizes, max_batch_size)
    bucket_of = _home_crop(edges, durations, unit) if crop else _home_pad(edges, durations, unit)
    counts = np.bincount(bucket_of, minlength=len(edges))
    groups = np.zeros(len(edges), dtype=np.int64)
    carried, bucket = 0, 0
    for bucket in walk(len(edges), crop):
        groups[bucket], carried = divmod(int(counts[bucket]) + carried, int(batch_sizes[bucket]) * lockstep)
    return BucketLayout(edges, batch_sizes, bucket_of.astype(np.int16), groups, carried, bucket, lockstep)


def _home_pad(edges: np.ndarray, durations: np.ndarray, unit: Unit) -> np.ndarray:
    """Index of the smallest edge that holds each utterance."""
    return np.searchsorted(edges, durations + unit.slack - 1e-9, side="left")


def _home_crop(edges: np.ndarray, durations: np.ndarray, unit: Unit) -> np.ndarray:
    """Index of the largest edge that each utterance fills."""
    return np.maximum(np.searchsorted(edges, durations - unit.slack + 1e-9, side="right") - 1, 0)


def choose_layout(
    durations: np.ndarray,
    *,
    batch_seconds: float,
    lockstep: int,
    crop: bool,
    num_buckets: int | None,
    max_seconds: float | None,
    max_batch_size: int | None,
    unit: Unit = SECONDS,
) -> BucketLayout:
    """The layout that wastes least: least padding, or least audio lost by cropping.

    With ``num_buckets`` None the number is chosen too: leftovers that move to the next bucket cost more when there are
    many buckets and few utterances, so every number up to 16 is laid out and counted.
    """
    most = 16 if num_buckets is None else num_buckets
    edge_sets = _best_edges(durations, most, crop, max_seconds, batch_seconds, unit)
    options = {"batch_seconds": batch_seconds, "lockstep": lockstep, "crop": crop, "max_batch_size": max_batch_size}
    layouts = [lay_out(durations, edges, **options, unit=unit) for edges in edge_sets]
    if num_buckets is not None:
        return layouts[-1]
    total = float(durations.sum())

    def cost(layout: BucketLayout) -> float:
        waste = (total - layout.seconds) if crop else (layout.seconds - total)
        return waste / total + WORTH * len(layout.edges)

    return min(layouts, key=cost)


def _best_edges(
    durations: np.ndarray, most: int, crop: bool, max_seconds: float | None, batch_seconds: float, unit: Unit
) -> list[np.ndarray]:
    """For 1, 2, ... ``most`` buckets the edges (seconds) with the least waste, by dynamic programming.

    With padding, utterances in (c[i], c[j]] run at c[j]; with cropping, those in [c[j], c[i]) do: both are the same
    problem on a reversed axis.
    """
    candidates = _candidates(durations, crop, max_seconds, batch_seconds, unit)
    home = _home_crop(candidates, durations, unit) if crop else _home_pad(candidates, durations, unit)
    counts = np.bincount(home, minlength=len(candidates))
    unused = np.maximum(0, batch_seconds / np.maximum(1, np.floor(batch_seconds / candidates + 1e-9)) - candidates)
    values = (-candidates if crop else candidates) + FILL * unused
    if crop:  # walks from the longest candidate down; a segment runs at its last candidate
        candidates, values, counts = candidates[::-1], values[::-1], counts[::-1]
    below = np.concatenate([[0], np.cumsum(counts)])  # below[j] = utterances before candidate j
    size = len(values)
    # cost[i, j]: candidates i .. j in one bucket that runs at candidate j.
    cost = (below[None, 1:] - below[:-1, None]) * values[None, :]
    cost = np.where(np.arange(size)[:, None] <= np.arange(size)[None, :], cost, np.inf)
    best = cost[0].copy()
    choices: list[np.ndarray] = []
    edge_sets = [candidates[-1:]]
    for buckets in range(2, min(most, size) + 1):
        # total[i, j]: the best for candidates 0 .. i - 1, and i .. j in the last bucket.
        total = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        choices.append(total.argmin(axis=0))
        best = total.min(axis=0)
        edge_sets.append(candidates[_walk_back(choices, size, buckets)])
    return [np.sort(edges) for edges in edge_sets]


def _candidates(
    durations: np.ndarray, crop: bool, max_seconds: float | None, batch_seconds: float, unit: Unit
) -> np.ndarray:
    """Edges to choose from, ascending: quantiles of the durations, and lengths that divide the budget."""
    quantiles = np.quantile(durations, np.linspace(0, 1, MAX_CANDIDATES), method="inverted_cdf")
    low, high = float(quantiles[0]), float(quantiles[-1])
    high = high if max_seconds is None else min(high, max_seconds)
    parts = batch_seconds / np.arange(1, 200)
    parts = parts[(parts > low) & (parts < high)]
    if crop:
        exact = np.concatenate([np.minimum(quantiles - unit.slack, high), parts])
        edges = np.floor(exact * unit.grid + 1e-6) / unit.grid
        # Utterances of about one grid step keep their own length.
        exact = np.where(exact > 0, exact, low)
        return np.unique(np.where(edges > 0, edges, exact))
    edges = np.ceil((quantiles + unit.slack) * unit.grid - 1e-6) / unit.grid
    parts = np.floor(parts * unit.grid + 1e-6) / unit.grid
    # The shortest edge stays where the shortest utterances are.
    return np.unique(np.concatenate([edges, parts[parts > edges[0]]]))


def _walk_back(choices: list[np.ndarray], size: int, buckets: int) -> list[int]:
    """The last candidate of each bucket, from the table of first candidates."""
    ends, end = [], size - 1
    for level in range(buckets - 2, -1, -1):
        ends.append(end)
        end = int(choices[level][end]) - 1
    ends.append(end)
    return ends[::-1]
