"""The loader: carries out a sampler's plan, in this process or in workers, with the same result.

A batch is a function of (plan, epoch, seed), never of the worker that makes it. Audio that cannot be read is left
out, named and counted, up to a stated share of the dataset.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import Sampler as TorchSampler

from toolkit.data.batch import SpeechBatch, collate_speech
from toolkit.data.plan import EpochPlan
from toolkit.data.sampler import Sampler
from toolkit.errors import AudioError, ConfigError, ToolkitError, TrainingError, WorkerError

__all__ = ["Loader", "MicroBatch", "SpeechBatch", "collate_speech"]

PREFETCH = 4
"""Micro-batches that each worker prepares ahead."""

M_MMAP_THRESHOLD = -3
"""mallopt's number for the size from which glibc takes a block from the system and gives it back when it is freed."""

LARGE_BLOCK = 1 << 20
"""Bytes of such a block in a worker: batches, not single utterances."""

NAMED = 5
"""Bad utterances that the error message quotes in full."""


@dataclass(frozen=True)
class MicroBatch:
    """One rank's share of one micro-step.

    Arguments
    ---------
    batch : what the collation made; None where this rank has nothing to do, or all audio of the batch was bad.
    epoch : from 0.
    update : index of the optimizer update within the epoch.
    micro : index of the micro-batch within the update, over all ranks.
    last : whether this rank's last of this update.
    bad : (id, sentence) of each utterance that was left out.
    weight : number of utterances in the batch.
    """

    batch: Any | None
    epoch: int
    update: int
    micro: int
    last: bool
    bad: tuple[tuple[str, str], ...] = ()
    weight: float = 0.0

    def pin_memory(self) -> MicroBatch:
        """The same with the batch in page-locked memory, where the batch can."""
        return replace(self, batch=self.batch.pin_memory()) if hasattr(self.batch, "pin_memory") else self


class LoadableDataset(Protocol):
    """What the loader needs of a dataset."""

    def __len__(self) -> int: ...

    def load(self, row: int, *, epoch: int, crop_samples: int | None, seed: int) -> Mapping[str, Any]: ...


@dataclass(frozen=True, eq=False)
class _Request:
    """A micro-batch to be made."""

    epoch: int
    update: int
    micro: int
    last: bool
    rows: np.ndarray | None
    samples: int | None
    crop: bool


@dataclass(frozen=True)
class _Failure:
    """A user's error met in a worker, to be raised where the user sees it."""

    kind: type[ToolkitError]
    sentence: str


