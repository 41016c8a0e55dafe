"""The contrastive task of wav2vec 2.0 (section 3.2): negatives, logits, loss, accuracy.

Letters: S masked frames of the whole batch (row-major: utterance by utterance, in order of time), M masked
frames of one utterance, N negatives of the same utterance, C of the whole batch, F channels. Utterances may have
different M.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.nn.transfer import to_device
from toolkit.seeds import Randomness


def sample_negatives(counts: Sequence[int], num_negatives: int, rng: Randomness) -> np.ndarray:
    """For each masked frame, other masked frames of the same utterance, uniformly, with repetition.

    Arguments
    ---------
    counts : masked frames of each utterance.
    num_negatives : N.
    rng : utterance b draws from ``rng.numpy("negatives", b)``.

    Returns
    -------
    (S, N) int64, positions among the masked frames **of the frame's own utterance** (0 .. M-1), never the
    frame itself. The only masked frame of an utterance gets itself N times; :func:`contrastive_logits`
    takes such entries out, so that it costs and teaches nothing.

    Example
    -------
    >>> sample_negatives([3, 1], 2, Randomness(0)).shape
    (4, 2)
    """
    rows = [np.empty((0, num_negatives), dtype=np.int64)]
    for index, count in enumerate(counts):
        if count < 2:
            rows.append(np.zeros((count, num_negatives), dtype=np.int64))
            continue
        drawn = rng.numpy("negatives", index).integers(0, count - 1, (count, num_negatives))
        rows.append(drawn + (drawn >= np.arange(count)[:, None]))
    return np.concatenate(rows)


def sample_cross_negatives(counts: Sequence[int], num_negatives: int, rng: Randomness) -> np.ndarray:
    """For each masked frame, other masked frames of the whole batch, uniformly, with repetition.

    fairseq leaves out the row that has the frame's place *within its utterance*, so that from the second utterance on
    a frame can be its own negative; here it is the frame itself that is left out.

    Arguments
    ---------
    counts : masked frames of each utterance, S in all.
    num_negatives : C.
    rng : utterance b draws from ``rng.numpy("cross negatives", b)``.

    Returns
    -------
    (S, C) int64, positions among the S masked frames **of the batch**; the only one of a batch gets itself.

    Example
    -------
    >>> sample_cross_negatives([3, 1], 2, Randomness(0)).shape
    (4, 2)
    """
    total = sum(counts)
    if total < 2:
        return np.zeros((total, num_negatives), dtype=np.int64)
    drawn = [
        rng.numpy("cross negatives", index).integers(0, total - 1, (count, num_negatives))
        for index, count in enumerate(counts)
    ]
    rows = np.concatenate(drawn)
    return rows + (rows >= np.arange(total)[:, None])


def contrastive_logits(
    predictions: Tensor,
    targets: Tensor,
    codes: Tensor,
    negatives: Tensor,
    *,
    counts: Sequence[int],
    temperature: float,
    cross: Tensor | None = None,
) -> Tensor:
    """Cosine similarities of each prediction to its target (column 0) and to its negatives, over the temperature.

    All similarities of an utterance come from one M x M product, and the wanted ones are gathered: a hundred
    times less memory traffic than gathering N vectors for each frame.

    Arguments
    ---------
    predictions, targets : (S, F) float32.
    codes : (S, groups) int64, the code indices behind the targets. A negative of the same codes as the
        positive **is** the positive and gets the logit -inf. (The originals compare vectors bit by bit,
        which a reordered sum can break.)
    negatives : (S, N) int64, see :func:`sample_negatives`.
    counts : masked frames of each utterance, sum S.
    temperature : divisor of the similarities.
    cross : (S, C) int64, see :func:`sample_cross_negatives`; None: none.

    Returns
    -------
    (S, 1 + N + C) float32
    """
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    equal = len(set(counts)) == 1
    if equal:
        first = torch.arange(0, len(codes), counts[0], device=negatives.device).repeat_interleave(
            counts[0], output_size=len(codes)
        )
    else:
        first = to_device(torch.from_numpy(np.repeat(offsets[:-1], counts)), negatives.device)
    # (S, N), positions among all S rows
    flat = negatives + first[:, None]
    same = (codes[flat] == codes[:, None]).all(-1)
    predictions, targets = F.normalize(predictions, dim=-1), F.normalize(targets, dim=-1)
    if equal:
        shape = (len(counts), counts[0], -1)
        # (batch, M, F) x (batch, F, M) -> (S, M)
        similar = (predictions.view(shape) @ targets.view(shape).transpose(1, 2)).flatten(0, 1)
        chosen = similar.gather(1, negatives)
    else:
        chosen = torch.cat(
            [
                (predictions[start:end] @ targets[start:end].T).gather(1, negatives[start:end])
                for start, end in pairwise(offsets.tolist())
            ]
        )
    if cross is not None:
        chosen = torch.cat([chosen, (predictions @ targets.T).gather(1, cross)], dim=1)
        same = torch.cat([same, (codes[cross] == codes[:, None]).all(-1)], dim=1)
    positives = (predictions * targets).sum(-1, keepdim=True)
    return torch.cat([positives, chosen.masked_fill(same, float("-inf"))], dim=1) / temperature


def contrastive_logits_plain(
    predictions: Tensor,
    targets: Tensor,
    codes: Tensor,
    negatives: Tensor,
    *,
    counts: Sequence[int],
    temperature: float,
    cross: Tensor | None = None,
) -> Tensor:
    """The same by gathering every vector, one utterance at a time; the reference of the tests."""
    rows, start = [], 0
    for count in counts:
        part = slice(start, start + count)
        # (M, N + C), positions among all S rows
        others = negatives[part] + start if cross is None else torch.cat([negatives[part] + start, cross[part]], dim=1)
        # (M, 1 + N + C, F)
        candidates = torch.cat([targets[part][:, None], targets[others]], dim=1)
        logits = F.cosine_similarity(predictions[part][:, None], candidates, dim=-1) / temperature
        same = (codes[others] == codes[part][:, None]).all(-1)
        rows.append(torch.cat([logits[:, :1], logits[:, 1:].masked_fill(same, float("-inf"))], dim=1))
        start += count
    return torch.cat(rows)


def contrastive_loss(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the rows of the cross entropy with column 0 as the right answer, in nats; guessing gives log(1 + N).

    Arguments
    ---------
    logits : (S, 1 + N) float32; entries of -inf take no part.
    weights : (S,) factor of each row's share; None: 1.
    """
    answers = logits.new_zeros(len(logits), dtype=torch.long)
    if weights is None:
        return F.cross_entropy(logits, answers, reduction="sum")
    return (F.cross_entropy(logits, answers, reduction="none") * weights).sum()


def count_correct(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Rows whose positive has the largest logit; a row whose logits are all equal knows nothing and does not count,
    and one of weight 0 neither."""
    best, worst = logits.amax(1), logits.amin(1)
    correct = (logits[:, 0] == best) & (worst < best)
    return correct.sum() if weights is None else (correct & (weights > 0)).sum()
