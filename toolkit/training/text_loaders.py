"""Loaders of text for a recipe: blocks in batches under a budget in tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from toolkit.data.labelled_text import LabelledTexts
from toolkit.data.loader import Loader
from toolkit.data.text import TextBlocks, collate_text
from toolkit.data.text_sampler import TokenBucketSampler, TokenEvaluationSampler, TokenSampler
from toolkit.training.experiment import Experiment


def text_train_loader(
    experiment: Experiment,
    blocks: TextBlocks | LabelledTexts,
    *,
    batch_tokens: int,
    effective_batch: float | None = None,
    num_buckets: int | None = None,
    max_batch_size: int | None = None,
    collate: Callable[..., Any] = collate_text,
) -> Loader:
    """The training text; what its blocks hold, the plan and the padding are printed.

    Arguments
    ---------
    batch_tokens, effective_batch, max_batch_size : as for `TokenSampler`.
    num_buckets : at most so many shapes (`TokenBucketSampler`), for devices that compile a graph for each; None pads
        least.
    collate : makes a batch.
    """
    # In lock-step with the ranks alone, an update of few shapes sees several of them too.
    buckets = partial(TokenBucketSampler, num_buckets=num_buckets, lockstep=experiment.world.size)
    kind = TokenSampler if num_buckets is None else buckets
    sampler = kind(
        blocks.lengths,
        batch_tokens=batch_tokens,
        effective_batch=effective_batch,
        seed=experiment.options.seed,
        world_size=experiment.world.size,
        max_batch_size=max_batch_size,
    )
    if not experiment.options.test_only:
        experiment.say(blocks.report())
    return experiment.planned_train_loader(blocks, sampler, blocks.fingerprint(), collate=collate)


def text_eval_loader(
    experiment: Experiment,
    blocks: TextBlocks | LabelledTexts,
    *,
    batch_tokens: int,
    collate: Callable[..., Any] = collate_text,
) -> Loader:
    """A validation or test text, shared out over the ranks, nothing dropped."""
    sampler = TokenEvaluationSampler(blocks.lengths, batch_tokens=batch_tokens, world_size=experiment.world.size)
    return experiment.planned_loader(blocks, sampler, collate=collate, fingerprint=blocks.fingerprint())
