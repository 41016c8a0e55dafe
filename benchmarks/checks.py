"""What the benchmarks check before they measure: numbers of the command line, and that the device is there."""

from __future__ import annotations

import argparse
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from toolkit.errors import ConfigError
from toolkit.training.devices import resolve_device


def check_numbers(options: argparse.Namespace, **least: float) -> None:
    """Refuse numbers below those of ``least``, by the option's name; an option that was not given is passed over."""
    for name, bound in least.items():
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not bound <= value < math.inf:
                raise ConfigError(f"--{name} is {value}, expected a number of at least {bound:g}.")


def check_device(name: str) -> None:
    """Raise DeviceError unless the device is here; asked in a process that ends and holds nothing of it."""
    if name == "cpu":
        return
    # spawn: after a fork, CUDA could not be started in the process
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(_resolve, name).result()


def _resolve(name: str) -> None:
    resolve_device(name)
