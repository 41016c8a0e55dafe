"""From CTC log probabilities to tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from toolkit.data.manifest import Manifest, name_some
from toolkit.data.tokens import Tokenizer
from toolkit.errors import TokenError


def greedy_decode(
    log_probs: Tensor, frame_lengths: Tensor | Sequence[int] | None, blank_id: int = 0
) -> list[list[int]]:
    """The likeliest token of each frame, repeats merged, blanks dropped (Graves et al. 2006, best path decoding).

    Arguments
    ---------
    log_probs : (batch, frames, vocabulary), any monotone scores will do.
    frame_lengths : (batch,) real frames of each utterance; None takes all frames.
    blank_id : index of the blank.

    Returns
    -------
    The tokens of each utterance. One transfer from the device for the whole batch.

    Example
    -------
    >>> scores = torch.nn.functional.one_hot(torch.tensor([[3, 3, 0, 3, 4, 4]]), 5).float()
    >>> greedy_decode(scores, [6]), greedy_decode(scores, [3])
    ([[3, 3, 4]], [[3]])
    """
    best = log_probs.argmax(-1)
    kept = best != blank_id
    # A frame that repeats the one before says nothing new.
    kept[:, 1:] &= best[:, 1:] != best[:, :-1]
    if frame_lengths is not None:
        lengths = torch.as_tensor(frame_lengths, device=best.device)
        kept &= torch.arange(best.shape[1], device=best.device) < lengths[:, None]
    best, kept = best.cpu(), kept.cpu()
    return [tokens[mask].tolist() for tokens, mask in zip(best, kept, strict=True)]


def describe_impossible(
    manifest: Manifest, tokenizer: Tokenizer, frame_lengths: Callable[[Tensor], Tensor], sample_rate: int
) -> str | None:
    """A sentence about utterances with more tokens than frames, which CTC cannot spell; None where there are none.

    Equal neighbors need a blank, and so a frame, between them. Only transcripts that are long for their duration are
    encoded, so that a large corpus takes a moment.

    Arguments
    ---------
    manifest : with transcripts in the column wrd.
    tokenizer : of the model.
    frame_lengths : from samples (utterances,) int64 to frames, as the encoder's.
    sample_rate : Hz that the model hears.
    """
    samples = torch.from_numpy(manifest.durations.astype("float64") * sample_rate).round().long()
    frames = frame_lengths(samples).tolist()
    impossible = []
    for row, (text, available) in enumerate(zip(manifest.column("wrd"), frames, strict=True)):
        # a token of one byte at least, a space more at either end, and at most a blank between any two
        if 2 * (len(text.encode()) + 2) > available and _needed_frames(text, tokenizer) > available:
            impossible.append(row)
    if not impossible:
        return None
    has = "has" if len(impossible) == 1 else "have"
    return (
        f"{manifest.source}: {len(impossible)} of {len(manifest)} utterances {has} more tokens than the model has "
        f"frames for ({name_some(manifest, impossible)}), which CTC cannot spell: nothing is learned from them; check "
        "durations and transcripts, or take larger units (subwords) or a smaller stride."
    )


def _needed_frames(text: str, tokenizer: Tokenizer) -> int:
    """Frames to spell ``text`` in: one for each token, and one between equal neighbors."""
    try:
        tokens = tokenizer.encode(text)
    except TokenError:
        return 0  # said with the utterance's name when it is read
    return len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
