"""The order and the batches of fairseq's masked language model task, for runs that shall see what fairseq sees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from toolkit.errors import ConfigError


def fairseq_order(sizes: np.ndarray, seed: int, *, max_positions: int | None = None) -> np.ndarray:
    """Items by ascending size, equal ones shuffled by ``seed``, the same in all epochs; longer ones left out."""
    permutation = np.random.RandomState(seed).permutation(len(sizes))
    order = np.lexsort((permutation, sizes))
    return order if max_positions is None else order[np.asarray(sizes)[order] <= max_positions]


def fairseq_batches(
    order: Sequence[int] | np.ndarray,
    sizes: np.ndarray,
    *,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    multiple: int = 8,
) -> list[list[int]]:
    """Cut ``order`` into batches as fairseq does.

    Arguments
    ---------
    order : items, as `fairseq_order` gives them.
    sizes : (items,) tokens of each item.
    max_tokens : of a batch, padding counted; None = no limit.
    max_sentences : items of a batch; None = no limit.
    multiple : batches hold a multiple of so many items or less than that. The last batch is left out where it holds no
        multiple: fairseq's code does that, and so loses these items.

    Raises
    ------
    ConfigError : an item is longer than ``max_tokens``.
    """
    limit, most = max_tokens or 0, max_sentences or 0
    lengths = np.asarray(sizes)[np.asarray(order, dtype=np.int64)].tolist()
    if limit and lengths and max(lengths) > limit:
        raise ConfigError(f"an item has {max(lengths)} tokens, more than max_tokens {limit}; raise max_tokens.")
    # [begin, end) is the closed part of the batch being made, [end, place] its tail.
    cuts, end, longest, tail = [0], 0, 0, 0
    for place, length in enumerate(lengths):
        tail = max(tail, length)
        count, widest = place + 1 - cuts[-1], max(longest, tail)
        overflows = bool((most and count > most) or (limit and count * widest > limit))
        if overflows:
            cuts.append(end)
            if limit and tail * (place + 1 - end) > limit:  # the tail is a batch of its own, without this item
                cuts.append(place)
                tail = length
            widest = tail
        if overflows or count < multiple or count % multiple == 0:
            end, longest, tail = place + 1, widest, 0
    if lengths:
        cuts += [end] if end == len(lengths) else [end, len(lengths)]
    order = [int(item) for item in order]
    batches = [order[first:last] for first, last in pairwise(cuts) if first < last]
    return batches[:-1] if multiple > 1 and batches and len(batches[-1]) % multiple else batches


def fairseq_turns(num_batches: int, seed: int, epoch: int, *, world_size: int = 1) -> list[list[int]]:
    """For each rank the batches of training ``epoch`` (from 1) in their order; -1 is an empty one at the end."""
    turns = list(range(num_batches))
    np.random.RandomState(seed + epoch).shuffle(turns)
    turns += [-1] * (-num_batches % world_size)
    return [turns[rank::world_size] for rank in range(world_size)]
