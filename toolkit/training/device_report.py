"""What ``python -m toolkit devices`` prints: what is here, its versions and speed, what the others need."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from toolkit.errors import DeviceError
from toolkit.training.device_probe import try_device
from toolkit.training.devices import (
    DEVICE_KINDS,
    DTYPES,
    Device,
    DeviceKind,
    advised_environment,
    device_count,
    first_line,
    install_words,
    named_device,
    prepare_process,
    resolve_device,
)
from toolkit.training.options import RunOptions

COPIED_BYTES = 256 << 20
"""A copy of so much shows the memory's speed, not that of a cache."""

FIRST_SIZE, LARGEST_SIZE = 256, 8192
"""Rows and columns of the matrices: doubled until ten products fill the time, or as many as any device wants."""

ABSENT = 1
"""Exit code where the device that was named is not here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m toolkit devices``."""
    names = ", ".join(["auto", *(kind.name for kind in DEVICE_KINDS)])
    parser.add_argument("device", nargs="?", metavar="NAME", help=f"only this one ({names}); exit code 1 if absent")
    parser.add_argument("--no_measurement", action="store_true", help="leave out the figures of speed")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each measurement (1)")


def run_command(arguments: argparse.Namespace) -> int:
    """Print the report; returns 0, or ABSENT."""
    if not 0 < arguments.seconds <= 60:
        raise DeviceError(f"--seconds is {arguments.seconds:g}; give a length above 0, 60 at most.")
    if arguments.device is None:
        print(device_table())
        here = [kind for kind in DEVICE_KINDS if device_count(kind)[0]]
    else:
        if arguments.device.strip().lower() == "auto":
            arguments.device = resolve_device("auto").type
        kind, _ = named_device(arguments.device)
        count, reason = device_count(kind)
        if not count:
            print(f"{kind.name} ({kind.title}) is not here, because {reason}.\nIt needs {install_words(kind)}.")
            print("\n".join(_version_lines(kind) + [f"  {sentence}" for sentence in advised_environment(kind)]))
            return ABSENT
        here = [kind]
    for kind in here:
        wanted = arguments.device if arguments.device and ":" in arguments.device else kind.name
        blank = [] if arguments.device else [""]
        print("\n".join([*blank, *_describe(resolve_device(wanted), arguments)]), flush=True)
    return 0


def _describe(device: Device, arguments: argparse.Namespace) -> list[str]:
    """A device that is here, with the settings that a run on it makes."""
    lines = [f"{device.name}: {device.kind.title}", *_version_lines(device.kind)]
    said = prepare_process(device, RunOptions())
    device, tried = try_device(device)
    lines += [f"  {sentence}" for sentence in said + tried]
    if not arguments.no_measurement:
        lines += speed_lines(device, seconds=arguments.seconds)
    return lines


def device_table() -> str:
    """One line for each row of the table, here or not, and what ``--device auto`` means."""
    rows = [("device", "here", "precisions", "collectives", "remarks")]
    for kind in DEVICE_KINDS:
        count, reason = device_count(kind)
        able = [name for name in kind.precisions if not count or name != "bf16" or kind.has_bf16()]
        remarks = Device(kind, torch.device(kind.name)).name if count else f"{reason}; needs {install_words(kind)}"
        rows.append((kind.name, str(count) if count else "no", " ".join(able), kind.backend, remarks))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    chosen = resolve_device("auto")
    return "\n".join([*lines, "", f"auto means {chosen.name}, precision {chosen.resolve_precision('auto')}."])


def _version_lines(kind: DeviceKind) -> list[str]:
    """Versions of Python, torch and what the device needs."""
    found = {"Python": platform.python_version(), "torch": torch.__version__, **kind.versions()}
    return [f"  {', '.join(f'{name} {version}' for name, version in found.items())}"]


# ------------------------------------------------------------------------------------------------ how fast it is


def speed_lines(
    device: Device, *, seconds: float = 1.0, largest: int = LARGEST_SIZE, copied_bytes: int = COPIED_BYTES
) -> list[str]:
    """A line for each format of the device's products: GFLOP/s of a product of square matrices, GB/s of a copy.

    Arguments
    ---------
    device : where.
    seconds : how long each of the figures is measured.
    largest : rows and columns of the matrices at most.
    copied_bytes : size of the tensor that is copied; it counts twice, once read and once written.
    """
    lines = []
    for precision in ("fp32", "bf16"):
        if precision not in device.kind.precisions:
            continue
        name = str(DTYPES[precision]).removeprefix("torch.")
        try:
            product = product_rate(device, DTYPES[precision], largest, seconds)
            copy = copy_rate(device, DTYPES[precision], copied_bytes, seconds)
        except (RuntimeError, TypeError) as error:  # memory, or a format that the device does not have
            lines.append(f"  {name:8}  not to be measured ({first_line(error)})")
            continue
        lines.append(f"  {name:8}  product {product / 1e9:11,.1f} GFLOP/s   copy {copy / 1e9:8,.1f} GB/s")
    return lines


def product_rate(device: Device, dtype: torch.dtype, largest: int, seconds: float) -> float:
    """Floating point operations per second in products of two square matrices of at most so many rows."""
    size = min(FIRST_SIZE, largest)
    while True:
        left, right = (torch.randn(size, size).to(device.torch_device, dtype) for _ in range(2))
        out = torch.empty_like(left)

        def multiply(left: Tensor = left, right: Tensor = right, out: Tensor = out) -> None:
            torch.mm(left, right, out=out)

        # Twice as many rows are eight times the work.
        if 2 * size > largest or 80 / _calls_per_second(device, multiply, 0.0) > seconds:
            return 2.0 * size**3 * _calls_per_second(device, multiply, seconds)
        size *= 2


def copy_rate(device: Device, dtype: torch.dtype, copied_bytes: int, seconds: float) -> float:
    """Bytes per second, read and written, in copies of a tensor."""
    source = torch.ones(copied_bytes // dtype.itemsize, dtype=dtype, device=device.torch_device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() * dtype.itemsize * _calls_per_second(device, lambda: target.copy_(source), seconds)


def _calls_per_second(device: Device, work: Callable[[], object], seconds: float) -> float:
    """How often ``work`` is done in a second (once at least); the device is waited for about ten times."""

    def done(calls: int) -> None:
        for _ in range(calls):
            work()
        device.mark_step()
        device.synchronize()

    done(1)  # the first call sets things up
    calls, at_once, elapsed, began = 0, 1, 0.0, time.perf_counter()
    while not calls or elapsed < seconds:
        done(at_once)
        calls += at_once
        elapsed = time.perf_counter() - began
        at_once = max(1, int(calls / max(elapsed, 1e-9) * seconds / 10))
    return calls / max(elapsed, 1e-9)
