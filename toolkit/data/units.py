"""What batches are measured in: seconds of audio, or tokens of text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A measure of how much goes through a model, and its words in the log.

    Arguments
    ---------
    total : name of the amount in the log and the summary.
    rate, pace : amount per second, in the summary and (short) on the console.
    grid : buckets end on multiples of 1 / ``grid``.
    slack : by how much an item may be longer or shorter than its length says without leaving its bucket's shape.
    """

    total: str
    rate: str
    pace: str
    grid: int
    slack: float


# 1/100 second is 160 samples at 16 kHz; a file may be a little longer than its manifest says.
SECONDS = Unit(total="audio_seconds", rate="audio seconds per second", pace="audio s/s", grid=100, slack=0.005)

TOKENS = Unit(total="text_tokens", rate="tokens per second", pace="tokens/s", grid=1, slack=0.0)