class Loader:
    """Iterates over the micro-batches of one rank, epoch by epoch, from any update on.

    Arguments
    ---------
    dataset : has ``load(row, epoch=, crop_samples=, seed=)``, as :class:`~toolkit.data.dataset.DynamicItemDataset`.
    sampler : has ``plan(epoch)``; its durations belong to the dataset's rows.
    collate : makes a batch: ``collate(items, samples=N)``, N = length to pad to or None.
    num_workers : processes that load ahead; 0 = load in this one. The result is the same.
    rank, world_size : which share; ``world_size`` must be the sampler's.
    seed : of crops and other random items.
    max_bad_share : share of the dataset whose audio may be bad (0.01 = 1 %); 0 = none.
    pin_memory : page-locked batches, for copies to an accelerator.
    fingerprint : tells this set from another, for a run that is resumed; "" = not known.

    Raises
    ------
    ConfigError for arguments that do not fit; while iterating AudioError when too much audio is bad, and
    WorkerError when a worker dies.

    Example
    -------
    >>> import numpy as np
    >>> from toolkit.data.sampler import BucketSampler
    >>> class Tones:
    ...     def __len__(self):
    ...         return 4
    ...     def load(self, row, *, epoch, crop_samples, seed):
    ...         return {"id": f"tone{row}", "waveform": np.full(100 * (row + 1), 0.5, dtype=np.float32)}
    >>> sampler = BucketSampler([0.1, 0.2, 0.3, 0.4], batch_seconds=1.0, sample_rate=1000, num_buckets=1)
    >>> loader = Loader(Tones(), sampler)
    >>> sum(micro.weight for micro in loader.epoch(0))
    4.0
    """

    def __init__(
        self,
        dataset: LoadableDataset,
        sampler: Sampler,
        *,
        collate: Callable[..., Any] = collate_speech,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        max_bad_share: float = 0.01,
        pin_memory: bool = False,
        fingerprint: str = "",
    ) -> None:
        if not 0 <= rank < world_size or sampler.world_size != world_size:
            raise ConfigError(
                f"the loader is rank {rank} of {world_size} and its sampler plans for {sampler.world_size} ranks; give "
                "both the same world_size, and a rank below it."
            )
        if not 0 <= max_bad_share <= 1:
            raise ConfigError(f"max_bad_share is {max_bad_share!r}, expected a share from 0 to 1 (0.01 = 1 %).")
        if num_workers < 0:
            raise ConfigError(f"num_workers is {num_workers!r}, expected 0 or more.")
        durations = getattr(sampler, "durations", None)
        if durations is not None and len(durations) != len(dataset):
            raise ConfigError(
                f"the sampler plans {len(durations)} utterances and the dataset has {len(dataset)}; give the sampler "
                "the durations of this dataset."
            )
        self.dataset, self.sampler = dataset, sampler
        self.num_workers, self.rank, self.world_size = num_workers, rank, world_size
        self.max_bad_share, self.fingerprint = max_bad_share, fingerprint
        self.bad: dict[str, str] = {}
        self._maker = _BatchMaker(dataset, collate, int(seed))
        self._pin_memory = pin_memory
        self._stream: Iterator[MicroBatch | _Failure] | None = None
        self._position: tuple[int, int] | None = None

    @property
    def updates_per_epoch(self) -> int:
        """Updates of each epoch, the same on all ranks."""
        return self.sampler.updates_per_epoch

    @property
    def plan_digest(self) -> str:
        """Equal where the updates hold the same utterances; empty for samplers that do not say."""
        return getattr(self.sampler, "plan_digest", "")

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of ``epoch``, from update ``first_update`` on (nothing before it is loaded).

        Every rank gets equally many for each update, at least one, the last of them marked ``last``. With workers
        and a training sampler the beginning of the next epoch is prepared meanwhile.

        Raises
        ------
        AudioError when the share of bad audio exceeds ``max_bad_share`` (of what this rank has met), WorkerError
        when a worker was killed, and any error of the dataset's items.
        """
        if not 0 <= first_update <= self.updates_per_epoch:
            raise ConfigError(
                f"update {first_update} is not in an epoch of {self.updates_per_epoch} updates; the manifest or the "
                "batch size has changed since."
            )
        if self._position != (epoch, first_update) or self._stream is None:
            self._start(epoch, first_update)
        # Until the epoch has ended well, what the stream gives next is nobody's business but this iterator's.
        self._position = None
        stream = self._stream
        for _ in range(first_update, self.updates_per_epoch):
            last = False
            while not last:
                if stream is not self._stream:
                    raise TrainingError(
                        "the loader was started again while an earlier pass over it was still being read; finish or "
                        "drop that one first."
                    )
                micro = self._next()
                self._count(micro.bad)
                last = micro.last
                yield micro
        if self.sampler.endless:
            self._position = (epoch + 1, 0)
        else:
            self.close()

    def close(self) -> None:
        """End the workers; the next ``epoch`` starts new ones."""
        stream, self._stream, self._position = self._stream, None, None
        shutdown = getattr(stream, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()

    def _start(self, epoch: int, first_update: int) -> None:
        self.close()
        requests = self._requests(epoch, first_update)
        if self.num_workers == 0:
            self._stream = (self._maker[request] for request in requests)
            if self._pin_memory:
                self._stream = (made.pin_memory() if isinstance(made, MicroBatch) else made for made in self._stream)
            return
        loader = DataLoader(
            self._maker,
            batch_size=None,
            sampler=_Stream(requests),
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            pin_memory=self._pin_memory,
            prefetch_factor=PREFETCH,
            multiprocessing_context=_worker_context(),
            worker_init_fn=_give_memory_back,
        )
        with _child_handler(None):
            self._stream = iter(loader)

    def _next(self) -> MicroBatch:
        assert self._stream is not None
        workers = getattr(self._stream, "_workers", [])
        try:
            # Of a worker that dies we hear only while we wait for it: torch's own handler would raise in the middle of
            # whatever the process does just then, an optimizer's step or a checkpoint.
            with _child_handler(lambda *_: _check_workers(workers)) if workers else contextlib.nullcontext():
                _check_workers(workers)
                made = next(self._stream)
        except (RuntimeError, EOFError, OSError) as error:
            told = "exited unexpectedly" in str(error) or "killed by signal" in str(error)
            # What it had made ready cannot be fetched any more: its memory is handed over by the worker itself.
            if not told and (isinstance(error, RuntimeError) or not workers or not _is_one_dead(workers)):
                raise
            self._stream = None
            raise WorkerError(
                "a loader worker was killed, most likely because memory (or shared memory, /dev/shm) ran out; lower "
                "num_workers or the batch (batch_seconds, batch_tokens), and run the same command again to resume."
            ) from error
        if isinstance(made, _Failure):
            self.close()
            raise made.kind(made.sentence)
        return made

    def _requests(self, epoch: int, first_update: int) -> Iterator[_Request]:
        """All micro-batches of this rank from there on; through all later epochs, where the sampler's differ."""
        endless = True
        while endless:
            plan = self.sampler.plan(epoch)
            for update in range(first_update, plan.num_updates):
                yield from self._update_requests(plan, epoch, update)
            epoch, first_update, endless = epoch + 1, 0, self.sampler.endless

    def _update_requests(self, plan: EpochPlan, epoch: int, update: int) -> Iterator[_Request]:
        micros = plan.micros(update, self.rank, self.world_size)
        for micro, batch in micros:
            last = micro == micros[-1][0]
            rows, samples = None, None
            if batch is not None:
                # A copy: a view would send the whole epoch's rows to the worker.
                rows, samples = plan.batch_rows(batch).copy(), int(plan.batch_samples[batch]) or None
            yield _Request(epoch, update, micro, last, rows, samples, plan.crop)

    def _count(self, bad: Sequence[tuple[str, str]]) -> None:
        """Remember bad utterances; stop when there are too many."""
        if not bad:
            return
        self.bad.update(bad)
        allowed = self.max_bad_share * len(self.dataset)
        if len(self.bad) <= allowed + 1e-9:
            return
        self.close()
        sentences = list(self.bad.values())
        more = f" (and {len(sentences) - NAMED} more)" if len(sentences) > NAMED else ""
        raise AudioError(
            f"{len(self.bad)} of {len(self.dataset)} utterances have bad audio, more than max_bad_share "
            f"{self.max_bad_share:g} allows; mend the files or raise max_bad_share to "
            "go on, or remove them from the manifest and take another output_folder. "
            f"{' '.join(sentences[:NAMED])}{more}"
        )


