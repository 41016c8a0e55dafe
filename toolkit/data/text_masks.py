"""Masks over tokens: spans to be hidden, some of them left or replaced, with fairseq's random sequence where wanted."""

from __future__ import annotations

import numpy as np

from toolkit.data.text_dictionary import SPECIALS
from toolkit.errors import ConfigError, TokenError


class TextMasking:
    """Hides tokens of a block. Defaults are data2vec text base's; BERT's are 0.15, length 1, keep and random 0.1.

    ``int(mask_prob * n / mask_length + u)`` spans, u uniform in 0..1, with different starts, what overlaps or passes
    the end being lost: 0.35 hides about 30 % of the tokens. ``<s>`` and ``</s>`` may be hidden like any other.

    Arguments
    ---------
    mask_id : stands for a hidden token.
    vocab_size : ids from which random tokens are drawn, the mask's included and the four special ones not.
    mask_prob : share of tokens that the spans would cover if none overlapped.
    mask_length : tokens of a span.
    mask_length_std : standard deviation of its length, 0 = all alike.
    keep_prob, random_prob : share of the chosen tokens that stay as they are, and that become a random token.
    random_weights : (vocab_size,) how often each id is drawn then; None = all alike.

    Raises
    ------
    ConfigError : an argument makes no sense.

    Example
    -------
    >>> masking = TextMasking(mask_id=9, vocab_size=10)
    >>> source, chosen = masking(np.array([0, 4, 5, 6, 7, 8, 4, 5, 6, 2]), fairseq_generator(1, 1, 5))
    >>> source.tolist(), int(chosen.sum())
    ([0, 4, 5, 6, 9, 9, 9, 9, 6, 2], 4)
    """

    def __init__(
        self,
        *,
        mask_id: int,
        vocab_size: int,
        mask_prob: float = 0.35,
        mask_length: int = 4,
        mask_length_std: float = 0.0,
        keep_prob: float = 0.0,
        random_prob: float = 0.0,
        random_weights: np.ndarray | None = None,
    ) -> None:
        shares = {"mask_prob": mask_prob, "keep_prob": keep_prob, "random_prob": random_prob}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value!r}, expected a share from 0 to 1.")
        if not mask_prob:
            raise ConfigError("mask_prob is 0: nothing would be hidden and nothing learned; expected a share above 0.")
        if keep_prob + random_prob > 1:
            raise ConfigError(f"keep_prob {keep_prob} and random_prob {random_prob} are more than 1 together.")
        if mask_length != int(mask_length) or mask_length < 1:
            raise ConfigError(f"mask_length is {mask_length!r}, expected a whole number of tokens greater than 0.")
        if mask_length_std < 0:
            raise ConfigError(f"mask_length_std is {mask_length_std!r}, expected 0 or more.")
        if not 0 <= mask_id < vocab_size:
            raise ConfigError(f"mask_id is {mask_id}, expected one of the {vocab_size} ids.")
        self.mask_id, self.vocab_size, self.mask_prob = mask_id, vocab_size, mask_prob
        self.mask_length, self.mask_length_std = int(mask_length), mask_length_std
        self.keep_prob, self.random_prob = keep_prob, random_prob
        weights = np.ones(vocab_size) if random_weights is None else np.array(random_weights, dtype=np.float64)
        if weights.shape != (vocab_size,):
            raise ConfigError(f"random_weights has shape {weights.shape}, expected ({vocab_size},).")
        weights[: len(SPECIALS)] = 0
        if random_prob > 0 and not weights.sum() > 0:
            raise ConfigError("random_weights leave no token to be drawn; give some of them a weight.")
        self._weights = weights / max(weights.sum(), 1e-12)

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Hide some of ``tokens`` (n,).

        Returns
        -------
        What the model is shown (n,) int64, and the chosen tokens (n,) bool: hidden, kept or replaced. A model that
        predicts from hidden ones alone finds them by the mask's id.

        Raises
        ------
        TokenError : the mask's id stands in the text.
        """
        if np.any(tokens == self.mask_id):
            raise TokenError(
                f"the text holds the mask's id {self.mask_id} as a token; take the dictionary that belongs to it."
            )
        chosen = self._spans(len(tokens), rng)
        hidden, replaced = chosen, np.zeros(len(tokens), dtype=bool)
        touched = self.keep_prob + self.random_prob
        if touched > 0:
            apart = chosen & (rng.random(len(tokens)) < touched)
            kept = apart
            if self.keep_prob == 0:
                kept = replaced
            elif self.random_prob > 0:
                kept = apart & (rng.random(len(tokens)) < self.keep_prob / touched)
            hidden, replaced = chosen & ~kept, apart & ~kept
        source = np.where(hidden, self.mask_id, tokens).astype(np.int64)
        if self.random_prob > 0:
            source[replaced] = rng.choice(self.vocab_size, int(replaced.sum()), p=self._weights)
        return source, chosen

    def _spans(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count,) bool; the order of the draws is fairseq's."""
        spans = int(self.mask_prob * count / self.mask_length + rng.random())
        starts = rng.choice(count, min(spans, count), replace=False)
        lengths = np.full(len(starts), self.mask_length)
        if self.mask_length_std > 0:
            lengths = np.rint(rng.normal(self.mask_length, self.mask_length_std, len(starts))).astype(np.int64)
        chosen = np.zeros(count, dtype=bool)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            chosen[start : start + max(0, length)] = True
        return chosen


def fairseq_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator with which fairseq masks block ``index`` in ``epoch`` (from 1)."""
    return np.random.default_rng(fairseq_seed(seed, epoch, index))


def fairseq_seed(*numbers: int) -> int:
    """fairseq's seed for (seed, epoch, index): the tuple's hash in CPython from 3.8 on, 64 bit, modulo a million.

    The modulo is that of floats, which loses the hash's last digits: an integer's gives other numbers.

    Example
    -------
    >>> fairseq_seed(1, 1, 0)
    810752
    """
    return int(hash(numbers) % 1e6)
