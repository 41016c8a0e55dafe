"""From CTC log probabilities to tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
