"""Randomness as a function of (seed, update, micro-batch, item), made in one place.

No generator state is carried from one step to the next, so nothing about randomness needs saving:
a run resumed at any update draws what the uninterrupted run would have drawn, and N processes draw
what one process with N times the accumulation draws.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for the stream named by ``keys`` (integers and words, order matters).

    Example
    -------
    >>> derive_seed(1, "crop", 7) == derive_seed(1, "crop", 7)
    True
    >>> derive_seed(1, "crop", 7) == derive_seed(1, "crop", 8)
    False
    """
    text = "/".join(f"{type(key).__name__[0]}{key}" for key in (int(seed), *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Randomness:
    """A place in the tree of random streams: a seed and the keys that lead here.

    Example
    -------
    >>> here = Randomness(1234).child("update", 10, 0)
    >>> float(here.numpy("mask", 3).random()) == float(here.numpy("mask", 3).random())
    True
    """

    seed: int
    keys: tuple[int | str, ...] = ()

    def child(self, *keys: int | str) -> Randomness:
        """The place further down, under ``keys``."""
        return Randomness(self.seed, self.keys + keys)

    def integer(self, *keys: int | str) -> int:
        """A 63-bit integer for the stream ``keys``."""
        return derive_seed(self.seed, *self.keys, *keys)

    def numpy(self, *keys: int | str) -> np.random.Generator:
        """A fresh NumPy generator for the stream ``keys``."""
        return np.random.Generator(np.random.SFC64(self.integer(*keys)))

    def torch(self, device: torch.device | str, *keys: int | str) -> torch.Generator:
        """A fresh torch generator on ``device`` for the stream ``keys``."""
        return torch.Generator(device=device).manual_seed(self.integer(*keys))
