"""Iterators of micro-batches that end when they are told to, and that know how long they were waited for."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

from toolkit.training.metrics import Meter


def timed(micro_batches: Iterator[Any], meter: Meter) -> Generator[Any, None, None]:
    """The same micro-batches; ``meter.waited`` grows by the time that it takes to get them."""
    try:
        while True:
            began = time.perf_counter()
            try:
                micro = next(micro_batches)
            except StopIteration:
                return
            finally:
                meter.waited += time.perf_counter() - began
            yield micro
    finally:
        close(micro_batches)


def passed_on(items: Iterator[Any]) -> Generator[Any, None, None]:
    """The same items, as a generator that can be closed whatever ``items`` is.

    Example
    -------
    >>> list(passed_on(iter([1, 2])))
    [1, 2]
    """
    try:
        yield from items
    finally:
        close(items)


def close(thing: Any) -> None:
    """End a generator or a loader now, so that its workers stop; a plain iterator has nothing to end."""
    if hasattr(thing, "close"):
        thing.close()