class _BatchMaker(Dataset):
    """Turns a request into a micro-batch; lives in this process or in a worker."""

    def __init__(self, dataset: LoadableDataset, collate: Callable[..., Any], seed: int) -> None:
        self._dataset, self._collate, self._seed = dataset, collate, seed

    def __getitem__(self, request: _Request) -> MicroBatch | _Failure:
        micro = MicroBatch(None, request.epoch, request.update, request.micro, request.last)
        if request.rows is None:
            return micro
        try:
            return self._made(request, micro)
        except ToolkitError as error:
            return _Failure(type(error), str(error))

    def _made(self, request: _Request, micro: MicroBatch) -> MicroBatch:
        items, bad = [], []
        crop = request.samples if request.crop else None
        for row in request.rows.tolist():
            try:
                items.append(self._dataset.load(row, epoch=request.epoch, crop_samples=crop, seed=self._seed))
            except AudioError as error:
                bad.append((self._name(row), str(error)))
        batch = self._collate(items, samples=request.samples) if items else None
        return replace(micro, batch=batch, bad=tuple(bad), weight=float(len(items)))

    def _name(self, row: int) -> str:
        manifest = getattr(self._dataset, "manifest", None)
        return manifest.ids[row] if manifest is not None else str(row)


class _Stream(TorchSampler):
    """Hands prepared requests to torch's DataLoader, once."""

    def __init__(self, requests: Iterator[_Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[_Request]:
        return self._requests


def _unchanged(value: Any) -> Any:
    return value


def _is_one_dead(workers: Sequence[Any]) -> bool:
    """Whether one has died, or does so within a second."""
    deadline = time.monotonic() + 1.0
    while all(worker.exitcode in (None, 0) for worker in workers):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _check_workers(workers: Sequence[Any]) -> None:
    """RuntimeError, in torch's words, if one has ended otherwise than by coming to its end."""
    for worker in workers:
        if worker.exitcode not in (None, 0):
            raise RuntimeError(f"DataLoader worker (pid {worker.pid}) exited unexpectedly with code {worker.exitcode}")


@contextlib.contextmanager
def _child_handler(handler: Callable[..., None] | None) -> Iterator[None]:
    """Within, ``handler`` is told of children that end (None: as before); afterwards who was told before is."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD) if handler is None else signal.signal(signal.SIGCHLD, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _give_memory_back(worker: int) -> None:
    """Let a worker return each batch's memory to the system at once.

    glibc learns from the first batch to keep blocks of that size, and then holds hundreds of megabytes in each worker.
    """
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    except (OSError, TypeError):  # a system without it
        return
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def _worker_context() -> Any:
    """Fork where it is safe: the manifest is then shared, and items need not be picklable."""
    return multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
