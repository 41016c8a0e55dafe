"""The plan of one epoch: which rows make which batch, as arrays and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The batches of one epoch, in the order in which they are taken; the same on every rank.

    Arguments
    ---------
    rows : (utterances,) int32, rows of the manifest; batch ``b`` holds ``rows[batch_offsets[b]:batch_offsets[b + 1]]``.
    batch_offsets : (batches + 1,) int64.
    batch_bucket : (batches,) int16, index of the bucket.
    batch_samples : (batches,) int64, length to pad or crop to in samples; 0 = the longest of the batch.
    update_offsets : (updates + 1,) int64, positions in the list of batches: update ``u`` is made of the
        batches ``update_offsets[u]`` to ``update_offsets[u + 1] - 1``, its micro-batches 0, 1, 2, ...
    crop : True where longer utterances are cropped to ``batch_samples``, False where shorter ones are padded.
    """

    rows: np.ndarray
    batch_offsets: np.ndarray
    batch_bucket: np.ndarray
    batch_samples: np.ndarray
    update_offsets: np.ndarray
    crop: bool = False

    @property
    def num_batches(self) -> int:
        """Number of batches (over all ranks)."""
        return len(self.batch_samples)

    @property
    def num_updates(self) -> int:
        """Number of optimizer updates."""
        return len(self.update_offsets) - 1

    @property
    def nbytes(self) -> int:
        """Memory of all arrays in bytes."""
        arrays = (self.rows, self.batch_offsets, self.batch_bucket, self.batch_samples, self.update_offsets)
        return sum(array.nbytes for array in arrays)

    def batch_rows(self, batch: int) -> np.ndarray:
        """The rows of batch ``batch`` (utterances,), a view."""
        return self.rows[self.batch_offsets[batch] : self.batch_offsets[batch + 1]]

    def micros(self, update: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int | None]]:
        """What ``rank`` does in ``update``: (micro-batch index within the update, batch index or None).

        Micro-batch ``m`` belongs to rank ``m % world_size``. Every rank gets equally many; the list of a rank for which
        no batch is left in the last update of an epoch holds None there.
        """
        first, end = int(self.update_offsets[update]), int(self.update_offsets[update + 1])
        turns = -(-(end - first) // world_size)
        micros = (turn * world_size + rank for turn in range(turns))
        return [(micro, first + micro if first + micro < end else None) for micro in micros]
