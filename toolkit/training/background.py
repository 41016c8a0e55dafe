"""Saving beside training: a snapshot of the state in host memory, and the thread that writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch

from toolkit.training.checkpoint_format import place_of


class Snapshot:
    """Copies of tensors in host memory, in buffers that are used again by the next snapshot.

    The buffers stay, so that only the first snapshot waits for the system to hand out memory: as much as all tensors
    together. For tensors of an accelerator they are pinned where it can be, and the copies run one behind the other
    with one wait at the end (torch rounds pinned buffers up to powers of two).

    Arguments
    ---------
    detached : False = tensors in host memory are taken as they are, not copied, and no buffer is kept: for a reader
        that is done before anything changes.

    Example
    -------
    >>> weight, snapshot = torch.ones(2), Snapshot()
    >>> snapshot.begin()
    >>> copy = snapshot.copy(weight)
    >>> snapshot.end()
    >>> weight.zero_(), copy
    (tensor([0., 0.]), tensor([1., 1.]))
    """

    def __init__(self, *, detached: bool = True) -> None:
        self.detached = detached
        self._buffers: list[torch.Tensor] = []
        self._used = 0
        self._copies: dict[Hashable, torch.Tensor] = {}
        self._sources: list[torch.Tensor] = []
        self._waits: dict[str, Callable[[], Any]] = {}

    def begin(self) -> None:
        """The copies of the last snapshot are needed no more."""
        self._used = 0
        self._copies.clear()
        self._sources.clear()

    def copy(self, tensor: torch.Tensor, is_temporary: bool = False) -> torch.Tensor:
        """The copy of a tensor; its values are there after `end`. Tied tensors have one copy, as they have one memory.

        Arguments
        ---------
        is_temporary : it was made for this call, and its memory may be another tensor's soon.
        """
        if tensor.device.type == "cpu" and not self.detached:
            return tensor
        place = None if is_temporary else place_of(tensor)
        if place is not None and place in self._copies:
            return self._copies[place]
        copy = self._buffer(tensor)
        wait = getattr(getattr(torch, tensor.device.type, None), "synchronize", None)
        copy.copy_(tensor, non_blocking=wait is not None)
        if wait is not None:
            self._waits[tensor.device.type] = wait
        if place is not None:
            self._copies[place] = copy
            # Held until the end: were it freed, another tensor could come to lie in its place.
            self._sources.append(tensor)
        return copy

    def end(self) -> None:
        """Wait until all copies are complete."""
        for wait in self._waits.values():
            wait()
        self._waits.clear()
        self._copies.clear()
        self._sources.clear()
        del self._buffers[self._used if self.detached else 0 :]

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        """The next buffer: the same as last time where the tensors come in the same order."""
        index = self._used
        self._used += 1
        if index == len(self._buffers):
            self._buffers.append(self._new_buffer(like))
        elif self._buffers[index].shape != like.shape or self._buffers[index].dtype != like.dtype:
            self._buffers[index] = self._new_buffer(like)
        return self._buffers[index]

    def _new_buffer(self, like: torch.Tensor) -> torch.Tensor:
        if self.detached and like.device.type != "cpu":
            try:
                return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
            except RuntimeError:
                pass  # this device has none, or no more: the copy is slower, not other
        return torch.empty(like.shape, dtype=like.dtype)


class BackgroundTask:
    """One call at a time in a thread; its error is kept until somebody waits for it.

    The end of the process waits for the thread.

    Example
    -------
    >>> task, done = BackgroundTask(), []
    >>> task.start(done.append, "written")
    >>> task.wait()
    >>> done
    ['written']
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether the call has not ended yet."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether the call has ended with an error that `wait` has not raised yet."""
        return self._error is not None

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin a call, after the one before has ended (`wait`)."""
        self.wait()
        self._thread = threading.Thread(target=self._call, args=(function, *args), name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Until the call has ended; its error is raised here, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _call(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            function(*args)
        except BaseException as error:  # whoever waits for it decides what it is
            self._error = error
